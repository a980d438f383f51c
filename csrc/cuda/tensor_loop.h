// The inner loop over 16-bit numbers: four stages of shared memory that cp.async fills, ldmatrix, and mma.m16n8k16 with
// sums in float32. The finished tile is left in shared memory, as float32.
#pragma once

#include "operand.h"

namespace omnimoe::cuda {

// A product of kRows x 128 by eight warps. Where an operand is flipped, its lines run across and not along the depth.
template <class T_, int kRows_, bool kIsFlippedA, bool kIsFlippedB>
class TensorLoop {
 public:
  using T = T_;
  static constexpr int kRows = kRows_;

 private:
  template <int kExtent, bool kIsFlipped>
  struct Choose {
    using type = AlongDepth<T, kExtent>;
  };
  template <int kExtent>
  struct Choose<kExtent, true> {
    using type = AlongAcross<T, kExtent>;
  };
  using A = typename Choose<kRows, kIsFlippedA>::type;
  using B = typename Choose<kColumns, kIsFlippedB>::type;
  static constexpr int kStages = 4, kStageBytes = A::kBytes + B::kBytes;
  static constexpr int kWarpsDown = kRows / 64 ? kRows / 64 : 1, kWarpsAcross = 8 / kWarpsDown;
  static constexpr int kHigh = kRows / kWarpsDown / 16, kWide = kColumns / kWarpsAcross / 8;  // atoms of a warp
  static constexpr int kStagedBytes = kRows * kStagedColumns * int(sizeof(float));

 public:
  static constexpr int kSharedBytes = kStages * kStageBytes > kStagedBytes ? kStages * kStageBytes : kStagedBytes;

  // first_a and first_b: the line where the depth begins, of operands whose lines run across.
  __device__ static const float* run(const Lines<T>& a, const Across& rows, int64_t first_a, const Lines<T>& b,
                                     const Across& columns, int64_t first_b, int64_t depth) {
    unsigned char* memory = shared_memory();
    A part_a;
    B part_b;
    part_a.start(a, rows, first_a);
    part_b.start(b, columns, first_b);
    const auto issue = [&](int64_t step) {
      unsigned char* stage = memory + step % kStages * kStageBytes;
      part_a.issue(stage, a, step * kDepth, depth);
      part_b.issue(stage + A::kBytes, b, step * kDepth, depth);
    };
    const int64_t steps = (depth + kDepth - 1) / kDepth;
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) issue(step);
      cp_async_commit();
    }
    float sums[kHigh][kWide][4] = {};
    const int warp = int(threadIdx.x) / 32;
    const int row = warp / kWarpsAcross * kHigh * 16, column = warp % kWarpsAcross * kWide * 8;
    for (int64_t step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // what has landed is there for all, and the stage before has been read by all
      if (step + kStages - 1 < steps) issue(step + kStages - 1);
      cp_async_commit();
      const unsigned char* stage = memory + step % kStages * kStageBytes;
      multiply(sums, stage, row, column);
    }
    cp_async_wait<0>();
    __syncthreads();
    float* staged = reinterpret_cast<float*>(memory);
    leave(sums, staged, row, column);
    __syncthreads();
    return staged;
  }

 private:
  __device__ static void multiply(float (&sums)[kHigh][kWide][4], const unsigned char* stage, int row, int column) {
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      uint32_t left[kHigh][4], right[kWide / 2][4];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) A::read_rows_first(left[i], stage, row + i * 16, depth);
#pragma unroll
      for (int j = 0; j < kWide / 2; ++j) B::read_depth_first(right[j], stage + A::kBytes, column + j * 16, depth);
#pragma unroll
      for (int i = 0; i < kHigh; ++i)
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
          const uint32_t* pair = right[j / 2] + j % 2 * 2;
          mma<T>(sums[i][j], left[i], pair[0], pair[1]);
        }
    }
  }

  __device__ static void leave(const float (&sums)[kHigh][kWide][4], float* staged, int row, int column) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kHigh; ++i)
#pragma unroll
      for (int j = 0; j < kWide; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* to = staged + (row + i * 16 + lane / 4 + half * 8) * kStagedColumns + column + j * 8 + lane % 4 * 2;
          *reinterpret_cast<Pack<float, 2>*>(to) = {{sums[i][j][2 * half], sums[i][j][2 * half + 1]}};
        }
  }
};

}  // namespace omnimoe::cuda
