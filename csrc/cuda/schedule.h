// Which tile of a grouped product a block works on next. The grid is fixed; blocks take every n-th tile of a list that
// nobody writes down: each warp counts tiles from the offsets on the device, 32 groups at a time.
#pragma once

#include "ptx.h"

namespace omnimoe::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline unsigned lane_id() { return threadIdx.x % 32; }

// Inclusive over the lanes of a warp.
__device__ inline int64_t scan_max(int64_t x) {
  for (int by = 1; by < 32; by *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, x, unsigned(by));
    if (int(lane_id()) >= by && other > x) x = other;
  }
  return x;
}
__device__ inline int64_t scan_sum(int64_t x) {
  for (int by = 1; by < 32; by *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, x, unsigned(by));
    if (int(lane_id()) >= by) x += other;
  }
  return x;
}

__device__ inline int64_t clamped_end(const int32_t* ends, int64_t group, int64_t count, int64_t rows) {
  if (group >= count) return rows;
  const int64_t end = load(ends + group);
  return end < 0 ? 0 : end > rows ? rows : end;
}

// A tile of the rows of one group. Group `count` is made of the rows past the last end.
struct Tile {
  int64_t group, row;
  int rows;
  int64_t column_tile;
};

class Schedule {
 public:
  __device__ Schedule(const int32_t* ends, int64_t count, int64_t rows, int tile_rows, int64_t column_tiles)
      : ends_(ends),
        count_(count),
        rows_(rows),
        tile_rows_(tile_rows),
        column_tiles_(column_tiles),
        next_(blockIdx.x) {}

  // The same in every thread of the block; false when there is none left.
  __device__ bool next(Tile& tile) {
    for (; first_ <= count_;) {
      const int64_t end = max(scan_max(clamped_end(ends_, first_ + lane_id(), count_, rows_)), before_);
      int64_t start = __shfl_up_sync(kFullWarp, end, 1u);
      if (lane_id() == 0) start = before_;
      const int64_t high = (end - start + tile_rows_ - 1) / tile_rows_, tiles = high * column_tiles_;
      const int64_t last = tiles_before_ + scan_sum(tiles);
      const unsigned found = __ballot_sync(kFullWarp, next_ < last);
      if (found) {
        const int lane = __ffs(int(found)) - 1;
        const int64_t group_start = __shfl_sync(kFullWarp, start, lane), group_end = __shfl_sync(kFullWarp, end, lane);
        const int64_t group_high = __shfl_sync(kFullWarp, high, lane);
        const int64_t within = next_ - __shfl_sync(kFullWarp, last - tiles, lane);
        // bands of a few tiles high, so that what runs at once shares rows and columns alike
        const int64_t band = within / (kBand * column_tiles_), rest = within % (kBand * column_tiles_);
        const int64_t band_high = min(int64_t{kBand}, group_high - band * kBand);
        tile.group = first_ + lane;
        tile.row = group_start + (band * kBand + rest % band_high) * tile_rows_;
        tile.rows = int(min(int64_t{tile_rows_}, group_end - tile.row));
        tile.column_tile = rest / band_high;
        next_ += gridDim.x;
        return true;
      }
      first_ += 32;
      before_ = __shfl_sync(kFullWarp, end, 31);
      tiles_before_ = __shfl_sync(kFullWarp, last, 31);
    }
    return false;
  }

 private:
  static constexpr int kBand = 8;
  const int32_t* ends_;
  int64_t count_, rows_;
  int tile_rows_;
  int64_t column_tiles_, next_, first_ = 0, before_ = 0, tiles_before_ = 0;
};

// Where a group begins and ends, asked by a whole warp.
struct Span {
  int64_t start, end;
};
__device__ inline Span span_of(const int32_t* ends, int64_t group, int64_t rows) {
  int64_t start = 0;
  for (int64_t g = lane_id(); g < group; g += 32) start = max(start, clamped_end(ends, g, group, rows));
  for (int by = 16; by; by /= 2) start = max(start, __shfl_xor_sync(kFullWarp, start, by));
  return {start, max(start, clamped_end(ends, group, group + 1, rows))};
}

}  // namespace omnimoe::cuda
