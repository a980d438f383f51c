// The products on CPU tensors: checks, then a call of the kernels. The schemas are in omnimoe/ops/_library.py.
#include <tuple>

#include "checks.h"

namespace omnimoe::cpu {
namespace {

Tensor grouped_mm(const Tensor& x_, const Tensor& weight_, const Tensor& offsets, const std::optional<Tensor>& bias_,
                  const std::optional<Tensor>& row_index, bool is_transposed) {
  STD_TORCH_CHECK(x_.dim() == 2 && weight_.dim() == 3, "x must be (R, D) and weight (G, F, D)");
  const Tensor x = with_rows(x_), weight = with_matrices(weight_);
  const int64_t depth = weight.size(is_transposed ? 1 : 2), columns = weight.size(is_transposed ? 2 : 1);
  STD_TORCH_CHECK(x.size(1) == depth, "x has ", x.size(1), " columns, the matrices are of ", depth);
  check_type(weight, x, "weight");
  const int64_t rows = rows_of(x, row_index);
  const Groups groups = groups_of(offsets, weight.size(0), rows);
  const std::optional<Tensor> bias = bias_of(bias_, x, weight.size(0), columns, "bias");
  const Rows given = as_rows(x, index_of(row_index, x.size(0)));
  if (!depth || !columns || !rows) return torch::stable::new_zeros(x, {rows, columns});
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  the_kernels().grouped_mm({type_of(x), threads(), groups, depth, columns, given, as_bank(weight), is_transposed,
                        data_of(bias), out.mutable_data_ptr()});
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
  the_kernels().grouped_wgrad(
      {type_of(x), threads(), groups, x.size(1), grad.size(1), dy, given, out.mutable_data_ptr()});
  return out;
}

// The operands of the experts' network, kept alive beside the pointers into them.
struct Experts {
  Tensor x, w_in, w_out;
  std::optional<Tensor> weights, b_in, b_out;
  ExpertsMLP call;
  int64_t rows;
};

Experts experts_of(const Tensor& x_, const Tensor& w_in_, const Tensor& w_out_, const Tensor& offsets,
                   const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights,
                   const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out, int64_t activation,
                   bool interleaved) {
  STD_TORCH_CHECK(x_.dim() == 2 && w_in_.dim() == 3 && w_out_.dim() == 3,
                  "x must be (T, D), w_in (G, 2F, D) or (G, F, D), w_out (G, D, F)");
  Experts e{with_rows(x_), with_matrices(w_in_), with_matrices(w_out_), {}, {}, {}, {}, rows_of(x_, token_index)};
  check_type(e.w_in, e.x, "w_in");
  check_type(e.w_out, e.x, "w_out");
  const int64_t hidden = e.x.size(1), width = e.w_out.size(2), wide = e.w_in.size(1);
  STD_TORCH_CHECK(e.w_in.size(2) == hidden && e.w_out.size(1) == hidden && e.w_in.size(0) == e.w_out.size(0) &&
                      (wide == width || wide == 2 * width),
                  "w_in must be (G, 2F, D) or (G, F, D) and w_out (G, D, F), with D = ", hidden);
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::clamped_silu), "unknown activation ", activation);
  STD_TORCH_CHECK(wide != width || Activation(activation) != Activation::clamped_silu, "clamped_silu needs a gate");
  STD_TORCH_CHECK(wide != width || !interleaved, "without a gate nothing is interleaved");
  e.b_in = bias_of(b_in, e.x, e.w_in.size(0), wide, "b_in");
  e.b_out = bias_of(b_out, e.x, e.w_in.size(0), hidden, "b_out");
  e.weights = weights_of(weights, e.x, e.rows);
  Bank bank_in = as_bank(e.w_in);
  if (interleaved) bank_in.step = 2;
  e.call = {type_of(e.x),
            threads(),
            groups_of(offsets, e.w_in.size(0), e.rows),
            e.x.size(0),
            hidden,
            width,
            Activation(activation),
            wide == 2 * width,
            interleaved,
            as_rows(e.x, index_of(token_index, e.x.size(0))),
            bank_in,
            as_bank(e.w_out),
            data_of(e.b_in),
            data_of(e.b_out),
            data_of(e.weights),
            nullptr,
            nullptr};
  return e;
}

