// The instructions of csrc/cuda/sm90_ptx.h on the emulator: mbarriers, the copy engine, wgmma, named barriers.
//
// What the hardware does at a time of its own, happens here as late as can be, and its destination is poison until
// then. wgmma and the copy engine see shared memory through a proxy of their own: ordinary writes and cp.async reach
// them when all threads of a named barrier, or of a warp that goes on to multiply, have fenced. Each rule names the
// section of the PTX ISA that it is taken from; none is taken from the kernels. Included by sm90_ptx.h.
#pragma once

#include "cuda.h"
#include "sm90_multiply.h"

namespace omnimoe::cuda::sm90 {

using emulator::Where;

template <class T>
uint32_t pack(float low, float high) {
  return uint32_t(narrow<T>(low).bits) | uint32_t(narrow<T>(high).bits) << 16;
}

inline float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

// ---- mbarriers: "Parallel Synchronization and Communication Instructions: mbarrier" ---------------------------------

struct Mbarrier {
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;  // tx-count
  uint64_t phase = 0;
  bool is_visible = false;  // to the copy engine

  // "Phase Completion of the mbarrier object": no pending arrivals, and a tx-count of zero.
  void try_complete() {
    if (pending || bytes) return;
    ++phase;
    pending = expected;
  }
};
struct Mbarriers {
  std::map<const void*, Mbarrier> at;
};
constexpr uint64_t kMbarrierWord = 0x6d62617272696572;  // what lies in shared memory is nobody's business

inline Mbarrier& mbarrier(emulator::Block& block, const uint64_t* barrier, const Where& where) {
  auto& all = emulator::state<Mbarriers>(block).at;
  const auto found = all.find(barrier);
  if (found == all.end()) emulator::fail("an mbarrier that is not initialised, at ", emulator::told(where));
  if (*barrier != kMbarrierWord) emulator::fail("an mbarrier was written over, at ", emulator::told(where));
  return found->second;
}

inline void barrier_init(uint64_t* barrier, uint32_t count, Where where = Where::current()) {
  if (emulator::shared_address(barrier, 8) % 8) emulator::fail("a misaligned mbarrier at ", emulator::told(where));
  if (!count || count >= 1u << 20) emulator::fail("an mbarrier of ", count, " arrivals at ", emulator::told(where));
  Mbarrier& made = emulator::state<Mbarriers>(emulator::self().block()).at[barrier];
  if (made.expected) emulator::fail("an mbarrier is initialised twice at ", emulator::told(where));
  made.expected = made.pending = count;
  *barrier = kMbarrierWord;
}
inline void barrier_init_done() {
  for (auto& [at, barrier] : emulator::state<Mbarriers>(emulator::self().block()).at) barrier.is_visible = true;
}
inline void barrier_arrive(uint64_t* barrier, Where where = Where::current()) {
  Mbarrier& b = mbarrier(emulator::self().block(), barrier, where);
  if (!b.pending) emulator::fail("one arrival too many at ", emulator::told(where));
  --b.pending;
  b.try_complete();
}
inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes, Where where = Where::current()) {
  Mbarrier& b = mbarrier(emulator::self().block(), barrier, where);
  b.bytes += bytes;
  if (b.bytes >= 1 << 20) emulator::fail("an mbarrier expects too many bytes at ", emulator::told(where));
  barrier_arrive(barrier, where);
}
// "cp.async.mbarrier.arrive", .noinc: an arrival that was counted, made when the thread's copies have landed.
inline void barrier_arrive_after_copies(uint64_t* barrier, Where where = Where::current()) {
  emulator::Block& block = emulator::self().block();
  auto& issued = emulator::state<AsyncCopies>(emulator::self());
  std::vector<AsyncCopy> copies = std::move(issued.open);
  for (auto& group : issued.groups) copies.insert(copies.end(), group.begin(), group.end());
  issued.open.clear();
  issued.groups.clear();
  mbarrier(block, barrier, where);
  emulator::later("copies of a thread", [&block, barrier, where, copies = std::move(copies)] {
    for (const AsyncCopy& copy : copies) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    }
    Mbarrier& b = mbarrier(block, barrier, where);
    if (!b.pending) emulator::fail("one arrival too many at ", emulator::told(where));
    --b.pending;
    b.try_complete();
  });
}
// "mbarrier.test_wait/try_wait", .parity: true once the phase of that parity, the current or the one before, is
// complete.
inline void barrier_wait(uint64_t* barrier, uint32_t parity, Where where = Where::current()) {
  const Mbarrier* b = &mbarrier(emulator::self().block(), barrier, where);
  emulator::wait_until([=] { return (b->phase & 1) != parity; }, "an mbarrier", where);
}

