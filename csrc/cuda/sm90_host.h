// The host's side of a Hopper kernel: whether the copy engine can fetch the operands, their tensor maps, the launch.
#pragma once

#include <cstdlib>

#include "sm90.h"
#include "sm90_finish.h"

#if !defined(OMNIMOE_EMULATOR)

namespace omnimoe::cuda::sm90 {

// The driver's function is looked up at run time: nothing is linked but the runtime, and any driver will do.
inline decltype(&cuTensorMapEncodeTiled) map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result),
          "tensor maps");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result), "tensor maps");
#endif
    if (!function || result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// A map of 16-bit numbers of three dimensions, fetched in boxes of 64 by box_rows by 1, in 128-byte swizzle.
inline TensorMap encode_map(bool is_bf16, const void* data, const uint64_t (&sizes)[3],
                            const uint64_t (&stride_bytes)[2], uint32_t box_rows) {
  TensorMap map;
  const uint32_t box[3] = {64, box_rows, 1}, steps[3] = {1, 1, 1};
  const CUresult status =
      map_encoder()(&map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3,
                    const_cast<void*>(data), reinterpret_cast<const cuuint64_t*>(sizes),
                    reinterpret_cast<const cuuint64_t*>(stride_bytes), box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                    CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("tensor map: driver error " + std::to_string(int(status)));
  return map;
}

}  // namespace omnimoe::cuda::sm90

#endif

namespace omnimoe::cuda::sm90 {

constexpr int64_t kMostGroups = 4096;  // their spans lie in shared memory

// Matrices side by side in memory: `matrices` of (rows, columns).
struct Operand {
  const void* data;
  int64_t columns, rows, row_stride, matrices = 1, matrix_stride = 0;
};

inline bool is_aligned(const void* p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

inline const char* why_not_fetch(const Operand& o) {
  if (o.columns < 1 || o.matrices < 1) return "an operand is empty";
  if (!is_aligned(o.data, 16) || o.row_stride % 8 || o.matrix_stride % 8)
    return "the copy engine needs addresses and strides of 16 bytes";
  const bool is_apart = o.row_stride >= o.columns && (o.matrices == 1 || o.matrix_stride >= o.rows * o.row_stride);
  if (!is_apart) return "the copy engine needs rows and matrices that do not overlap";
  constexpr int64_t kMost = int64_t{1} << 31;
  if (o.columns >= kMost || o.rows >= kMost || o.row_stride >= kMost || o.matrix_stride >= int64_t{1} << 38)
    return "an operand is too large for the copy engine";
  return nullptr;
}

// Rows that the copy engine fetches one after another, or of which it is told, and others copied, by index. Without
// rows nothing is fetched, but a map must describe something.
inline Operand operand_of(const Rows& rows, int64_t columns, const Groups& groups, const void* other) {
  const int64_t count = rows.index ? rows.count : groups.rows;
  return {count ? rows.data : other, columns, count ? count : 1, rows.stride};
}

// What has not been measured may be set: OMNIMOE_HOPPER_GATHER=0 leaves the gather to a kernel of its own;
// OMNIMOE_HOPPER_PAIRS=N lets blocks work in pairs that share operand B, from N rows a group on.
inline const char* why_not_gather() {
  const char* told = std::getenv("OMNIMOE_HOPPER_GATHER");
  return told && told[0] == '0' ? "rows are gathered first, by OMNIMOE_HOPPER_GATHER=0" : nullptr;
}
inline bool wants_pairs(const Problem& p) {
  const char* told = std::getenv("OMNIMOE_HOPPER_PAIRS");
  return told && told[0] && !p.is_second_gathered && int64_t{p.rows} >= std::atoll(told) * p.groups;
}
inline Gathered gathered_of(const Rows& rows) { return {rows.data, rows.stride, rows.index, rows.count}; }

// What all kernels ask for; `columns` are those that results have side by side.
inline const char* why_not_any(Type type, const Groups& groups, int64_t columns) {
  if (type != Type::bf16 && type != Type::f16) return "the Hopper kernels multiply bfloat16 and float16";
  if (groups.count < 1 || groups.count > kMostGroups) return "the Hopper kernels take 1 to 4096 groups";
  if (columns < 1 || columns % 8) return "the Hopper kernels store 8 columns at once";
  if ((groups.rows / 128 + groups.count + 1) * (columns / 128 + 1) >= int64_t{1} << 30)
    return "there are too many tiles";
  return nullptr;
}

inline TensorMap map_of(Type type, const Operand& o, int box_rows) {
  // what has one row or matrix needs no stride, but the driver wants one
  const int64_t apart = o.matrices > 1 ? o.matrix_stride : o.row_stride * (o.rows > 1 ? o.rows : 1);
  return encode_map(type == Type::bf16, o.data, {uint64_t(o.columns), uint64_t(o.rows), uint64_t(o.matrices)},
                    {uint64_t(o.row_stride) * 2, uint64_t(apart) * 2}, uint32_t(box_rows));
}

// One block a multiprocessor, or fewer where there cannot be as many tiles.
template <class Op>
void launch_kernel(const Queue& queue, Type type, const Operand& a, const Operand& b, Problem p,
                   const typename Op::Results& results) {
  p.pair = wants_pairs(p) && queue.multiprocessors > 1 ? 2 : 1;
  const int64_t tile_rows = Op::kTileRows * p.pair;
  const int64_t across = (p.columns + Op::kStepColumns - 1) / Op::kStepColumns;
  const int64_t high =
      Op::kSumsRows ? p.groups * ((p.height + tile_rows - 1) / tile_rows) : p.rows / tile_rows + p.groups + 1;
  const int64_t most = queue.multiprocessors / p.pair, clusters = high * across < most ? high * across : most;
  const size_t shared = 1024 + Ring<Op>::kBytes + size_t(p.groups + 1) * sizeof(Span);
  const int box_rows_b = Op::kIsAcrossB || Op::kParts == 2 ? Op::kBoxRowsB : Op::kBoxRowsB / p.pair;
  launch(&kernel<Op>, {unsigned(clusters * p.pair), kThreads, shared, unsigned(p.pair)}, queue.stream,
         map_of(type, a, Op::kBoxRowsA), map_of(type, b, box_rows_b), p, results);
}

template <class F>
void by_type(Type type, const F& f) {
  if (type == Type::bf16)
    f(bf16{});
  else
    f(f16{});
}

}  // namespace omnimoe::cuda::sm90