std::tuple<Tensor, Tensor> experts_mlp(const Tensor& x, const Tensor& w_in, const Tensor& w_out, const Tensor& offsets,
                                       const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights,
                                       const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                                       int64_t activation, bool interleaved, bool keep) {
  Experts e = experts_of(x, w_in, w_out, offsets, token_index, weights, b_in, b_out, activation, interleaved);
  Tensor out = torch::stable::new_zeros(x, {e.call.tokens, e.call.hidden});
  Tensor z = keep ? kept_like(x, {e.rows, e.w_in.size(1)}) : torch::stable::new_empty(x, {0, e.w_in.size(1)});
  if (keep) zero_from(z, last_end(e.call.groups));
  e.call.out = out.mutable_data_ptr();
  e.call.z = keep ? z.mutable_data_ptr() : nullptr;
  if (e.rows && e.call.hidden && e.call.width) the_kernels().experts_mlp(e.call);
  return {out, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_mlp_backward(
    const Tensor& grad_, const Tensor& x, const Tensor& z_, const Tensor& w_in, const Tensor& w_out,
    const Tensor& offsets, const std::optional<Tensor>& token_index, const std::optional<Tensor>& weights,
    const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out, int64_t activation, bool interleaved) {
  Experts e = experts_of(x, w_in, w_out, offsets, token_index, weights, b_in, b_out, activation, interleaved);
  const Tensor grad = torch::stable::contiguous(grad_), z = torch::stable::contiguous(z_);
  check_type(grad, x, "grad");
  check_type(z, x, "z");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == e.call.tokens && grad.size(1) == e.call.hidden,
                  "grad must have the shape of x");
  STD_TORCH_CHECK(z.dim() == 2 && z.size(0) == e.rows && z.size(1) == e.w_in.size(1),
                  "z must be the pre-activations that experts_mlp kept");
  const bool is_double = x.scalar_type() == ScalarType::Double;
  const auto like = std::make_optional(is_double ? ScalarType::Double : ScalarType::Float);
  const auto zeros_like = [&](const std::optional<Tensor>& bias) {
    return bias ? torch::stable::new_zeros(x, bias->sizes()) : torch::stable::new_empty(x, {0});
  };
  Tensor grad_b_in = zeros_like(b_in), grad_b_out = zeros_like(b_out);
  if (!e.rows || !e.call.hidden || !e.call.width)
    return {torch::stable::new_zeros(x, x.sizes()),
            torch::stable::new_zeros(x, w_in.sizes()),
            torch::stable::new_zeros(x, w_out.sizes()),
            torch::stable::new_zeros(x, {weights ? e.rows : 0}, like),
            grad_b_in,
            grad_b_out};
  Tensor grad_in = kept_like(x, {w_in.size(0), w_in.size(1), w_in.size(2)});
  Tensor grad_out = kept_like(x, {w_out.size(0), w_out.size(1), w_out.size(2)});
  Tensor grad_x = torch::stable::new_zeros(x, {e.call.tokens, e.call.hidden});
  Tensor grad_weights = torch::stable::new_zeros(x, {weights ? e.rows : 0}, like);
  e.call.z = const_cast<void*>(z.const_data_ptr());
  the_kernels().experts_mlp_backward(
      {e.call, grad.const_data_ptr(), grad_x.mutable_data_ptr(), grad_in.mutable_data_ptr(),
       grad_out.mutable_data_ptr(), weights ? grad_weights.mutable_data_ptr() : nullptr,
       b_in ? grad_b_in.mutable_data_ptr() : nullptr, b_out ? grad_b_out.mutable_data_ptr() : nullptr});
  return {grad_x, grad_in, grad_out, grad_weights, grad_b_in, grad_b_out};
}

}  // namespace
}  // namespace omnimoe::cpu

STABLE_TORCH_LIBRARY_IMPL(omnimoe, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&omnimoe::cpu::grouped_mm));
  m.impl("grouped_wgrad", TORCH_BOX(&omnimoe::cpu::grouped_wgrad));
  m.impl("experts_mlp", TORCH_BOX(&omnimoe::cpu::experts_mlp));
  m.impl("experts_mlp_backward", TORCH_BOX(&omnimoe::cpu::experts_mlp_backward));
}

// Read by Python through ctypes.
extern "C" __attribute__((visibility("default"))) const char* omnimoe_cpu_kernels() {
  return omnimoe::cpu::kernels_name();
}