// ---- the copy engine: "cp.async.bulk.tensor" and "Tensors" ----------------------------------------------------------

struct TensorMap {
  const char* data;
  uint64_t sizes[3], stride_bytes[2];
  uint32_t box_rows;
};

// The requirements of cuTensorMapEncodeTiled.
inline TensorMap encode_map(bool, const void* data, const uint64_t (&sizes)[3], const uint64_t (&stride_bytes)[2],
                            uint32_t box_rows) {
  const auto need = [](bool holds, const char* what) {
    if (!holds) throw emulator::Error(std::string("cuTensorMapEncodeTiled: ") + what);
  };
  need(data && reinterpret_cast<uintptr_t>(data) % 16 == 0, "the address is no multiple of 16");
  for (const uint64_t size : sizes) need(size >= 1 && size <= uint64_t{1} << 32, "a size of 0, or over 2^32");
  for (const uint64_t stride : stride_bytes)
    need(stride && stride % 16 == 0 && stride < uint64_t{1} << 40, "a stride that is no multiple of 16, or over 2^40");
  need(stride_bytes[0] >= sizes[0] * 2 && stride_bytes[1] >= sizes[1], "strides shorter than what they pass over");
  need(box_rows >= 1 && box_rows <= 256, "a box of over 256 rows");
  return {static_cast<const char*>(data), {sizes[0], sizes[1], sizes[2]}, {stride_bytes[0], stride_bytes[1]}, box_rows};
}
inline void prefetch_map(const TensorMap*) {}

// Into each of the blocks, at the same place; the barrier at the same place in each counts.
inline void load_box_into(const std::vector<emulator::Block*>& blocks, void* to, const TensorMap* map,
                          uint64_t* barrier, int column, int row, int matrix, const Where& where) {
  const emulator::Block& here = emulator::self().block();
  const uint32_t bytes = map->box_rows * kSwizzleRow;
  const uint32_t start = emulator::shared_address(here, to, bytes);
  const auto barrier_at = reinterpret_cast<char*>(barrier) - here.base;
  // "Swizzling modes", 128B: the pattern repeats after 1024 bytes, tiles begin with it
  if (start % 1024) emulator::fail("a box in 128B swizzle at no multiple of 1024, ", emulator::told(where));
  struct Row {
    uint32_t to;
    const char* from;
    int skip, count;  // numbers outside on the left, and within
  };
  std::vector<Row> rows;
  for (uint32_t r = 0; r < map->box_rows; ++r) {
    const int64_t y = int64_t{row} + r, z = matrix, first = std::max(column, 0);
    const int64_t end = std::min<int64_t>(int64_t{column} + 64, int64_t(map->sizes[0]));
    Row one{start + r * kSwizzleRow, nullptr, int(first - column), int(std::max<int64_t>(0, end - first))};
    // "Out-of-bound access": zeros are filled in
    if (y < 0 || y >= int64_t(map->sizes[1]) || z < 0 || z >= int64_t(map->sizes[2])) one.count = 0;
    if (one.count) {
      one.from = map->data + first * 2 + y * int64_t(map->stride_bytes[0]) + z * int64_t(map->stride_bytes[1]);
      emulator::check_global(one.from, size_t(one.count) * 2, false, where, 2);
    }
    rows.push_back(one);
  }
  for (emulator::Block* block : blocks) {
    const auto own = reinterpret_cast<uint64_t*>(block->base + barrier_at);
    if (!mbarrier(*block, own, where).is_visible)
      emulator::fail("the copy engine does not see the mbarrier yet, at ", emulator::told(where));
    write_async(*block, start, bytes, nullptr);
    emulator::later("a copy of a box", [block, own, where, bytes, rows] {
      for (const Row& one : rows) {
        uint16_t line[kSwizzleRow / 2] = {};
        if (one.count) std::memcpy(line + one.skip, one.from, size_t(one.count) * 2);
        for (uint32_t chunk = 0; chunk < kSwizzleRow; chunk += 16)
          write_async(*block, swizzled(one.to + chunk), 16, line + chunk / 2);
      }
      Mbarrier& b = mbarrier(*block, own, where);
      b.bytes -= bytes;
      b.try_complete();
    });
  }
}
inline void load_box(void* to, const TensorMap* map, uint64_t* barrier, int column, int row, int matrix,
                     Where where = Where::current()) {
  load_box_into({&emulator::self().block()}, to, map, barrier, column, row, matrix, where);
}
// ".multicast::cluster", with a mask of both blocks.
inline void load_box_for_pair(void* to, const TensorMap* map, uint64_t* barrier, int column, int row, int matrix,
                              Where where = Where::current()) {
  if (emulator::machine.blocks.size() != 2) emulator::fail("a cluster that is no pair, at ", emulator::told(where));
  load_box_into(emulator::machine.blocks, to, map, barrier, column, row, matrix, where);
}

