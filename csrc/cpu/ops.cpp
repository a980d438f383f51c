// The ops on CPU tensors, whose schemas are in omnimoe/ops/_library.py: checks that keep every access within its tensor, then a call of the kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "buffers.h"
#include "dispatch.h"

namespace {

using omnimoe::cpu::Activation;
using omnimoe::cpu::Bank;
using omnimoe::cpu::Groups;
using omnimoe::cpu::Rows;
using omnimoe::cpu::Threads;
using omnimoe::cpu::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const omnimoe::cpu::Kernels& kernels() {
  const auto* found = omnimoe::cpu::kernels();
  STD_TORCH_CHECK(found, "this processor has none of the instruction sets of omnimoe's CPU kernels (AVX2 and FMA)");
  return *found;
}

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, "omnimoe's CPU kernels take float32, float64, bfloat16 and float16");
  }
}

void check_type(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
}

// Columns side by side; other tensors are copied.
Tensor with_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  const bool fits = x.stride(last) == 1 && x.stride(last - 1) >= x.size(last) && (last < 2 || x.stride(0) >= 0);
  return fits || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

Groups groups_of(const Tensor& offsets, int64_t groups, int64_t rows) {
  STD_TORCH_CHECK(offsets.is_cpu() && offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 &&
                      offsets.size(0) == groups && offsets.is_contiguous(),
                  "offsets must be (", groups, ",) int32 on the CPU, one end a group");
  const auto* ends = static_cast<const int32_t*>(offsets.const_data_ptr());
  for (int64_t g = 0, before = 0; g < groups; before = ends[g++])
    STD_TORCH_CHECK(ends[g] >= before && ends[g] <= rows, "offsets must not decrease nor pass the ", rows,
                    " rows, got ", ends[g], " after ", before);
  return {ends, groups};
}

const int64_t* index_of(const std::optional<Tensor>& index, int64_t rows) {
  if (!index) return nullptr;
  STD_TORCH_CHECK(index->is_cpu() && index->scalar_type() == ScalarType::Long && index->dim() == 1 &&
                      index->is_contiguous(),
                  "an index must be (R,) int64 on the CPU, contiguous");
  const auto* values = static_cast<const int64_t*>(index->const_data_ptr());
  for (int64_t r = 0; r < index->size(0); ++r)
    STD_TORCH_CHECK(values[r] >= 0 && values[r] < rows, "index ", values[r], " is not within the ", rows, " rows");
  return values;
}

int64_t rows_of(const Tensor& x, const std::optional<Tensor>& index) { return index ? index->size(0) : x.size(0); }

// A tensor like x over memory that is kept when it is freed; for what is as large as a bank.
Tensor kept_like(const Tensor& x, std::initializer_list<int64_t> sizes) {
  int64_t strides[3] = {1, 1, 1}, count = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = count;
    count *= sizes.begin()[i];
  }
  void* data = omnimoe::cpu::take_buffer(count * x.element_size());
  return torch::stable::from_blob(data, {sizes.begin(), sizes.size()}, {strides, sizes.size()}, x.device(),
                                  x.scalar_type(), &omnimoe::cpu::give_buffer);
}

