// What the ops share: checks that keep every access within its tensor, and tensors as the kernels take them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "buffers.h"
#include "dispatch.h"

namespace omnimoe::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const Kernels& the_kernels() {
  const Kernels* found = kernels();
  STD_TORCH_CHECK(found, "this processor has none of the instruction sets of omnimoe's CPU kernels (AVX2 and FMA)");
  return *found;
}

inline Type type_of(const Tensor& x) {
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

inline void check_type(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
}

// Columns side by side; other tensors are copied.
inline Tensor with_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  const bool fits = x.stride(last) == 1 && x.stride(last - 1) >= x.size(last) && (last < 2 || x.stride(0) >= 0);
  return fits || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

// Matrices whose rows lie side by side, or whose columns do; others are copied.
inline bool is_transposed(const Tensor& x) { return x.stride(1) == 1 && x.stride(2) >= x.size(1) && x.size(1) > 1; }
inline Tensor with_matrices(const Tensor& x) { return is_transposed(x) && x.stride(0) >= 0 ? x : with_rows(x); }

inline Groups groups_of(const Tensor& offsets, int64_t groups, int64_t rows) {
  STD_TORCH_CHECK(offsets.is_cpu() && offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 &&
                      offsets.size(0) == groups && offsets.is_contiguous(),
                  "offsets must be (", groups, ",) int32 on the CPU, one end a group");
  const auto* ends = static_cast<const int32_t*>(offsets.const_data_ptr());
  for (int64_t g = 0, before = 0; g < groups; before = ends[g++])
    STD_TORCH_CHECK(ends[g] >= before && ends[g] <= rows, "offsets must not decrease nor pass the ", rows,
                    " rows, got ", ends[g], " after ", before);
  return {ends, groups};
}

inline const int64_t* index_of(const std::optional<Tensor>& index, int64_t rows) {
  if (!index) return nullptr;
  STD_TORCH_CHECK(index->is_cpu() && index->scalar_type() == ScalarType::Long && index->dim() == 1 &&
                      index->is_contiguous(),
                  "an index must be (R,) int64 on the CPU, contiguous");
  const auto* values = static_cast<const int64_t*>(index->const_data_ptr());
  for (int64_t r = 0; r < index->size(0); ++r)
    STD_TORCH_CHECK(values[r] >= 0 && values[r] < rows, "index ", values[r], " is not within the ", rows, " rows");
  return values;
}

inline int64_t rows_of(const Tensor& x, const std::optional<Tensor>& index) { return index ? index->size(0) : x.size(0); }

// A tensor like x over memory that is kept when it is freed; for what is as large as a bank.
inline Tensor kept_like(const Tensor& x, std::initializer_list<int64_t> sizes) {
  int64_t strides[3] = {1, 1, 1}, count = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = count;
    count *= sizes.begin()[i];
  }
  void* data = take_buffer(count * x.element_size());
  return torch::stable::from_blob(data, {sizes.begin(), sizes.size()}, {strides, sizes.size()}, x.device(),
                                  x.scalar_type(), &give_buffer);
}

inline Threads threads() {
  return {int64_t{torch::stable::get_num_threads()}, [](int64_t count, Body body, void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, i);
            });
          }};
}

inline Rows as_rows(const Tensor& x, const int64_t* index) { return {x.const_data_ptr(), x.stride(0), index}; }

inline Bank as_bank(const Tensor& weight) {
  const bool across = is_transposed(weight);
  return {weight.const_data_ptr(), weight.stride(0), weight.stride(across ? 2 : 1), across};
}

inline void zero_from(Tensor& out, int64_t row) {
  if (row < out.size(0)) {
    Tensor rest = torch::stable::narrow(out, 0, row, out.size(0) - row);
    torch::stable::zero_(rest);
  }
}

// A row for each group, side by side.
inline std::optional<Tensor> bias_of(const std::optional<Tensor>& bias, const Tensor& x, int64_t groups,
                                     int64_t columns, const char* name) {
  if (!bias) return std::nullopt;
  check_type(*bias, x, name);
  STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == groups && bias->size(1) == columns, name, " must be (", groups,
                  ", ", columns, ")");
  return torch::stable::contiguous(*bias);
}

// A number a row, of the type that sums have.
inline std::optional<Tensor> weights_of(const std::optional<Tensor>& weights, const Tensor& x, int64_t rows) {
  if (!weights) return std::nullopt;
  const bool is_double = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(weights->is_cpu() && weights->dim() == 1 && weights->size(0) == rows &&
                      weights->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
                  "weights must be (", rows, ",) ", is_double ? "float64" : "float32", " on the CPU");
  return torch::stable::contiguous(*weights);
}

inline const void* data_of(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }

inline int64_t last_end(const Groups& groups) { return groups.count ? groups.ends[groups.count - 1] : 0; }

}  // namespace omnimoe::cpu
