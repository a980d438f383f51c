// Attention on CPU tensors. The schema is in omnimoe/ops/_library.py.
#include "checks.h"

namespace omnimoe::cpu {
namespace {

// Numbers of a head side by side; other tensors are copied.
Tensor with_heads_of(const Tensor& x) {
  const bool fits = x.stride(3) == 1 && x.stride(0) >= 0 && x.stride(1) >= 0 && x.stride(2) >= 0;
  return fits || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

Sequences sequences_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Tensor attend(const Tensor& query_, const Tensor& key_, const Tensor& value_, const std::optional<Tensor>& mask_,
              double scale, bool is_causal) {
  STD_TORCH_CHECK(query_.dim() == 4 && key_.dim() == 4 && value_.dim() == 4,
                  "query must be (B, H, Q, C), key (B, G, K, C) and value (B, G, K, D)");
  const Tensor query = with_heads_of(query_), key = with_heads_of(key_), value = with_heads_of(value_);
  check_type(key, query, "key");
  check_type(value, query, "value");
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), width = query.size(3);
  const int64_t kv_heads = key.size(1), keys = key.size(2), value_width = value.size(3);
  STD_TORCH_CHECK(key.size(0) == batch && key.size(3) == width && value.size(0) == batch &&
                      value.size(1) == kv_heads && value.size(2) == keys && kv_heads > 0 && heads % kv_heads == 0,
                  "key must be (B, G, K, C) and value (B, G, K, D), G a divisor of the ", heads, " heads of query");
  std::optional<Tensor> mask;
  if (mask_) {
    STD_TORCH_CHECK(!is_causal, "causal attention takes no mask");
    mask = torch::stable::contiguous(*mask_);
    STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool && mask->dim() == 4 &&
                        (mask->size(0) == batch || mask->size(0) == 1) && mask->size(1) == 1 &&
                        mask->size(2) == queries && mask->size(3) == keys,
                    "mask must be (B, 1, ", queries, ", ", keys, ") bool on the CPU, or have 1 for B");
  }
  if (!query.numel() || !keys || !value_width)
    return torch::stable::new_zeros(query, {batch, queries, heads, value_width});
  Tensor out = torch::stable::new_empty(query, {batch, queries, heads, value_width});
  the_kernels().attend({type_of(query), threads(), batch, heads, kv_heads, queries, keys, width, value_width, scale,
                        is_causal, sequences_of(query), sequences_of(key), sequences_of(value),
                        static_cast<const bool*>(data_of(mask)), mask && mask->size(0) > 1 ? queries * keys : 0, keys,
                        out.mutable_data_ptr()});
  return out;
}

}  // namespace
}  // namespace omnimoe::cpu

STABLE_TORCH_LIBRARY_IMPL(omnimoe, CPU, m) { m.impl("attend", TORCH_BOX(&omnimoe::cpu::attend)); }
