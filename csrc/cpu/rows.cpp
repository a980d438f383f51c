// The ops that order, move and add up rows, on CPU tensors. The schemas are in omnimoe/ops/_library.py.
#include <cstring>
#include <tuple>
#include <vector>

#include "checks.h"

namespace omnimoe::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 64;  // rows that a thread copies before it asks for more

std::tuple<Tensor, Tensor, Tensor> route_plan(const Tensor& ids_, int64_t num_groups) {
  STD_TORCH_CHECK(ids_.dim() == 1 && ids_.scalar_type() == ScalarType::Long && num_groups >= 0,
                  "expert_ids must be (R,) int64 and num_groups at least 0");
  const Tensor ids = torch::stable::contiguous(ids_);
  const int64_t rows = ids.size(0);
  STD_TORCH_CHECK(rows <= INT32_MAX, "offsets are int32, there are ", rows, " rows");
  Tensor offsets = torch::stable::new_empty(ids, {num_groups}, std::make_optional(ScalarType::Int));
  Tensor order = torch::stable::new_empty(ids, {rows}), inverse = torch::stable::new_empty(ids, {rows});
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  const auto group_of = [&](int64_t r) { return id[r] < 0 || id[r] >= num_groups ? num_groups : id[r]; };
  std::vector<int64_t> next(num_groups + 1);  // where the next row of each group goes; sentinels are a last group
  for (int64_t r = 0; r < rows; ++r) ++next[group_of(r)];
  auto* ends = static_cast<int32_t*>(offsets.mutable_data_ptr());
  int64_t end = 0;
  for (int64_t g = 0; g <= num_groups; ++g) {
    const int64_t count = next[g];
    next[g] = end;
    end += count;
    if (g < num_groups) ends[g] = int32_t(end);
  }
  auto* to = static_cast<int64_t*>(order.mutable_data_ptr());
  auto* back = static_cast<int64_t*>(inverse.mutable_data_ptr());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = next[group_of(r)]++;
    to[at] = r;
    back[r] = at;
  }
  return {offsets, order, inverse};
}

Tensor gather_rows(const Tensor& x_, const Tensor& index_, const std::optional<Tensor>& filled_) {
  STD_TORCH_CHECK(x_.dim() >= 1, "x must be (R, ...)");
  const Tensor x = torch::stable::contiguous(x_), index = torch::stable::contiguous(index_);
  const int64_t rows = index.size(0);
  std::optional<Tensor> filled;
  if (filled_) {
    filled = torch::stable::contiguous(*filled_);
    STD_TORCH_CHECK(filled->is_cpu() && filled->scalar_type() == ScalarType::Bool && filled->dim() == 1 &&
                        filled->size(0) == rows,
                    "filled must be (", rows, ",) bool on the CPU");
  }
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] = rows;
  // a batch of padding alone has no rows to take
  if (!x.size(0)) return torch::stable::new_zeros(x, {sizes.data(), sizes.size()});
  const int64_t* from = index_of(index, x.size(0));
  Tensor out = torch::stable::new_empty(x, {sizes.data(), sizes.size()});
  const int64_t bytes = x.numel() / x.size(0) * int64_t(x.element_size());
  const auto* holds = static_cast<const bool*>(data_of(filled));
  const auto* source = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (!holds || holds[r])
        std::memcpy(to + r * bytes, source + from[r] * bytes, bytes);
      else
        std::memset(to + r * bytes, 0, bytes);
    }
  });
  return out;
}

Tensor sum_rows(const Tensor& y_, const Tensor& offsets, const Tensor& order,
                const std::optional<Tensor>& weights_) {
  STD_TORCH_CHECK(y_.dim() == 2, "y must be (R, D)");
  const Tensor y = with_rows(y_);
  const int64_t rows = y.size(0), columns = y.size(1);
  STD_TORCH_CHECK(order.size(0) == rows, "order must be (", rows, ",), a permutation of the rows");
  const Groups groups = groups_of(offsets, offsets.size(0), rows);
  const Tensor index = torch::stable::contiguous(order);
  const Rows given = as_rows(y, index_of(index, rows));
  const std::optional<Tensor> weights = weights_of(weights_, y, rows);
  Tensor out = torch::stable::new_empty(y, {groups.count, columns});
  if (columns)
    the_kernels().sum_rows(
        {type_of(y), threads(), groups, columns, given, data_of(weights), out.mutable_data_ptr()});
  return out;
}

}  // namespace
}  // namespace omnimoe::cpu

STABLE_TORCH_LIBRARY_IMPL(omnimoe, CPU, m) {
  m.impl("route_plan", TORCH_BOX(&omnimoe::cpu::route_plan));
  m.impl("gather_rows", TORCH_BOX(&omnimoe::cpu::gather_rows));
  m.impl("sum_rows", TORCH_BOX(&omnimoe::cpu::sum_rows));
}
