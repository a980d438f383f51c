// The Hopper kernels: grouped products through wgmma and TMA, for devices of compute capability 9.x.
//
// Plain functions over plain structs, called by the op file. Pointers are device pointers; strides count elements, and
// columns lie side by side. Nothing here reads device memory on the host, allocates, or waits, so every call can be
// captured into a CUDA graph. `why_not` looks at metadata alone and gives a reason where the copy engine cannot serve
// the operands (16-byte rows), null otherwise; then the sm_80 kernels take the call. A launcher gives null, or what
// went wrong. Ends of groups are clamped: to not decrease, and to the rows there are. Rows past the last come out as
// zeros.
#pragma once

#include <cstdint>

namespace omnimoe::cuda::sm90 {

enum class Element : int32_t { bf16, f16 };

// Row r starts at data + r * stride.
struct Rows {
  const void* data;
  int64_t stride;
};

// Matrix g starts at data + g * copy_stride, its rows are row_stride apart.
struct Bank {
  const void* data;
  int64_t copy_stride;
  int64_t row_stride;
};

// Ends of the rows of each group, (count,) int32, on the device.
struct Groups {
  const int32_t* ends;
  int64_t count;
};

// out[r] = x[r] W[g]^T + bias[g], W[g] being (columns, depth); with is_transposed out[r] = x[r] W[g], (depth, columns).
struct Product {
  Element element;
  Groups groups;
  int64_t rows, depth, columns;
  Rows x;  // (rows, depth)
  Bank weight;
  bool is_transposed;
  const void* bias;  // (groups, columns) or null
  void* out;         // (rows, columns), contiguous
};
const char* why_not(const Product&);
const char* run(const Product&, void* stream);

// out[g] = dy^T x over the rows of g, (columns, depth), contiguous; zeros where a group is empty.
struct Wgrad {
  Element element;
  Groups groups;
  int64_t rows, columns, depth;
  Rows dy;  // (rows, columns)
  Rows x;   // (rows, depth)
  void* out;
};
const char* why_not(const Wgrad&);
const char* run(const Wgrad&, void* stream);

// The first product of the experts' network and its activation: z = x W_in[g]^T + b_in[g], h = act(gate) * up of it.
struct Hidden {
  Element element;
  Groups groups;
  int64_t rows, hidden, width;  // R, D, F
  int32_t activation;           // silu, gelu, gelu_tanh, relu, relu2, clamped_silu
  bool is_gated, is_interleaved;
  Rows x;            // (R, D), gathered
  Bank w_in;         // (G, 2F or F, D)
  const void* b_in;  // (G, 2F or F) or null
  void* z;           // (R, 2F or F), contiguous, or null where it is not kept
  void* h;           // (R, F), contiguous
};
const char* why_not(const Hidden&);
const char* run(const Hidden&, void* stream);

// Backward through the second product and the activation: with g = grad[r] W_out, grad_z = weight * g * act'(z),
// h = weight * act(z), and what each 128 columns of F add to <g, act(z)>, the gradient of the row's weight.
struct HiddenBackward {
  Element element;
  Groups groups;
  int64_t rows, hidden, width;
  int32_t activation;
  bool is_gated, is_interleaved;
  Rows grad;             // (R, D), gathered
  Bank w_out;            // (G, D, F)
  const void* z;         // (R, 2F or F), contiguous
  const float* weights;  // (R,) or null for one
  void* grad_z;          // (R, 2F or F), contiguous
  void* h;               // (R, F), contiguous
  float* shares;         // (R, shares_of(width)), contiguous, to be summed over columns; or null
};
inline int64_t shares_of(int64_t width) { return (width + 127) / 128; }
const char* why_not(const HiddenBackward&);
const char* run(const HiddenBackward&, void* stream);

}  // namespace omnimoe::cuda::sm90
