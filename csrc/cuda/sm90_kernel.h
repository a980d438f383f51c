// The one kernel of the Hopper path. An operation tells it how its operands lie and what becomes of the sums.
//
// Blocks stay on their multiprocessor and walk over tiles. One warpgroup fetches both operands of 64 steps of the sum
// at a time into a ring of stages, a single thread of it where no rows are gathered; each consumer warpgroup multiplies
// 64 rows of the tile, and gives a stage back when no wgmma reads it any more. While a tile's end is stored, the next
// one's stages are fetched already.
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

// The copy engine fetches what is not gathered; called by one thread.
template <class Op>
__device__ void fetch_boxes(const TensorMap& map_a, const TensorMap& map_b, const Problem& p, const Ring<Op>& ring,
                            const Tile& tile, int depth) {
  uint64_t* filled = ring.filled(ring.stage);
  char *a = ring.a(ring.stage), *b = ring.b(ring.stage);
  const bool takes_a = !p.gathered.index || p.is_second_gathered, takes_b = !p.gathered.index || !p.is_second_gathered;
  barrier_arrive_expecting(filled, (takes_a ? Ring<Op>::kBytesA : 0) + (takes_b ? Ring<Op>::kBytesB : 0));
  if (takes_a) {
    if constexpr (Op::kIsAcrossA) {
      for (int i = 0; i < Op::kTileRows / 64; ++i)
        load_box(a + i * kPanelBytes, &map_a, filled, tile.row + 64 * i, depth, 0);
    } else {
      load_box(a, &map_a, filled, depth, tile.row, 0);
    }
  }
  if (!takes_b) return;
  // of a pair, each block fetches half for both
  const bool is_pair = p.pair > 1;
  const int half = is_pair ? int(cluster_rank()) : 0, matrix = Op::kSumsRows ? 0 : tile.group;
  const auto load = [&](char* to, int column, int row) {
    if (is_pair)
      load_box_for_pair(to, &map_b, filled, column, row, matrix);
    else
      load_box(to, &map_b, filled, column, row, matrix);
  };
  if constexpr (Op::kIsAcrossB) {
    constexpr int kPanels = Op::kTileColumns / 64;
    const int panels = kPanels / p.pair;
    for (int i = half * panels; i < (half + 1) * panels; ++i) load(b + i * kPanelBytes, tile.column + 64 * i, depth);
  } else if constexpr (Op::kParts == 2) {
    for (int part = half; part < (is_pair ? half + 1 : 2); ++part)
      load(b + part * Op::kStepColumns * 128, depth, part * p.columns + tile.column);
  } else {
    const int first = half * (Op::kTileColumns / 2);
    load(b + first * 128, depth, tile.column + first);
  }
}

// A warp no longer reads a stage.
template <class Op>
__device__ inline void drain(const Problem& p, const Ring<Op>& ring, int stage) {
  if (threadIdx.x % 32) return;
  barrier_arrive(ring.drained(stage));
  if (p.pair > 1) barrier_arrive_in_other(ring.drained(stage), cluster_rank());
}

template <class Op>
__device__ void produce(const TensorMap& map_a, const TensorMap& map_b, const Problem& p, Ring<Op> ring) {
  Walk<Op> walk(p, ring.spans());
  for (Tile tile; walk.next(tile);)
    for (int block = 0; block < tile.blocks; ++block, ring.advance()) {
      barrier_wait(ring.drained(ring.stage), ring.phase ^ 1);
      fetch_boxes<Op>(map_a, map_b, p, ring, tile, tile.first + block * kDepth);
    }
}

// Where a gathered row begins; null for one that is not there, which reads as zeros.
template <class T>
__device__ inline const T* gathered_row(const Gathered& from, int row, int end) {
  if (row >= end) return nullptr;
  const int64_t source = load(from.index + row);
  return source < 0 || source >= from.count ? nullptr : static_cast<const T*>(from.data) + source * from.stride;
}

// Eight columns of a row to shared memory, as far as there are columns.
template <class T>
__device__ inline void copy_chunk(char* to, const T* row, int column, int columns, const void* instead) {
  const int count = row && column < columns ? least(columns - column, 8) : 0;
  cp_async(to, count ? row + column : instead, count * 2);
}

