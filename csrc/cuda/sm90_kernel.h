// The one kernel of the Hopper path. An operation tells it how its operands lie and what becomes of the sums.
//
// Blocks stay on their multiprocessor and walk over tiles. One thread fetches both operands of 64 steps of the sum at a
// time into a ring of stages; each consumer warpgroup multiplies 64 rows of the tile, and gives a stage back when no
// wgmma reads it any more. While a tile's end is stored, the next one's stages are fetched already.
#pragma once

#include "sm90_tiles.h"

namespace omnimoe::cuda::sm90 {

// Operation: element type T; kTileRows (128), kTileColumns (128 or 256) of a tile; kStepColumns, how far the next one
// lies; kParts, 2 where the tile's columns are as many of the gate's and then of the up projection's; kIsAcrossA and
// kIsAcrossB, whether an operand's rows are steps of the sum; kSumsRows, whether the sum runs over the rows of a group.
template <class T_, int kTileColumns_, bool kIsAcrossA_, bool kIsAcrossB_, int kParts_ = 1>
struct Operation {
  using T = T_;
  static constexpr int kTileRows = 128, kTileColumns = kTileColumns_, kParts = kParts_;
  static constexpr int kStepColumns = kTileColumns / kParts;
  static constexpr bool kIsAcrossA = kIsAcrossA_, kIsAcrossB = kIsAcrossB_, kSumsRows = kIsAcrossA_;
  static constexpr int kBoxRowsA = kIsAcrossA ? kDepth : kTileRows;
  static constexpr int kBoxRowsB = kIsAcrossB ? kDepth : kStepColumns;
  static constexpr int kRegisters = kTileColumns / 2;
};

template <class Op>
__device__ void produce(const TensorMap& map_a, const TensorMap& map_b, const Problem& p, Ring<Op> ring) {
  prefetch_map(&map_a);
  prefetch_map(&map_b);
  Walk<Op> walk(p, ring.spans());
  for (Tile tile; walk.next(tile);)
    for (int block = 0; block < tile.blocks; ++block, ring.advance()) {
      uint64_t* filled = ring.filled(ring.stage);
      char *a = ring.a(ring.stage), *b = ring.b(ring.stage);
      const int depth = tile.first + block * kDepth;
      barrier_wait(ring.drained(ring.stage), ring.phase ^ 1);
      barrier_arrive_expecting(filled, Ring<Op>::kStageBytes);
      if constexpr (Op::kIsAcrossA) {
        for (int i = 0; i < Op::kTileRows / 64; ++i)
          load_box(a + i * kPanelBytes, &map_a, filled, tile.row + 64 * i, depth, 0);
      } else {
        load_box(a, &map_a, filled, depth, tile.row, 0);
      }
      const int matrix = Op::kSumsRows ? 0 : tile.group;
      if constexpr (Op::kIsAcrossB) {
        for (int i = 0; i < Op::kTileColumns / 64; ++i)
          load_box(b + i * kPanelBytes, &map_b, filled, tile.column + 64 * i, depth, matrix);
      } else {
        for (int part = 0; part < Op::kParts; ++part)
          load_box(b + part * Op::kStepColumns * 128, &map_b, filled, depth, part * p.columns + tile.column, matrix);
      }
    }
}

// Zeros what the last stage holds of rows that are not the group's: of both operands, as 0 times Inf is NaN.
template <class Op>
__device__ void clear_tail(const Ring<Op>& ring, int kept) {
  constexpr int kPanels = Ring<Op>::kStageBytes / kPanelBytes;
  const int words = (kDepth - kept) * 8;  // of 16 bytes, a panel
  for (int i = int(threadIdx.x) - (kThreads - kConsumers); i < kPanels * words; i += kConsumers) {
    const int panel = i / words;
    *reinterpret_cast<Pack<uint32_t, 4>*>(ring.a(ring.stage) + panel * kPanelBytes + kept * 128 +
                                         (i - panel * words) * 16) = {};
  }
  order_shared_writes();
  named_barrier(1, kConsumers);
}

template <class Op>
__device__ void consume(const Problem& p, const typename Op::Results& results, Ring<Op> ring) {
  using T = typename Op::T;
  const int warpgroup = int(threadIdx.x) / 128 - 1;
  const bool is_first_lane = threadIdx.x % 32 == 0;
  Walk<Op> walk(p, ring.spans());
  for (Tile tile; walk.next(tile);) {
    const int row = tile.row + 64 * warpgroup;
    if (row >= tile.row_end) {  // nothing of ours in this tile: only keep step
      for (int block = 0; block < tile.blocks; ++block, ring.advance()) {
        barrier_wait(ring.filled(ring.stage), ring.phase);
        if (Op::kSumsRows && block == tile.blocks - 1 && tile.last < kDepth) clear_tail<Op>(ring, tile.last);
        if (is_first_lane) barrier_arrive(ring.drained(ring.stage));
      }
      continue;
    }
    float d[Op::kRegisters];
#pragma unroll
    for (int i = 0; i < Op::kRegisters; ++i) d[i] = 0;
    int held = 0;
    for (int block = 0; block < tile.blocks; ++block, ring.advance()) {
      barrier_wait(ring.filled(ring.stage), ring.phase);
      if (Op::kSumsRows && block == tile.blocks - 1 && tile.last < kDepth) clear_tail<Op>(ring, tile.last);
      const uint64_t a = describe<Op::kIsAcrossA>(shared_address(ring.a(ring.stage)) + warpgroup * kPanelBytes);
      const uint64_t b = describe<Op::kIsAcrossB>(shared_address(ring.b(ring.stage)));
      hold(d);
      multiply_begin();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step)
        multiply<T, Op::kIsAcrossA, Op::kIsAcrossB>(d, a + step * kDepthStep<Op::kIsAcrossA>,
                                                    b + step * kDepthStep<Op::kIsAcrossB>);
      multiply_commit();
      hold(d);
      // the multiplication before this one is done: its stage may be filled anew
      multiply_wait<1>();
      if (block && is_first_lane) barrier_arrive(ring.drained(held));
      held = ring.stage;
    }
    multiply_wait<0>();
    hold(d);
    if (tile.blocks && is_first_lane) barrier_arrive(ring.drained(held));
    Op::finish(p, results, tile, row, d);
  }
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
           const __grid_constant__ Problem p, const __grid_constant__ typename Op::Results results) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // code for other devices is never called
  // tiles begin at multiples of 1024 bytes, where the pattern of the swizzle does
  const uint32_t begin = shared_address(shared_memory());
  Ring<Op> ring(reinterpret_cast<char*>(shared_memory()) + (1024 - begin % 1024) % 1024);
  if (threadIdx.x < 32) plan_spans(p, Op::kTileRows, ring.spans());
  if (threadIdx.x == 32) ring.init();
  __syncthreads();
  if (threadIdx.x < kThreads - kConsumers) {
    give_registers<40>();
    if (threadIdx.x == 0) produce<Op>(map_a, map_b, p, ring);
  } else {
    take_registers<232>();
    consume<Op>(p, results, ring);
  }
#endif
}

}  // namespace omnimoe::cuda::sm90
