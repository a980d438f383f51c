// The norm and rotary positions on CPU tensors. The schemas are in omnimoe/ops/_library.py.
#include <tuple>

#include "checks.h"

namespace omnimoe::cpu {
namespace {

constexpr int64_t kMostRows = INT32_MAX;

// Numbers of a head side by side, at two distances; other tensors are copied. (R, D) is (R, 1, D), else (R, M, D).
Tensor with_heads(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  const bool fits = x.dim() <= 3 && x.stride(last) == 1 && x.stride(0) >= 0 && x.stride(last - 1) >= 0;
  return fits || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

Heads heads_of(const Tensor& x) {
  int64_t heads = 1;
  for (int64_t i = 1; i + 1 < x.dim(); ++i) heads *= x.size(i);
  const int64_t stride = x.dim() == 2 ? x.size(1) : x.stride(x.dim() - 2);
  return {x.const_data_ptr(), x.stride(0), stride, heads};
}

ScalarType wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_wide(const Tensor& part, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(part.is_cpu() && part.scalar_type() == wide_type(x) && part.is_contiguous(), name, " must be ",
                  x.scalar_type() == ScalarType::Double ? "float64" : "float32", " on the CPU, contiguous");
}

RMSNorm norm_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& offsets, double eps,
                const int32_t* every) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(x.dim() - 1), "weight must be (G, D), x (R, ..., D)");
  check_wide(weight, x, "weight");
  STD_TORCH_CHECK(offsets || weight.size(0) == 1, "several groups need offsets");
  const Groups groups = offsets ? groups_of(*offsets, weight.size(0), x.size(0)) : Groups{every, 1};
  return {type_of(x), threads(), groups, heads_of(x), weight.size(1), eps, weight.const_data_ptr(), nullptr, nullptr};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& weight, const std::optional<Tensor>& offsets,
                                    double eps) {
  STD_TORCH_CHECK(x_.dim() >= 2 && x_.size(0) <= kMostRows, "x must be (R, ..., D)");
  const Tensor x = with_heads(x_);
  const int32_t every = int32_t(x.size(0));
  RMSNorm call = norm_of(x, weight, offsets, eps, &every);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  Tensor inverse = torch::stable::new_empty(x, {x.size(0), call.x.heads}, std::make_optional(wide_type(x)));
  call.out = out.mutable_data_ptr();
  call.inverse = inverse.mutable_data_ptr();
  if (out.numel()) the_kernels().rms_norm(call);
  zero_from(out, last_end(call.groups));
  zero_from(inverse, last_end(call.groups));
  return {out, inverse};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_, const Tensor& x_, const Tensor& weight,
                                             const Tensor& inverse_, const std::optional<Tensor>& offsets) {
  STD_TORCH_CHECK(x_.dim() >= 2 && x_.size(0) <= kMostRows, "x must be (R, ..., D)");
  const Tensor x = with_heads(x_), grad = torch::stable::contiguous(grad_);
  const Tensor inverse = torch::stable::contiguous(inverse_);
  check_type(grad, x, "grad");
  STD_TORCH_CHECK(grad.numel() == x.numel(), "grad must have the shape of x");
  check_wide(inverse, x, "inverse");
  const int32_t every = int32_t(x.size(0));
  RMSNorm call = norm_of(x, weight, offsets, 0, &every);
  STD_TORCH_CHECK(inverse.numel() == x.size(0) * call.x.heads, "inverse must be that of rms_norm");
  call.inverse = const_cast<void*>(inverse.const_data_ptr());
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_weight = torch::stable::new_zeros(weight, weight.sizes());
  if (grad_x.numel())
    the_kernels().rms_norm_backward(
        {call, grad.const_data_ptr(), grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr()});
  zero_from(grad_x, last_end(call.groups));
  return {grad_x, grad_weight};
}

Tensor rope(const Tensor& x_, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(x_.dim() == 3 && x_.size(2) % 2 == 0, "x must be (N, H, C), C even");
  const Tensor x = with_heads(x_);
  const int64_t half = x.size(2) / 2;
  for (const Tensor* table : {&cos, &sin}) {
    check_wide(*table, x, "cos and sin");
    STD_TORCH_CHECK(table->dim() == 2 && table->size(0) == x.size(0) && table->size(1) == half,
                    "cos and sin must be (", x.size(0), ", ", half, ")");
  }
  Tensor out = torch::stable::new_empty(x, x.sizes());
  if (out.numel())
    the_kernels().rope({type_of(x), threads(), x.size(0), half, heads_of(x), cos.const_data_ptr(), sin.const_data_ptr(),
                        out.mutable_data_ptr()});
  return out;
}

}  // namespace
}  // namespace omnimoe::cpu

STABLE_TORCH_LIBRARY_IMPL(omnimoe, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&omnimoe::cpu::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&omnimoe::cpu::rms_norm_backward));
  m.impl("rope", TORCH_BOX(&omnimoe::cpu::rope));
}
