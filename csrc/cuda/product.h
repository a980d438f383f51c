// The kernels around the inner loops, and their launch.
#pragma once

#include "epilogue.h"
#include "kernels.h"
#include "plain_loop.h"
#include "schedule.h"
#include "tensor_loop.h"

namespace omnimoe::cuda {

// x[r] W[g]^T over the rows of each group, and what the epilogue makes of it.
template <class Loop, class Epilogue>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(Groups groups, Lines<typename Loop::T> x, Lines<typename Loop::T> weight, int64_t copy_stride,
                   int64_t depth, Epilogue epilogue) {
  using T = typename Loop::T;
  Schedule schedule(groups.ends, groups.count, groups.rows, Loop::kRows, epilogue.tiles());
  for (Tile tile; schedule.next(tile);) {
    const bool is_past_end = tile.group == groups.count;
    const Wide<T>* staged = nullptr;
    if (!is_past_end) {
      const Across rows = consecutive<Loop::kRows>(tile.row, tile.row + tile.rows);
      Lines<T> matrix = weight;
      matrix.data += tile.group * copy_stride;
      staged = Loop::run(x, rows, 0, matrix, epilogue.across(tile.column_tile), 0, depth);
    }
    epilogue(tile, staged, is_past_end);
    __syncthreads();  // the next tile's stages lie where this one was
  }
}

// dy^T x over the rows of each group.
template <class Loop>
__global__ void __launch_bounds__(kThreads, 2)
    wgrad_kernel(Groups groups, Lines<typename Loop::T> dy, Lines<typename Loop::T> x, int64_t columns, int64_t depth,
                 typename Loop::T* out) {
  using T = typename Loop::T;
  const int64_t high = (columns + Loop::kRows - 1) / Loop::kRows, wide = (depth + kColumns - 1) / kColumns;
  for (int64_t i = blockIdx.x; i < groups.count * high * wide; i += gridDim.x) {
    const int64_t group = i / (high * wide), row = i / wide % high * Loop::kRows, column = i % wide * kColumns;
    const Span span = span_of(groups.ends, group, groups.rows);
    const auto* staged =
        Loop::run(dy, consecutive<Loop::kRows>(row, columns), span.start, x, consecutive<kColumns>(column, depth),
                  span.start, span.end - span.start);
    const StoreProduct<T> epilogue{depth, nullptr, nullptr, out + group * columns * depth};
    epilogue({group, row, clamp_to(columns - row, Loop::kRows), column / kColumns}, staged, false);
    __syncthreads();
  }
}

inline int64_t ceil_of(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Two blocks a multiprocessor, or fewer where there are fewer tiles.
inline unsigned blocks_for(const Queue& queue, int64_t tiles) {
  const int64_t most = int64_t{2} * queue.multiprocessors;
  return unsigned(tiles < 1 ? 1 : tiles < most ? tiles : most);
}

template <class T>
bool starts_at_16_bytes(const void* data, int64_t stride, int64_t other = 0) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * int64_t(sizeof(T)) % 16 == 0 &&
         other * int64_t(sizeof(T)) % 16 == 0;
}
template <class T>
Lines<T> lines_of(const Rows& rows) {
  return {static_cast<const T*>(rows.data), rows.stride, rows.index, rows.count,
          starts_at_16_bytes<T>(rows.data, rows.stride)};
}
// `second` is the distance, along a line, of a run of columns that begins elsewhere.
template <class T>
Lines<T> lines_of(const Bank& bank, int64_t second) {
  const bool is_aligned = starts_at_16_bytes<T>(bank.data, bank.row_stride, bank.copy_stride);
  return {static_cast<const T*>(bank.data), bank.row_stride, nullptr, 0,
          is_aligned && second * int64_t(sizeof(T)) % 16 == 0};
}

template <class Loop, class Epilogue>
void launch_product(const Groups& groups, const Rows& x, const Bank& weight, int64_t second, int64_t depth,
                    int64_t column_tiles, const Epilogue& epilogue, const Queue& queue) {
  using T = typename Loop::T;
  const int64_t tiles = (ceil_of(groups.rows, Loop::kRows) + groups.count) * column_tiles;
  launch(product_kernel<Loop, Epilogue>, {blocks_for(queue, tiles), kThreads, Loop::kSharedBytes}, queue.stream, groups,
         lines_of<T>(x), lines_of<T>(weight, second), weight.copy_stride, depth, epilogue);
}

// Chooses the loop: by number format, by the way the matrices lie, and low tiles where groups have few rows.
// kIsAcross: a matrix that is not flipped has its lines across the depth, as in backward.
template <class T, class Epilogue>
void choose_product(const Groups& groups, const Rows& x, const Bank& weight, bool is_flipped, int64_t second,
                    int64_t depth, int64_t column_tiles, const Epilogue& epilogue, const Queue& queue) {
  const auto with = [&](auto loop) {
    launch_product<decltype(loop)>(groups, x, weight, second, depth, column_tiles, epilogue, queue);
  };
  if constexpr (sizeof(T) == 2) {
    const bool is_low = groups.rows <= 32 * groups.count;
    if (is_low && is_flipped)
      with(TensorLoop<T, 32, false, true>{});
    else if (is_low)
      with(TensorLoop<T, 32, false, false>{});
    else if (is_flipped)
      with(TensorLoop<T, 128, false, true>{});
    else
      with(TensorLoop<T, 128, false, false>{});
  } else {
    if (is_flipped)
      with(PlainLoop<T, false, true>{});
    else
      with(PlainLoop<T, false, false>{});
  }
}

// Calls body(T{}) with the number format.
template <class Body>
void with_type(Type type, Body&& body) {
  switch (type) {
    case Type::f32:
      return body(float{});
    case Type::f64:
      return body(double{});
    case Type::bf16:
      return body(bf16{});
    case Type::f16:
      return body(f16{});
  }
}

}  // namespace omnimoe::cuda
