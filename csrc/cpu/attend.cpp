// Attention on CPU tensors. The schema is in omnimoe/ops/_library.py.
#include <tuple>
#include <utility>

#include "checks.h"

namespace omnimoe::cpu {
namespace {

// Numbers of a head side by side; other tensors are copied.
Tensor with_heads_of(const Tensor& x) {
  const bool fits = x.stride(3) == 1 && x.stride(0) >= 0 && x.stride(1) >= 0 && x.stride(2) >= 0;
  return fits || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

Sequences sequences_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// The operands, kept alive beside the pointers into them.
struct Operands {
  Tensor query, key, value;
  std::optional<Tensor> mask;
  Attend call;
  bool is_empty;
};

Operands operands_of(const Tensor& query_, const Tensor& key_, const Tensor& value_, const std::optional<Tensor>& mask_,
                     double scale, bool is_causal) {
  STD_TORCH_CHECK(query_.dim() == 4 && key_.dim() == 4 && value_.dim() == 4,
                  "query must be (B, H, Q, C), key (B, G, K, C) and value (B, G, K, D)");
  Operands o{with_heads_of(query_), with_heads_of(key_), with_heads_of(value_), {}, {}, false};
  check_type(o.key, o.query, "key");
  check_type(o.value, o.query, "value");
  const int64_t batch = o.query.size(0), heads = o.query.size(1), queries = o.query.size(2), width = o.query.size(3);
  const int64_t kv_heads = o.key.size(1), keys = o.key.size(2), value_width = o.value.size(3);
  STD_TORCH_CHECK(o.key.size(0) == batch && o.key.size(3) == width && o.value.size(0) == batch &&
                      o.value.size(1) == kv_heads && o.value.size(2) == keys && kv_heads > 0 && heads % kv_heads == 0,
                  "key must be (B, G, K, C) and value (B, G, K, D), G a divisor of the ", heads, " heads of query");
  if (mask_) {
    STD_TORCH_CHECK(!is_causal, "causal attention takes no mask");
    o.mask = torch::stable::contiguous(*mask_);
    STD_TORCH_CHECK(o.mask->is_cpu() && o.mask->scalar_type() == ScalarType::Bool && o.mask->dim() == 4 &&
                        (o.mask->size(0) == batch || o.mask->size(0) == 1) && o.mask->size(1) == 1 &&
                        o.mask->size(2) == queries && o.mask->size(3) == keys,
                    "mask must be (B, 1, ", queries, ", ", keys, ") bool on the CPU, or have 1 for B");
  }
  o.is_empty = !o.query.numel() || !keys || !value_width;
  o.call = {type_of(o.query), threads(), batch, heads, kv_heads, queries, keys, width, value_width, scale, is_causal,
            sequences_of(o.query), sequences_of(o.key), sequences_of(o.value),
            static_cast<const bool*>(data_of(o.mask)), o.mask && o.mask->size(0) > 1 ? queries * keys : 0, keys,
            nullptr, nullptr};
  return o;
}

std::optional<ScalarType> wide_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const std::optional<Tensor>& mask, double scale, bool is_causal, bool keep) {
  Operands o = operands_of(query, key, value, mask, scale, is_causal);
  Attend& a = o.call;
  Tensor log_sums = torch::stable::new_zeros(query, {keep ? a.batch : 0, a.heads, a.queries}, wide_type(query));
  if (o.is_empty) return {torch::stable::new_zeros(query, {a.batch, a.queries, a.heads, a.value_width}), log_sums};
  Tensor out = torch::stable::new_empty(query, {a.batch, a.queries, a.heads, a.value_width});
  a.out = out.mutable_data_ptr();
  if (keep) a.log_sums = log_sums.mutable_data_ptr();
  the_kernels().attend(a);
  return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& grad_, const Tensor& query, const Tensor& key,
                                                   const Tensor& value, const Tensor& out_, const Tensor& log_sums_,
                                                   const std::optional<Tensor>& mask, double scale, bool is_causal) {
  Operands o = operands_of(query, key, value, mask, scale, is_causal);
  Attend& a = o.call;
  const Tensor grad = torch::stable::contiguous(grad_), out = torch::stable::contiguous(out_);
  const Tensor log_sums = torch::stable::contiguous(log_sums_);
  for (const auto& [x, name] : {std::pair{&grad, "grad"}, {&out, "out"}}) {
    check_type(*x, query, name);
    STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == a.batch && x->size(1) == a.queries && x->size(2) == a.heads &&
                        x->size(3) == a.value_width, name, " must be (B, Q, H, D)");
  }
  STD_TORCH_CHECK(log_sums.is_cpu() && log_sums.scalar_type() == *wide_type(query) && log_sums.dim() == 3 &&
                      log_sums.size(0) == a.batch && log_sums.size(1) == a.heads && log_sums.size(2) == a.queries,
                  "log_sums must be what attend kept, (B, H, Q)");
  const auto like = [&](std::initializer_list<int64_t> sizes) {
    return o.is_empty ? torch::stable::new_zeros(query, sizes) : torch::stable::new_empty(query, sizes);
  };
  Tensor grad_query = like({a.batch, a.queries, a.heads, a.width});
  Tensor grad_key = like({a.batch, a.keys, a.kv_heads, a.width});
  Tensor grad_value = like({a.batch, a.keys, a.kv_heads, a.value_width});
  if (o.is_empty) return {grad_query, grad_key, grad_value};
  a.out = const_cast<void*>(out.const_data_ptr());
  a.log_sums = const_cast<void*>(log_sums.const_data_ptr());
  the_kernels().attend_backward({a, grad.const_data_ptr(), grad_query.mutable_data_ptr(), grad_key.mutable_data_ptr(),
                                 grad_value.mutable_data_ptr()});
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace omnimoe::cpu

STABLE_TORCH_LIBRARY_IMPL(omnimoe, CPU, m) {
  m.impl("attend", TORCH_BOX(&omnimoe::cpu::attend));
  m.impl("attend_backward", TORCH_BOX(&omnimoe::cpu::attend_backward));
}