Threads threads() {
  return {int64_t{torch::stable::get_num_threads()}, [](int64_t count, omnimoe::cpu::Body body, void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

Rows as_rows(const Tensor& x, const int64_t* index) { return {x.const_data_ptr(), x.stride(0), index}; }

Bank as_bank(const Tensor& weight) { return {weight.const_data_ptr(), weight.stride(0), weight.stride(1)}; }

void zero_from(Tensor& out, int64_t row) {
  if (row < out.size(0)) {
    Tensor rest = torch::stable::narrow(out, 0, row, out.size(0) - row);
    torch::stable::zero_(rest);
  }
}

int64_t last_end(const Groups& groups) { return groups.count ? groups.ends[groups.count - 1] : 0; }

Tensor grouped_mm(const Tensor& x_, const Tensor& weight_, const Tensor& offsets, const std::optional<Tensor>& bias_,
                  const std::optional<Tensor>& row_index, bool is_transposed) {
  STD_TORCH_CHECK(x_.dim() == 2 && weight_.dim() == 3, "x must be (R, D) and weight (G, F, D)");
  const Tensor x = with_rows(x_), weight = with_rows(weight_);
  const int64_t depth = weight.size(is_transposed ? 1 : 2), columns = weight.size(is_transposed ? 2 : 1);
  STD_TORCH_CHECK(x.size(1) == depth, "x has ", x.size(1), " columns, the matrices are of ", depth);
  check_type(weight, x, "weight");
  const int64_t rows = rows_of(x, row_index);
  const Groups groups = groups_of(offsets, weight.size(0), rows);
  std::optional<Tensor> bias;
  if (bias_) {
    bias = torch::stable::contiguous(*bias_);
    check_type(*bias, x, "bias");
    STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == weight.size(0) && bias->size(1) == columns,
                    "bias must be (", weight.size(0), ", ", columns, ")");
  }
  const Rows given = as_rows(x, index_of(row_index, x.size(0)));
  if (!depth || !columns || !rows) return torch::stable::new_zeros(x, {rows, columns});
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  kernels().grouped_mm({type_of(x), threads(), groups, depth, columns, given, as_bank(weight), is_transposed,
                        bias ? bias->const_data_ptr() : nullptr, out.mutable_data_ptr()});
  zero_from(out, last_end(groups));
  return out;
}

Tensor grouped_wgrad(const Tensor& grad_, const Tensor& x_, const Tensor& offsets,
                     const std::optional<Tensor>& grad_index, const std::optional<Tensor>& x_index) {
  STD_TORCH_CHECK(grad_.dim() == 2 && x_.dim() == 2, "grad must be (R, F) and x (R, D)");
  const Tensor grad = with_rows(grad_), x = with_rows(x_);
  check_type(grad, x, "grad");
  const int64_t rows = rows_of(x, x_index);
  STD_TORCH_CHECK(rows_of(grad, grad_index) == rows, "grad and x must have as many rows");
  const Groups groups = groups_of(offsets, offsets.size(0), rows);
  const Rows dy = as_rows(grad, index_of(grad_index, grad.size(0))), given = as_rows(x, index_of(x_index, x.size(0)));
  if (!grad.size(1) || !x.size(1) || !rows) return torch::stable::new_zeros(x, {groups.count, grad.size(1), x.size(1)});
  Tensor out = kept_like(x, {groups.count, grad.size(1), x.size(1)});
  kernels().grouped_wgrad(
      {type_of(x), threads(), groups, x.size(1), grad.size(1), dy, given, out.mutable_data_ptr()});
  return out;
}

// The operands of the experts' network, kept alive beside the pointers into them.
struct Experts {
  Tensor x, w_in, w_out;
  std::optional<Tensor> weights;
  omnimoe::cpu::ExpertsMLP call;
  int64_t rows;
};

Experts experts_of(const Tensor& x_, const Tensor& w_in_, const Tensor& w_out_, const Tensor& offsets,
                   const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights, int64_t activation) {
  STD_TORCH_CHECK(x_.dim() == 2 && w_in_.dim() == 3 && w_out_.dim() == 3,
                  "x must be (T, D), w_in (G, 2F, D) or (G, F, D), w_out (G, D, F)");
  Experts e{with_rows(x_), with_rows(w_in_), with_rows(w_out_), weights, {}, rows_of(x_, token_index)};
  check_type(e.w_in, e.x, "w_in");
  check_type(e.w_out, e.x, "w_out");
  const int64_t hidden = e.x.size(1), width = e.w_out.size(2), wide = e.w_in.size(1);
  STD_TORCH_CHECK(e.w_in.size(2) == hidden && e.w_out.size(1) == hidden && e.w_in.size(0) == e.w_out.size(0) &&
                      (wide == width || wide == 2 * width),
                  "w_in must be (G, 2F, D) or (G, F, D) and w_out (G, D, F), with D = ", hidden);
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::clamped_silu), "unknown activation ", activation);
  STD_TORCH_CHECK(wide != width || Activation(activation) != Activation::clamped_silu, "clamped_silu needs a gate");
  const void* each = nullptr;
  if (weights) {
    const bool is_double = e.x.scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK(weights->is_cpu() && weights->dim() == 1 && weights->size(0) == e.rows &&
                        weights->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
                    "weights must be (", e.rows, ",) ", is_double ? "float64" : "float32", " on the CPU");
    e.weights = torch::stable::contiguous(*weights);
    each = e.weights->const_data_ptr();
  }
  e.call = {type_of(e.x),
            threads(),
            groups_of(offsets, e.w_in.size(0), e.rows),
            e.x.size(0),
            hidden,
            width,
            Activation(activation),
            wide == 2 * width,
            as_rows(e.x, index_of(token_index, e.x.size(0))),
            as_bank(e.w_in),
            as_bank(e.w_out),
            each,
            nullptr,
            nullptr};
  return e;
}

