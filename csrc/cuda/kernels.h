// What the sm_80 kernels offer to the op file: plain functions over plain structs. They run on every device from
// compute capability 8.0 on.
//
// Pointers are device pointers, strides count elements. Nothing here reads device memory on the host, allocates, or
// waits, so every call can be captured into a CUDA graph. Ends of groups are clamped on the device: to not decrease,
// and to the rows there are. Rows past the last end come out as zeros. An index outside its tensor reads zeros.
// Every sum is taken in one order, without atomics: the same inputs give the same bits.
#pragma once

#include <cstdint>

#include "activation.h"
#include "launch.h"

namespace omnimoe::cuda {

enum class Type : int32_t { f32, f64, bf16, f16 };

// Where a call runs.
struct Queue {
  cudaStream_t stream;
  int multiprocessors;
};

// Row r starts at data + (index ? index[r] : r) * stride; an index counts up to `count`. Columns lie side by side.
struct Rows {
  const void* data;
  int64_t stride;
  const int64_t* index;
  int64_t count;
};

// Matrix g starts at data + g * copy_stride. Its columns lie side by side and its rows row_stride apart; where it is
// flipped, its rows lie side by side.
struct Bank {
  const void* data;
  int64_t copy_stride, row_stride;
  bool is_flipped;
};

// Ends of the rows of each group, (count,), and the rows there are.
struct Groups {
  const int32_t* ends;
  int64_t count, rows;
};

// out[r] = (x[r] W[g]^T + bias[g]) * scale[r], with W[g] (columns, depth).
struct Product {
  Type type;
  Groups groups;
  int64_t depth, columns;
  Rows x;
  Bank weight;
  const void* bias;   // (groups, columns) or null
  const void* scale;  // (rows,) float, double for f64; or null
  void* out;          // (rows, columns)
};
void run(const Product&, const Queue&);

// out[g] = dy^T x over the rows of g, (columns, depth); zeros where a group is empty.
struct Wgrad {
  Type type;
  Groups groups;
  int64_t columns, depth;
  Rows dy, x;
  void* out;
};
void run(const Wgrad&, const Queue&);

// The first product of the experts' network and its activation: z = x W_in[g]^T + b_in[g], h = act(gate) * up of it.
// Gates are the first half of the columns of z, or every other one.
struct Hidden {
  Type type;
  Groups groups;
  int64_t hidden, width;  // D, F
  Activation activation;
  bool is_gated, is_interleaved;
  Rows x;
  Bank w_in;         // (G, 2F or F, D)
  const void* b_in;  // (G, 2F or F) or null
  void* z;           // (rows, 2F or F), or null where it is not kept
  void* h;           // (rows, F)
};
void run(const Hidden&, const Queue&);

// Backward through the second product and the activation: with g = grad[r] W_out, grad_z = weight * g * act'(z),
// h = weight * act(z), and what each 128 columns of F add to <g, act(z)>, the gradient of the row's weight.
struct HiddenBackward {
  Type type;
  Groups groups;
  int64_t hidden, width;
  Activation activation;
  bool is_gated, is_interleaved;
  Rows grad;
  Bank w_out;           // (G, D, F)
  const void* z;        // (rows, 2F or F)
  const void* weights;  // (rows,) float, double for f64; or null for one
  void* grad_z;         // (rows, 2F or F)
  void* h;              // (rows, F)
  void* shares;         // (rows, shares_of(width)) float, double for f64; or null
};
void run(const HiddenBackward&, const Queue&);
inline int64_t shares_of(int64_t width) { return (width + 127) / 128; }

// out[r] = the sum of shares[r], plus <grad[r], b_out[g]> where there is a bias.
struct WeightsGrad {
  Type type;
  Groups groups;
  int64_t hidden, shares_per_row;
  const void* shares;
  Rows grad;
  const void* b_out;  // (G, D) or null
  void* out;          // (rows,) float, double for f64
};
void run(const WeightsGrad&, const Queue&);

// out[g] = the sum of weights[r] * y[r] over the rows of g.
struct GroupSums {
  Type type;
  Groups groups;
  int64_t columns;
  Rows y;
  const void* weights;  // (rows,) float, double for f64; or null for one
  void* out;            // (G, columns)
};
void run(const GroupSums&, const Queue&);

// A stable counting sort of ids into groups; those below 0 or from `groups` on come last. `work` is of plan_work bytes.
struct Plan {
  const int64_t* ids;
  int64_t rows, groups;
  int32_t* ends;     // (groups,)
  int64_t* order;    // (rows,): sorted row r is entry order[r]
  int64_t* inverse;  // (rows,)
  void* work;
};
void run(const Plan&, const Queue&);
int64_t plan_work(int64_t rows, int64_t groups);

// out[s] = filled[s] ? x[index[s]] : 0, rows of row_bytes, contiguous.
struct Gather {
  const void* x;
  const int64_t* index;
  const bool* filled;  // or null
  int64_t count, rows, row_bytes;  // rows of x; rows of out
  void* out;
};
void run(const Gather&, const Queue&);

// out[t] = sum of weights[order[i]] * y[order[i]] over ends[t - 1] <= i < ends[t].
struct SumRows {
  Type type;
  const int32_t* ends;
  int64_t tokens, columns, count;  // count: rows of y, and of order
  const void* y;                   // (count, columns)
  const int64_t* order;
  const void* weights;  // (count,) float, double for f64; or null for one
  void* out;            // (tokens, columns)
};
void run(const SumRows&, const Queue&);

}  // namespace omnimoe::cuda
