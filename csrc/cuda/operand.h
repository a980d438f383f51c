// Where a tile of an operand lies in global memory, and how it comes into shared memory.
#pragma once

#include "ptx.h"

namespace omnimoe::cuda {

constexpr int kThreads = 256;
constexpr int kColumns = 128;         // of a tile of the product
constexpr int kStagedColumns = 132;   // of the finished tile in shared memory, whose rows begin at different banks

// A block of two runs of lines (or columns), each half as long as the tile; the second one is where up begins, in a
// product of gate and up, and else what follows the first.
struct Across {
  int64_t first, second;
  int in_first, in_second;  // those that exist

  template <int kExtent>
  __device__ bool locate(int at, int64_t& where, int& left) const {
    constexpr int kHalf = kExtent / 2;
    const bool is_second = at >= kHalf;
    where = is_second ? second + at - kHalf : first + at;
    left = is_second ? in_second - (at - kHalf) : in_first - at;
    return left > 0;
  }
};
__device__ inline int clamp_to(int64_t x, int limit) { return x < 0 ? 0 : x > limit ? limit : int(x); }
template <int kExtent>
__device__ inline Across consecutive(int64_t first, int64_t end) {
  constexpr int kHalf = kExtent / 2;
  return {first, first + kHalf, clamp_to(end - first, kHalf), clamp_to(end - first - kHalf, kHalf)};
}

// A matrix whose lines have stride 1. Where an index is given, line i is index[i], or zeros where that is no line.
template <class T>
struct Lines {
  const T* data;
  int64_t stride;
  const int64_t* index;
  int64_t count;
  bool is_aligned;  // every line begins at 16 bytes, and so does the second run

  __device__ const T* line(int64_t i) const {
    if (index) {
      i = load(index + i);
      if (i < 0 || i >= count) return nullptr;
    }
    return data + i * stride;
  }
};

// Eight 16-bit numbers, of which the first `count` exist.
template <class T>
__device__ inline void copy_chunk(unsigned char* to, const Lines<T>& lines, const T* from, int count) {
  if (lines.is_aligned) {
    cp_async(to, count > 0 ? from : lines.data, count > 0 ? count * int(sizeof(T)) : 0);
  } else {
    Pack<T, 8> chunk = {};
    for (int i = 0; i < 8; ++i)
      if (i < count) chunk.at[i] = load(from + i);
    *reinterpret_cast<Pack<T, 8>*>(to) = chunk;
  }
}

constexpr int kDepth = 32;  // of a stage of 16-bit numbers

// A stage as rows of 32 numbers along the depth. A row is four chunks of 16 bytes, which are swapped from row to row so
// that the eight rows that ldmatrix reads at once lie in different banks.
template <class T, int kExtent>
class AlongDepth {
 public:
  static constexpr int kBytes = kExtent * kDepth * int(sizeof(T));

  __device__ void start(const Lines<T>& lines, const Across& across, int64_t) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = int(threadIdx.x) + i * kThreads;
      int64_t where;
      int left;
      line_[i] = nullptr;
      if (chunk < kExtent * 4 && across.locate<kExtent>(chunk / 4, where, left)) line_[i] = lines.line(where);
    }
  }

  __device__ void issue(unsigned char* stage, const Lines<T>& lines, int64_t from, int64_t depth) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = int(threadIdx.x) + i * kThreads;
      if (chunk >= kExtent * 4) break;
      const int64_t at = from + chunk % 4 * 8;
      copy_chunk(stage + place(chunk / 4, chunk % 4), lines, line_[i] ? line_[i] + at : nullptr,
                 line_[i] ? clamp_to(depth - at, 8) : 0);
    }
  }

  // The fragment of rows `row` to row + 15, depth `depth` to depth + 15: as ldmatrix gives rows first or depth first.
  __device__ static void read_rows_first(uint32_t (&to)[4], const unsigned char* stage, int row, int depth) {
    const int lane = int(threadIdx.x) % 32;
    ldmatrix(to, stage + place(row + lane % 16, depth / 8 + lane / 16));
  }
  __device__ static void read_depth_first(uint32_t (&to)[4], const unsigned char* stage, int row, int depth) {
    const int lane = int(threadIdx.x) % 32;
    ldmatrix(to, stage + place(row + lane % 8 + lane / 16 * 8, depth / 8 + lane / 8 % 2));
  }

 private:
  static constexpr int kChunks = (kExtent * 4 + kThreads - 1) / kThreads;
  __device__ static int place(int row, int chunk) { return row * 64 + (chunk ^ (row / 2 % 4)) * 16; }
  const T* line_[kChunks];
};

// A stage as 32 rows, one a step of depth, of kExtent numbers across; chunks are swapped as above.
template <class T, int kExtent>
class AlongAcross {
 public:
  static constexpr int kBytes = kExtent * kDepth * int(sizeof(T));

  __device__ void start(const Lines<T>&, const Across& across, int64_t first_line) {
    first_line_ = first_line;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = int(threadIdx.x) + i * kThreads;
      left_[i] = 0;
      across.locate<kExtent>(chunk % kWide * 8, column_[i], left_[i]);
    }
  }

  __device__ void issue(unsigned char* stage, const Lines<T>& lines, int64_t from, int64_t depth) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = int(threadIdx.x) + i * kThreads;
      const int64_t at = from + chunk / kWide;
      const T* line = at < depth && left_[i] > 0 ? lines.line(first_line_ + at) : nullptr;
      copy_chunk(stage + place(chunk / kWide, chunk % kWide), lines, line ? line + column_[i] : nullptr,
                 line ? clamp_to(left_[i], 8) : 0);
    }
  }

  __device__ static void read_rows_first(uint32_t (&to)[4], const unsigned char* stage, int row, int depth) {
    const int lane = int(threadIdx.x) % 32;
    ldmatrix_transposed(to, stage + place(depth + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
  }
  __device__ static void read_depth_first(uint32_t (&to)[4], const unsigned char* stage, int row, int depth) {
    const int lane = int(threadIdx.x) % 32;
    ldmatrix_transposed(to, stage + place(depth + lane % 16, row / 8 + lane / 16));
  }

 private:
  static constexpr int kWide = kExtent / 8, kChunks = kWide * kDepth / kThreads;
  static_assert(kWide >= 8 && kChunks * kThreads == kWide * kDepth);
  __device__ static int place(int depth, int chunk) { return depth * kExtent * 2 + (chunk ^ (depth % 8)) * 16; }
  int64_t first_line_, column_[kChunks];
  int left_[kChunks];
};

}  // namespace omnimoe::cuda