std::tuple<Tensor, Tensor> experts_mlp(const Tensor& x, const Tensor& w_in, const Tensor& w_out, const Tensor& offsets,
                                       const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights,
                                       const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                                       int64_t activation, bool interleaved, bool keep) {
  STD_TORCH_CHECK(!b_in && !b_out && !interleaved, "biases and interleaved gates are not there");
  Experts e = experts_of(x, w_in, w_out, offsets, token_index, weights, activation);
  Tensor out = torch::stable::new_zeros(x, {e.call.tokens, e.call.hidden});
  Tensor z = keep ? kept_like(x, {e.rows, e.w_in.size(1)}) : torch::stable::new_empty(x, {0, e.w_in.size(1)});
  if (keep) zero_from(z, last_end(e.call.groups));
  e.call.out = out.mutable_data_ptr();
  e.call.z = keep ? z.mutable_data_ptr() : nullptr;
  if (e.rows && e.call.hidden && e.call.width) kernels().experts_mlp(e.call);
  return {out, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_mlp_backward(
    const Tensor& grad_, const Tensor& x, const Tensor& z_, const Tensor& w_in, const Tensor& w_out,
    const Tensor& offsets, const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out, int64_t activation, bool interleaved) {
  STD_TORCH_CHECK(!b_in && !b_out && !interleaved, "biases and interleaved gates are not there");
  const Tensor none = torch::stable::new_empty(x, {0});
  Experts e = experts_of(x, w_in, w_out, offsets, token_index, weights, activation);
  const Tensor grad = torch::stable::contiguous(grad_), z = torch::stable::contiguous(z_);
  check_type(grad, x, "grad");
  check_type(z, x, "z");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == e.call.tokens && grad.size(1) == e.call.hidden,
                  "grad must have the shape of x");
  STD_TORCH_CHECK(z.dim() == 2 && z.size(0) == e.rows && z.size(1) == e.w_in.size(1),
                  "z must be the pre-activations that experts_mlp kept");
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const auto like = std::make_optional(is_double ? ScalarType::Double : ScalarType::Float);
  if (!e.rows || !e.call.hidden || !e.call.width)
    return {torch::stable::new_zeros(x, x.sizes()), torch::stable::new_zeros(x, w_in.sizes()),
            torch::stable::new_zeros(x, w_out.sizes()), torch::stable::new_zeros(x, {weights ? e.rows : 0}, like), none, none};
  Tensor grad_in = kept_like(x, {w_in.size(0), w_in.size(1), w_in.size(2)});
  Tensor grad_out = kept_like(x, {w_out.size(0), w_out.size(1), w_out.size(2)});
  Tensor grad_x = torch::stable::new_zeros(x, {e.call.tokens, e.call.hidden});
  Tensor grad_weights = torch::stable::new_zeros(x, {weights ? e.rows : 0}, like);
  e.call.z = const_cast<void*>(z.const_data_ptr());
  kernels().experts_mlp_backward({e.call, grad.const_data_ptr(), grad_x.mutable_data_ptr(), grad_in.mutable_data_ptr(),
                                  grad_out.mutable_data_ptr(), weights ? grad_weights.mutable_data_ptr() : nullptr});
  return {grad_x, grad_in, grad_out, grad_weights, none, none};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(omnimoe, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&grouped_mm));
  m.impl("grouped_wgrad", TORCH_BOX(&grouped_wgrad));
  m.impl("experts_mlp", TORCH_BOX(&experts_mlp));
  m.impl("experts_mlp_backward", TORCH_BOX(&experts_mlp_backward));
}

// Read by Python through ctypes.
extern "C" __attribute__((visibility("default"))) const char* omnimoe_cpu_kernels() {
  return omnimoe::cpu::kernels_name();
}
