// How the Hopper kernels share out their work: tiles of the output in an order that every thread finds by itself, and
// the ring of stages that one producer warp fills and two consumer warpgroups drain.
#pragma once

#include "sm90_ptx.h"

namespace omnimoe::cuda::sm90 {

constexpr int kThreads = 384;  // a warpgroup that fetches, two that multiply
constexpr int kConsumers = 256;
constexpr int kDepth = 64;             // of a stage: 128 bytes, the width of the swizzle
constexpr int kPanelBytes = 64 * 128;  // 64 x 64 elements
constexpr int kRingBytes = 200 << 10;
constexpr int kBand = 8;  // tiles of rows that lie together in the order

// Rows that are fetched by index: row r is row index[r] of `count`.
struct Gathered {
  const void* data;
  int64_t stride;
  const int64_t* index;
  int64_t count;
};

// What every kernel is told.
struct Problem {
  const int32_t* ends;
  int groups, rows;
  int depth;                // of the sum; of no meaning where it runs over rows
  int height;               // rows of the output where the sum runs over rows
  int columns;              // over which tiles lie
  Gathered gathered;        // instead of an operand's map, if there is an index
  bool is_second_gathered;  // operand B, else A
  int pair = 1;             // 2 where blocks work in pairs, one tile above the other, and share operand B; else 1
};

// Up to where the rows of a group reach, and the tiles of rows up to there. One more follows the groups: the rest.
struct Span {
  int end, tiles;
};

// A tile of the output, and over what it sums.
struct Tile {
  int group;
  int row, row_end;  // of the output, or of the group's matrix where the sum runs over rows
  int column;
  int first;   // of the sum
  int blocks;  // of kDepth; none gives zeros
  int end;     // of the sum
};

__device__ inline int least(int a, int b) { return a < b ? a : b; }
__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Fills groups + 1 spans; called by a whole warp. Ends are clamped here, once.
__device__ inline void plan_spans(const Problem& p, int tile_rows, Span* spans) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  int reached = 0, tiles = 0;
  for (int base = 0; base <= p.groups; base += 32) {
    const int group = base + lane;
    int end = p.rows;
    if (group < p.groups) {
      const int told = load(p.ends + group);
      end = told < reached ? reached : least(told, p.rows);
    }
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kAll, end, step);
      if (lane >= step && before > end) end = before;
    }
    const int before = __shfl_up_sync(kAll, end, 1);
    int count = ceil_div(end - (lane ? before : reached), tile_rows);
    for (int step = 1; step < 32; step *= 2) {
      const int more = __shfl_up_sync(kAll, count, step);
      if (lane >= step) count += more;
    }
    if (group <= p.groups) spans[group] = {end, tiles + count};
    reached = __shfl_sync(kAll, end, 31);
    tiles += __shfl_sync(kAll, count, 31);
  }
}

// The tiles of a block, one after another: every gridDim.x-th of all. Those of a pair lie one above the other; the
// lower one may have no rows.
template <class Op>
class Walk {
 public:
  __device__ Walk(const Problem& p, const Span* spans)
      : p_(p),
        spans_(spans),
        next_(int(blockIdx.x) / p.pair),
        across_(ceil_div(p.columns, Op::kStepColumns)),
        tile_rows_(Op::kTileRows * p.pair),
        lower_(p.pair > 1 ? Op::kTileRows * int(cluster_rank()) : 0) {}

