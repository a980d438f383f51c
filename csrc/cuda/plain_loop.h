// The inner loop over float32 and float64, by the ordinary multipliers: no rounding of operands to fewer bits.
#pragma once

#include "operand.h"

namespace omnimoe::cuda {

// A product of 128 x 128, or 64 x 128 of doubles; every thread has each 16th row and column.
template <class T_, bool kIsFlippedA, bool kIsFlippedB>
class PlainLoop {
 public:
  using T = T_;
  static constexpr int kRows = sizeof(T) == 8 ? 64 : 128;
  static constexpr int kSharedBytes = kRows * kStagedColumns * int(sizeof(T));

  __device__ static const T* run(const Lines<T>& a, const Across& rows, int64_t first_a, const Lines<T>& b,
                                 const Across& columns, int64_t first_b, int64_t depth) {
    T* memory = reinterpret_cast<T*>(shared_memory());
    T* left = memory;
    T* right = memory + kStep * kPitch<kRows>;
    Part<kRows, kIsFlippedA> part_a;
    Part<kColumns, kIsFlippedB> part_b;
    part_a.start(a, rows, first_a);
    part_b.start(b, columns, first_b);
    T sums[kHigh][kWide] = {};
    const int down = int(threadIdx.x) / 16, across = int(threadIdx.x) % 16;
    part_a.fetch(a, 0, depth);
    part_b.fetch(b, 0, depth);
    for (int64_t from = 0; from < depth; from += kStep) {
      part_a.keep(left);
      part_b.keep(right);
      __syncthreads();
      part_a.fetch(a, from + kStep, depth);
      part_b.fetch(b, from + kStep, depth);
      for (int k = 0; k < kStep; ++k) {
        T one[kHigh], other[kWide];
        for (int i = 0; i < kHigh; ++i) one[i] = left[k * kPitch<kRows> + down + i * 16];
        for (int j = 0; j < kWide; ++j) other[j] = right[k * kPitch<kColumns> + across + j * 16];
        for (int i = 0; i < kHigh; ++i)
          for (int j = 0; j < kWide; ++j) sums[i][j] += one[i] * other[j];
      }
      __syncthreads();
    }
    for (int i = 0; i < kHigh; ++i)
      for (int j = 0; j < kWide; ++j) memory[(down + i * 16) * kStagedColumns + across + j * 16] = sums[i][j];
    __syncthreads();
    return memory;
  }

 private:
  static constexpr int kStep = 16, kHigh = kRows / 16, kWide = kColumns / 16;
  template <int kExtent>
  static constexpr int kPitch = kExtent + 1;

  // What one thread brings of an operand: along the depth, one column of lines; across, one column of every few lines.
  template <int kExtent, bool kIsFlipped>
  class Part {
   public:
    __device__ void start(const Lines<T>& lines, const Across& across, int64_t first_line) {
      first_line_ = first_line;
      int left;
      if constexpr (kIsFlipped) {
        int64_t where = 0;
        exists_ = across.locate<kExtent>(int(threadIdx.x) % kExtent, where, left);
        column_ = where;
      } else {
        for (int i = 0; i < kCount; ++i) {
          int64_t where;
          line_[i] = nullptr;
          if (across.locate<kExtent>(int(threadIdx.x) / kStep + i * (kThreads / kStep), where, left))
            line_[i] = lines.line(where);
        }
      }
    }

    __device__ void fetch(const Lines<T>& lines, int64_t from, int64_t depth) {
      for (int i = 0; i < kCount; ++i) {
        const T* at = nullptr;
        if constexpr (kIsFlipped) {
          const int64_t k = from + int(threadIdx.x) / kExtent + i * (kThreads / kExtent);
          const T* line = exists_ && k < depth ? lines.line(first_line_ + k) : nullptr;
          if (line) at = line + column_;
        } else {
          const int64_t k = from + int(threadIdx.x) % kStep;
          if (line_[i] && k < depth) at = line_[i] + k;
        }
        value_[i] = at ? load(at) : T(0);
      }
    }

    __device__ void keep(T* to) const {
      for (int i = 0; i < kCount; ++i) {
        if constexpr (kIsFlipped) {
          const int place = int(threadIdx.x) + i * kThreads;
          to[place / kExtent * kPitch<kExtent> + place % kExtent] = value_[i];
        } else {
          const int place = int(threadIdx.x) / kStep + i * (kThreads / kStep);
          to[int(threadIdx.x) % kStep * kPitch<kExtent> + place] = value_[i];
        }
      }
    }

   private:
    static constexpr int kCount = kExtent * kStep / kThreads;
    int64_t first_line_, column_ = 0;
    bool exists_ = false;
    const T* line_[kIsFlipped ? 1 : kCount];
    T value_[kCount];
  };
};

}  // namespace omnimoe::cuda