// ---- clusters: "mapa", "barrier.cluster" ----------------------------------------------------------------------------

inline uint32_t cluster_rank() { return emulator::self().block().rank; }

// A block that has ended has no shared memory any more.
inline void barrier_arrive_in_other(uint64_t* barrier, uint32_t rank, Where where = Where::current()) {
  if (emulator::machine.blocks.size() != 2) emulator::fail("a cluster that is no pair, at ", emulator::told(where));
  const auto at = reinterpret_cast<char*>(barrier) - emulator::self().block().base;
  emulator::Block& other = *emulator::machine.blocks[rank ^ 1];
  if (std::all_of(other.fibers.begin(), other.fibers.end(), [](const auto& fiber) { return fiber->done; }))
    emulator::fail("the other block has ended, at ", emulator::told(where));
  Mbarrier& b = mbarrier(other, reinterpret_cast<uint64_t*>(other.base + at), where);
  if (!b.pending) emulator::fail("one arrival too many at ", emulator::told(where));
  --b.pending;
  b.try_complete();
}

struct ClusterBarrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
};
// Kept with the first block.
inline void cluster_barrier(Where where = Where::current()) {
  auto& one = emulator::state<ClusterBarrier>(*emulator::machine.blocks[0]);
  size_t threads = 0;
  for (const emulator::Block* block : emulator::machine.blocks) threads += block->fibers.size();
  if (++one.arrived == threads) {
    one.arrived = 0;
    ++one.generation;
    return;
  }
  emulator::wait_until([&one, mine = one.generation] { return one.generation != mine; }, "a cluster's barrier", where);
}

// ---- barriers and registers -----------------------------------------------------------------------------------------

// "bar{.cta}.sync a, b": all threads of b / 32 warps.
struct NamedBarriers {
  struct One {
    int threads = 0, arrived = 0;
    bool all_fenced = true;
    uint64_t generation = 0;
  } at[16];
};
inline void named_barrier(int id, int threads, Where where = Where::current()) {
  if (id < 1 || id > 15 || threads < 32 || threads % 32)
    emulator::fail("barrier ", id, " of ", threads, " threads at ", emulator::told(where));
  emulator::Block& block = emulator::self().block();
  auto& one = emulator::state<NamedBarriers>(block).at[id];
  if (one.arrived && one.threads != threads)
    emulator::fail("barrier ", id, " is of ", one.threads, " threads and of ", threads, ", at ", emulator::told(where));
  Fenced& fenced = emulator::state<Fenced>(emulator::self());
  one.threads = threads;
  one.all_fenced &= fenced.is_fenced;
  fenced.is_fenced = false;
  if (++one.arrived < threads) {
    const uint64_t mine = one.generation;
    emulator::wait_until([&one, mine] { return one.generation != mine; }, "a named barrier", where);
    return;
  }
  if (one.all_fenced) show_async(block);
  one.arrived = 0;
  one.all_fenced = true;
  ++one.generation;
}

// "setmaxnreg": by all warps of a warpgroup, 24 to 256 in steps of 8.
template <int kRegisters>
void give_registers(Where where = Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  emulator::barrier(emulator::warpgroup(), "setmaxnreg", where);
}
template <int kRegisters>
void take_registers(Where where = Where::current()) {
  give_registers<kRegisters>(where);
}

}  // namespace omnimoe::cuda::sm90