// The copy engine cannot fetch rows by index: 128 threads copy them, each 16 bytes of every 16th row of 128 bytes, to
// where the copy engine would have put them; it fetches the other operand.
template <class Op>
__device__ void produce_gathered(const TensorMap& map_a, const TensorMap& map_b, const Problem& p, Ring<Op> ring) {
  using T = typename Op::T;
  constexpr int kLines = Op::kSumsRows ? kDepth / 16 : Op::kTileRows / 16;
  const Gathered& from = p.gathered;
  const int line = int(threadIdx.x) / 8, chunk = int(threadIdx.x) % 8;
  const int place = line * 128 + (chunk ^ line % 8) * 16;  // in 128-byte swizzle, the same for every 16th line
  const T* rows[kLines];
  Walk<Op> walk(p, ring.spans());
  for (Tile tile; walk.next(tile);) {
    if constexpr (!Op::kSumsRows) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) rows[i] = gathered_row<T>(from, tile.row + line + 16 * i, tile.row_end);
    }
    for (int block = 0; block < tile.blocks; ++block, ring.advance()) {
      const int depth = tile.first + block * kDepth;
      if constexpr (Op::kSumsRows) {
#pragma unroll
        for (int i = 0; i < kLines; ++i) rows[i] = gathered_row<T>(from, depth + line + 16 * i, tile.end);
      }
      barrier_wait(ring.drained(ring.stage), ring.phase ^ 1);
      if (threadIdx.x == 0) fetch_boxes<Op>(map_a, map_b, p, ring, tile, depth);
      if constexpr (Op::kSumsRows) {
        char* to = p.is_second_gathered ? ring.b(ring.stage) : ring.a(ring.stage);
        const int panels = (p.is_second_gathered ? Op::kTileColumns : Op::kTileRows) / 64;
        const int first = p.is_second_gathered ? tile.column : tile.row;
        const int width = p.is_second_gathered ? p.columns : p.height;
        for (int panel = 0; panel < panels; ++panel)
#pragma unroll
          for (int i = 0; i < kLines; ++i)
            copy_chunk(to + panel * kPanelBytes + i * 16 * 128 + place, rows[i], first + 64 * panel + 8 * chunk, width,
                       from.data);
      } else {
#pragma unroll
        for (int i = 0; i < kLines; ++i)
          copy_chunk(ring.a(ring.stage) + i * 16 * 128 + place, rows[i], depth + 8 * chunk, p.depth, from.data);
      }
      barrier_arrive_after_copies(ring.filled(ring.stage));
    }
  }
}

// Zeros what the last block of a sum over rows holds of rows that are not the group's: of both operands, as 0 times Inf
// is NaN.
template <class Op>
__device__ inline void clear_tail(const Ring<Op>& ring, const Tile& tile, int block) {
  const int kept = tile.end - tile.first - block * kDepth;
  if (kept >= kDepth) return;
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
  Walk<Op> walk(p, ring.spans());
  for (Tile tile; walk.next(tile);) {
    const int row = tile.row + 64 * warpgroup;
    if (row >= tile.row_end) {  // nothing of ours in this tile: only keep step
      for (int block = 0; block < tile.blocks; ++block, ring.advance()) {
        barrier_wait(ring.filled(ring.stage), ring.phase);
        if (Op::kSumsRows) clear_tail<Op>(ring, tile, block);
        drain<Op>(p, ring, ring.stage);
      }
      continue;
    }
    float d[Op::kRegisters];
#pragma unroll
    for (int i = 0; i < Op::kRegisters; ++i) d[i] = 0;
    int held = 0;
    for (int block = 0; block < tile.blocks; ++block, ring.advance()) {
      barrier_wait(ring.filled(ring.stage), ring.phase);
      if (Op::kSumsRows) clear_tail<Op>(ring, tile, block);
      if (p.gathered.index) order_shared_writes();
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
      if (block) drain<Op>(p, ring, held);
      held = ring.stage;
    }
    multiply_wait<0>();
    hold(d);
    if (tile.blocks) drain<Op>(p, ring, held);
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
  if (threadIdx.x < 32) plan_spans(p, Op::kTileRows * p.pair, ring.spans());
  if (threadIdx.x == 32) ring.init(p.gathered.index ? 1 + kThreads - kConsumers : 1, p.pair);
  if (threadIdx.x == 64) {
    prefetch_map(&map_a);
    prefetch_map(&map_b);
  }
  __syncthreads();
  if (p.pair > 1) cluster_barrier();
  if (threadIdx.x < kThreads - kConsumers) {
    give_registers<56>();
    if (p.gathered.index)
      produce_gathered<Op>(map_a, map_b, p, ring);
    else if (threadIdx.x == 0)
      produce<Op>(map_a, map_b, p, ring);
  } else {
    take_registers<224>();
    consume<Op>(p, results, ring);
  }
  // the other block may still reach into this one's memory
  if (p.pair > 1) cluster_barrier();
#endif
}

}  // namespace omnimoe::cuda::sm90