  __device__ bool next(Tile& tile) {
    const int now = next_;
    next_ += int(gridDim.x) / p_.pair;
    int rest, height;
    if constexpr (Op::kSumsRows) {
      height = ceil_div(p_.height, tile_rows_);
      group_ = now / (height * across_);
      if (group_ >= p_.groups) return false;
      rest = now - group_ * height * across_;
    } else {
      while (group_ <= p_.groups && now >= spans_[group_].tiles * across_) ++group_;
      if (group_ > p_.groups) return false;
      const int before = group_ ? spans_[group_ - 1].tiles : 0;
      height = spans_[group_].tiles - before;
      rest = now - before * across_;
    }
    // a band of tiles of rows goes through all columns together, so that both operands stay in the L2 cache
    const int band = rest / (kBand * across_);
    rest -= band * kBand * across_;
    const int of_band = least(kBand, height - band * kBand);
    const int column = rest / of_band, row = band * kBand + rest - column * of_band;
    const int start = group_ ? spans_[group_ - 1].end : 0, end = spans_[group_].end;
    tile.group = group_;
    tile.column = column * Op::kStepColumns;
    if constexpr (Op::kSumsRows) {
      tile.row = row * tile_rows_ + lower_;
      tile.row_end = p_.height;
      tile.first = start;
      tile.blocks = ceil_div(end - start, kDepth);
      tile.end = end;
    } else {
      tile.row = start + row * tile_rows_ + lower_;
      tile.row_end = end;
      tile.first = 0;
      tile.blocks = group_ < p_.groups ? ceil_div(p_.depth, kDepth) : 0;
      tile.end = p_.depth;
    }
    return true;
  }

 private:
  const Problem& p_;
  const Span* spans_;
  int next_, across_, tile_rows_, lower_, group_ = 0;
};

// Stages of the two operands in shared memory, with a barrier each for "filled" and "drained".
template <class Op>
struct Ring {
  static constexpr int kBytesA = Op::kTileRows * 128, kBytesB = Op::kTileColumns * 128;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kStages = kRingBytes / kStageBytes;
  static constexpr int kBytes = kStages * kStageBytes + 2 * kStages * 8;  // spans follow
  static_assert(kStages >= 3 && kBytesA % 1024 == 0 && kStageBytes % 1024 == 0, "tiles begin with a swizzle's pattern");

  char* memory;
  int stage = 0;
  uint32_t phase = 0;

  __device__ explicit Ring(char* shared) : memory(shared) {}
  __device__ char* a(int at) const { return memory + at * kStageBytes; }
  __device__ char* b(int at) const { return a(at) + kBytesA; }
  __device__ uint64_t* filled(int at) const { return reinterpret_cast<uint64_t*>(memory + kStages * kStageBytes) + at; }
  __device__ uint64_t* drained(int at) const { return filled(kStages + at); }
  __device__ Span* spans() const { return reinterpret_cast<Span*>(filled(2 * kStages)); }

  // By one thread, before anybody waits. `fetchers` arrive when a stage is filled, and the warps that multiply, of both
  // blocks of a pair, when it is drained.
  __device__ void init(int fetchers, int pair) {
    for (int at = 0; at < kStages; ++at) {
      barrier_init(filled(at), uint32_t(fetchers));
      barrier_init(drained(at), uint32_t(kConsumers / 32 * pair));
    }
    barrier_init_done();
  }
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Descriptor of an operand that begins at an address, in 128-byte swizzle. PTX ISA, matrix descriptor: address, leading
// and stride byte offsets in units of 16 bytes, swizzle mode 1 in bits 62 and 63. Along the depth, 8 rows of 128 bytes
// are 1024 bytes apart from the next 8, and the leading offset is not used. Across it, 8 steps of the depth by 64
// elements are 1024 bytes, and the next 64 elements lie a panel further.
template <bool kIsAcross>
__device__ inline uint64_t describe(uint32_t address) {
  constexpr uint64_t kLeading = kIsAcross ? kPanelBytes / 16 : 1, kStride = 1024 / 16;
  return uint64_t(1) << 62 | kStride << 32 | kLeading << 16 | (address & 0x3ffff) >> 4;
}

// How far the next 16 of the depth lie, in units of 16 bytes.
template <bool kIsAcross>
constexpr int kDepthStep = kIsAcross ? 16 * 128 / 16 : 32 / 16;

}  // namespace omnimoe::cuda::sm90
