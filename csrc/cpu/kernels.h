// What the kernels of every instruction set offer: plain functions over plain structs, without a type of PyTorch.
#pragma once

#include <cstdint>

namespace omnimoe::cpu {

enum class Type : int32_t { f32, f64, bf16, f16 };

// activation(gate) * up, or activation(up) alone where there is no gate. clamped_silu is gpt-oss's:
// min(gate, limit) * sigmoid(1.702 * min(gate, limit)) * (clamp(up, -limit, limit) + 1), limit 7.
enum class Activation : int32_t { silu, gelu, gelu_tanh, relu, relu2, clamped_silu };

// Calls body(context, i) for 0 <= i < count, perhaps from several threads at once.
using Body = void (*)(void* context, int64_t i);
struct Threads {
  int64_t count;
  void (*run)(int64_t count, Body body, void* context);
};

// Row r lies at data + (index ? index[r] : r) * stride; strides are in elements, and columns lie side by side.
struct Rows {
  const void* data;
  int64_t stride;
  const int64_t* index;
};

// G matrices; strides in elements, the numbers of a row side by side.
struct Bank {
  const void* data;
  int64_t copy_stride;
  int64_t row_stride;
  bool is_transposed;  // rows and columns have changed places
  int64_t step = 1;    // from one column of the product to the next; 2 where gate and up take turns
};

// Ends of the rows of each group. Checked by the caller: not decreasing, and within the rows there are.
struct Groups {
  const int32_t* ends;
  int64_t count;
};

// out[r] = x[r] W[g]^T + bias[g], W[g] being (columns, depth); with is_transposed out[r] = x[r] W[g], (depth, columns).
struct GroupedMM {
  Type type;
  Threads threads;
  Groups groups;
  int64_t depth, columns;
  Rows x;
  Bank weight;
  bool is_transposed;
  const void* bias;  // (G, columns), or null
  void* out;         // (rows, columns)
};

// out[g] = dy^T x over the rows of g, (columns, depth); zero where a group is empty.
struct GroupedWgrad {
  Type type;
  Threads threads;
  Groups groups;
  int64_t depth, columns;
  Rows dy;  // of width columns
  Rows x;   // of width depth
  void* out;
};

// The feed-forward network of each group over gathered rows, and the weighted sum over the rows of a token.
struct ExpertsMLP {
  Type type;
  Threads threads;
  Groups groups;
  int64_t tokens, hidden, width;  // T, D, F
  Activation activation;
  bool is_gated, is_interleaved;
  Rows x;                // index: the token of each row; null where row r is token r
  Bank w_in;             // (G, 2F or F, D)
  Bank w_out;            // (G, D, F)
  const void* b_in;      // (G, 2F or F), or null
  const void* b_out;     // (G, D), or null
  const void* weights;   // (rows,) float, double for f64; null for one
  void* out;             // (T, D), zero at first; not read by backward
  void* z;               // (rows, 2F or F), the pre-activations in the order of w_in's rows, or null
};

struct ExpertsMLPBackward {
  ExpertsMLP forward;
  const void* grad;  // (T, D)
  void* grad_x;      // (T, D), or null
  void* grad_w_in;   // or null
  void* grad_w_out;  // or null
  void* grad_weights;  // (rows,) float, double for f64; or null
  void* grad_b_in;     // or null
  void* grad_b_out;    // or null
};

// out[t] = sum of weights[order[i]] * y[order[i]] over groups[t - 1] <= i < groups[t].
struct SumRows {
  Type type;
  Threads threads;
  Groups groups;
  int64_t columns;
  Rows y;
  const void* weights;  // (rows,) float, double for f64; or null
  void* out;            // (groups, columns)
};

// Head m of row r lies at data + r * row_stride + m * head_stride, its numbers side by side.
struct Heads {
  const void* data;
  int64_t row_stride, head_stride, heads;
};

// out = x / sqrt(mean(x^2) + eps), rounded, times the weight of the row's group; rows past the last end are left alone.
struct RMSNorm {
  Type type;
  Threads threads;
  Groups groups;
  Heads x;
  int64_t width;
  double eps;
  const void* weight;  // (G, width) float, double for f64
  void* out;           // (rows, heads, width); not read by backward
  void* inverse;       // (rows, heads) float, double for f64: what x was multiplied by
};

struct RMSNormBackward {
  RMSNorm forward;
  const void* grad;   // (rows, heads, width)
  void* grad_x;       // the same
  void* grad_weight;  // (G, width) float, double for f64
};

// Pairs (i, i + half) of every head, turned by the angles of the row.
struct Rope {
  Type type;
  Threads threads;
  int64_t rows, half;
  Heads x;
  const void *cos, *sin;  // (rows, half) float, double for f64
  void* out;              // (rows, heads, 2 * half)
};

// Row t of head h of sequence b lies at data + b * batch_stride + h * head_stride + t * row_stride, its numbers side by
// side; strides are in elements.
struct Sequences {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// out[b, i, h] = sum over j of softmax(scale * query[b, h, i] . key[b, h / group, j]) * value[b, h / group, j], over the
// keys that the mask shows or, where it is causal, that come no later: the last query is at the last key.
struct Attend {
  Type type;
  Threads threads;
  int64_t batch, heads, kv_heads, queries, keys, width, value_width;
  double scale;
  bool is_causal;
  Sequences query, key, value;
  const bool* mask;  // [b, i, j] is true where query i sees key j; or null
  int64_t mask_batch_stride, mask_row_stride;
  void* out;       // (batch, queries, heads, value_width)
  void* log_sums;  // (batch, heads, queries) float, double for f64: the logarithm of what shares are divided by; or null
};

// Where forward reads `out` and `log_sums`. Gradients have positions before heads, as `out` has.
struct AttendBackward {
  Attend forward;
  const void* grad;  // (batch, queries, heads, value_width)
  void* grad_query;  // (batch, queries, heads, width)
  void* grad_key;    // (batch, keys, kv_heads, width)
  void* grad_value;  // (batch, keys, kv_heads, value_width)
};

constexpr int64_t kScanChunk = 32;       // positions from one state that is kept to the next
constexpr int64_t kChannelsAtOnce = 256;  // of a task; what a position writes and reads is summed over them

// h = exp(step * rate) * h + step * x * into through time for every channel, y = sum of h * out over its S numbers; zero
// before a start. All of type, which is f32 or f64.
struct Scan {
  Type type;
  Threads threads;
  int64_t batch, length, channels, size;  // B, T, I, S
  const void *x, *step;                   // (B, T, I)
  const void* rate;                       // (I, S)
  const void *into, *out;                 // (B, T, S)
  const void* state;                      // (B, I, S), or null
  const bool* starts;                     // (B, T), or null
  void *y, *last;                         // (B, T, I) and (B, I, S); not read by backward
  void* kept;                             // (chunks, B, I, S), the state before each
};

struct ScanBackward {
  Scan forward;
  const void *grad, *grad_last;
  void *grad_x, *grad_step;    // (B, T, I)
  void* grad_rate;             // (B, I, S)
  void *grad_into, *grad_out;  // (groups of channels, B, T, S)
  void* grad_state;            // (B, I, S)
};

struct Kernels {
  void (*grouped_mm)(const GroupedMM&);
  void (*grouped_wgrad)(const GroupedWgrad&);
  void (*experts_mlp)(const ExpertsMLP&);
  void (*experts_mlp_backward)(const ExpertsMLPBackward&);
  void (*sum_rows)(const SumRows&);
  void (*rms_norm)(const RMSNorm&);
  void (*rms_norm_backward)(const RMSNormBackward&);
  void (*rope)(const Rope&);
  void (*attend)(const Attend&);
  void (*attend_backward)(const AttendBackward&);
  void (*scan)(const Scan&);
  void (*scan_backward)(const ScanBackward&);
};

}  // namespace omnimoe::cpu
