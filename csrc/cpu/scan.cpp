// The scan of a selective state space on CPU tensors. The schemas are in omnimoe/ops/_library.py.
#include <tuple>

#include "checks.h"

namespace omnimoe::cpu {
namespace {

// The operands, kept alive beside the pointers into them.
struct Operands {
  Tensor x, step, rate, into, out;
  std::optional<Tensor> state, starts;
  Scan call;
};

Tensor of_shape(const Tensor& part, const Tensor& x, std::initializer_list<int64_t> sizes, const char* name) {
  check_type(part, x, name);
  bool fits = part.dim() == int64_t(sizes.size());
  for (int64_t i = 0; fits && i < part.dim(); ++i) fits = part.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(fits, name, " has not the shape that x and rate ask for");
  return torch::stable::contiguous(part);
}

int64_t chunks_of(int64_t length) { return (length + kScanChunk - 1) / kScanChunk; }

Operands operands_of(const Tensor& x, const Tensor& step, const Tensor& rate, const Tensor& into, const Tensor& out,
                     const std::optional<Tensor>& state, const std::optional<Tensor>& starts) {
  STD_TORCH_CHECK(x.dim() == 3 && rate.dim() == 2, "x must be (B, T, I) and rate (I, S)");
  const int64_t batch = x.size(0), length = x.size(1), channels = x.size(2), size = rate.size(1);
  const Type type = type_of(x);
  STD_TORCH_CHECK(x.is_cpu() && (type == Type::f32 || type == Type::f64), "x must be float32 or float64 on the CPU");
  Operands o{torch::stable::contiguous(x),
             of_shape(step, x, {batch, length, channels}, "step"),
             of_shape(rate, x, {channels, size}, "rate"),
             of_shape(into, x, {batch, length, size}, "into"),
             of_shape(out, x, {batch, length, size}, "out"),
             {},
             {},
             {}};
  if (state) o.state = of_shape(*state, x, {batch, channels, size}, "state");
  if (starts) {
    STD_TORCH_CHECK(starts->is_cpu() && starts->scalar_type() == ScalarType::Bool && starts->dim() == 2 &&
                        starts->size(0) == batch && starts->size(1) == length,
                    "starts must be (", batch, ", ", length, ") bool on the CPU");
    o.starts = torch::stable::contiguous(*starts);
  }
  o.call = {type, threads(), batch, length, channels, size, o.x.const_data_ptr(), o.step.const_data_ptr(),
            o.rate.const_data_ptr(), o.into.const_data_ptr(), o.out.const_data_ptr(), data_of(o.state),
            static_cast<const bool*>(data_of(o.starts)), nullptr, nullptr, nullptr};
  return o;
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& step, const Tensor& rate,
                                                  const Tensor& into, const Tensor& out,
                                                  const std::optional<Tensor>& state,
                                                  const std::optional<Tensor>& starts) {
  Operands o = operands_of(x, step, rate, into, out, state, starts);
  const Scan& a = o.call;
  Tensor y = torch::stable::new_empty(o.x, {a.batch, a.length, a.channels});
  Tensor last = torch::stable::new_empty(o.x, {a.batch, a.channels, a.size});
  Tensor kept = torch::stable::new_empty(o.x, {chunks_of(a.length), a.batch, a.channels, a.size});
  o.call.y = y.mutable_data_ptr();
  o.call.last = last.mutable_data_ptr();
  o.call.kept = kept.mutable_data_ptr();
  the_kernels().scan(o.call);
  return {y, last, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& grad_, const Tensor& grad_last_, const Tensor& x, const Tensor& step, const Tensor& rate,
    const Tensor& into, const Tensor& out, const std::optional<Tensor>& starts, const Tensor& kept_) {
  Operands o = operands_of(x, step, rate, into, out, {}, starts);
  const Scan& a = o.call;
  const Tensor grad = of_shape(grad_, o.x, {a.batch, a.length, a.channels}, "grad");
  const Tensor grad_last = of_shape(grad_last_, o.x, {a.batch, a.channels, a.size}, "grad_last");
  Tensor kept = of_shape(kept_, o.x, {chunks_of(a.length), a.batch, a.channels, a.size}, "kept");
  o.call.kept = kept.mutable_data_ptr();
  const int64_t groups = (a.channels + kChannelsAtOnce - 1) / kChannelsAtOnce;
  Tensor grad_x = torch::stable::new_empty(o.x, o.x.sizes()), grad_step = torch::stable::new_empty(o.x, o.x.sizes());
  Tensor grad_rate = torch::stable::new_empty(o.x, {a.batch, a.channels, a.size});
  Tensor grad_into = torch::stable::new_empty(o.x, {groups, a.batch, a.length, a.size});
  Tensor grad_out = torch::stable::new_empty(o.x, {groups, a.batch, a.length, a.size});
  Tensor grad_state = torch::stable::new_empty(o.x, {a.batch, a.channels, a.size});
  the_kernels().scan_backward({o.call, grad.const_data_ptr(), grad_last.const_data_ptr(), grad_x.mutable_data_ptr(),
                               grad_step.mutable_data_ptr(), grad_rate.mutable_data_ptr(),
                               grad_into.mutable_data_ptr(), grad_out.mutable_data_ptr(),
                               grad_state.mutable_data_ptr()});
  return {grad_x, grad_step, grad_rate, grad_into, grad_out, grad_state};
}

}  // namespace
}  // namespace omnimoe::cpu

STABLE_TORCH_LIBRARY_IMPL(omnimoe, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&omnimoe::cpu::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&omnimoe::cpu::selective_scan_backward));
}
