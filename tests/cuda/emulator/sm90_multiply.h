// wgmma on the emulator: operands behind descriptors, accumulators that nobody may touch until they have been waited
// for.
//
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions". A warp multiplies its own 16 of the 64 rows, and the
// warps of a warpgroup may drift apart, as they do on the hardware; all four must ask for the same products.
#pragma once

#include "cuda.h"

namespace omnimoe::cuda::sm90 {

using emulator::Where;

// ---- shared memory as the asynchronous proxy sees it ----------------------------------------------------------------

constexpr uint32_t kSwizzleRow = 128;

// "Swizzling modes", 128B: bits 4 to 6 of an address, the sixteen bytes within a row of 128, are combined by exclusive
// or with bits 7 to 9, the row within the eight of the pattern.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

struct AsyncView {
  std::vector<char> bytes;
};
inline std::vector<char>& async_view(emulator::Block& block) {
  auto& view = emulator::state<AsyncView>(block).bytes;
  if (view.empty()) view.assign(block.shared_bytes, char(emulator::kPoison));
  return view;
}
// Both proxies see what the copy engine writes; poison without data.
inline void write_async(emulator::Block& block, uint32_t address, uint32_t bytes, const void* data) {
  char* to = emulator::shared_pointer(block, address, bytes);
  char* seen = async_view(block).data() + (to - block.base);
  if (data) {
    std::memcpy(to, data, bytes);
    std::memcpy(seen, data, bytes);
  } else {
    emulator::poison(to, bytes);
    emulator::poison(seen, bytes);
  }
}
inline void show_async(emulator::Block& block) {
  std::memcpy(async_view(block).data(), block.base, block.shared_bytes);
}

// "Async proxy": a fence orders what a thread has written and what it has waited for. It takes effect where the
// thread's warp, or those that it meets at a barrier, have all fenced.
struct Fenced {
  bool is_fenced = false;
};
inline void order_shared_writes() { emulator::state<Fenced>(emulator::self()).is_fenced = true; }

// ---- descriptors ----------------------------------------------------------------------------------------------------

// "Matrix descriptor": bits 0-13 the address, 16-29 the leading and 32-45 the stride dimension byte offset, each
// without its four lowest bits; 49-51 the base offset, 62-63 the swizzling mode, 1 for 128 bytes.
struct Descriptor {
  uint32_t address, leading, stride;

  Descriptor(uint64_t bits, const Where& where)
      : address(uint32_t(bits & 0x3fff) << 4),
        leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) emulator::fail("a descriptor that is not of 128B swizzling, at ", emulator::told(where));
    const uint64_t known = uint64_t{3} << 62 | uint64_t{0x3fff} << 32 | uint64_t{0x3fff} << 16 | 0x3fff;
    if (bits & ~known) emulator::fail("a descriptor with bits of no meaning here, at ", emulator::told(where));
    if (address >> 7 & 7)
      emulator::fail("an operand does not begin with the pattern of the swizzle, at ", emulator::told(where));
  }

  // Where element (i, k) lies, i along M or N. "Strides": along the depth ("K-major"), a row of 128 bytes holds an i;
  // the stride offset is from 8 rows to the next 8, the leading one is not used. Across it ("MN-major"), a row of 128
  // bytes holds 64 i of one k; the stride offset is from 8 k to the next 8, the leading one from 64 i to the next 64.
  uint32_t element(bool is_across, uint32_t i, uint32_t k) const {
    const uint32_t plain = is_across ? address + i / 64 * leading + k / 8 * stride + k % 8 * kSwizzleRow + i % 64 * 2
                                     : address + i / 8 * stride + i % 8 * kSwizzleRow + k * 2;
    return swizzled(plain);
  }
};

inline long products = 0;  // of warps, since the library was loaded

// ---- products -------------------------------------------------------------------------------------------------------

constexpr uint32_t kTaken = 0x7fa5a5a5;  // in registers that wgmma works on: a NaN that any arithmetic changes

struct Accumulators {
  float* registers[32] = {};  // of each lane
  int count = 0;              // a lane
  int in_flight = 0;          // products that are not done
  std::vector<float> value;   // 32 * count
};

struct Multiplication {
  uint64_t a, b;
  bool is_across_a, is_across_b;
  int columns;
  float (*widen)(uint16_t);
  Where where;
  std::shared_ptr<Accumulators> to;
  std::vector<uint16_t> left, right;  // as they lay when it was issued: (16, 16) and (16, columns)
};

// Of a warp.
struct Multiplier {
  std::deque<Multiplication> queue;  // in the order of issue, which is that of execution
  int open = 0;                      // issued since the last commit
  std::deque<int> groups;            // committed: products that are not done, oldest first
  std::shared_ptr<Accumulators> now;
  uint64_t issued = 0;
};
// Of a warpgroup: what its first warp asked for, by number.
struct Asked {
  std::vector<std::array<uint64_t, 3>> products;
};
// Of a thread: whether its registers may have been touched since the last fence.
struct Touched {
  bool is_touched = true;
};

inline void gather_operands(emulator::Block& block, int quarter, const Multiplication& m, std::vector<uint16_t>& left,
                            std::vector<uint16_t>& right) {
  const auto& view = async_view(block);
  const Descriptor a(m.a, m.where), b(m.b, m.where);
  const auto at = [&](uint32_t address) {
    const char* within = emulator::shared_pointer(block, address, 2);
    uint16_t bits;
    std::memcpy(&bits, view.data() + (within - block.base), 2);
    return bits;
  };
  left.resize(16 * 16);
  right.resize(size_t(16 * m.columns));
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t i = 0; i < 16; ++i) left[i * 16 + k] = at(a.element(m.is_across_a, uint32_t(quarter) * 16 + i, k));
    for (uint32_t j = 0; j < uint32_t(m.columns); ++j) right[k * m.columns + j] = at(b.element(m.is_across_b, j, k));
  }
}

inline void execute(emulator::Block& block, int quarter, Multiplier& warp) {
  Multiplication m = std::move(warp.queue.front());
  warp.queue.pop_front();
  std::vector<uint16_t> left, right;
  gather_operands(block, quarter, m, left, right);
  if (left != m.left || right != m.right)
    emulator::fail("an operand of the wgmma at ", emulator::told(m.where), " changes while it is read");
  std::vector<float> b(right.size());
  for (size_t i = 0; i < right.size(); ++i) b[i] = m.widen(right[i]);
  std::vector<float> row(size_t(m.columns), 0.f);
  for (int i = 0; i < 16; ++i) {
    std::fill(row.begin(), row.end(), 0.f);
    for (int k = 0; k < 16; ++k) {
      const float a = m.widen(left[size_t(i * 16 + k)]);
      for (int j = 0; j < m.columns; ++j) row[size_t(j)] += a * b[size_t(k * m.columns + j)];
    }
    // "Register fragments", D of m64nNk16: row i is in lanes 4 (i % 8) to 4 (i % 8) + 3, columns 2 (lane % 4) and the
    // next of each 8; rows from 8 on are the second pair of each four registers
    for (int j = 0; j < m.columns; ++j)
      m.to->value[size_t((i % 8 * 4 + j % 8 / 2) * m.to->count + j / 8 * 4 + i / 8 * 2 + j % 2)] += row[size_t(j)];
  }
  --m.to->in_flight;
  --(warp.groups.empty() ? warp.open : warp.groups.front());
  while (!warp.groups.empty() && !warp.groups.front()) warp.groups.pop_front();
}

inline void multiply_begin(Where where = Where::current()) {
  bool& is_fenced = emulator::state<Fenced>(emulator::self()).is_fenced;
  emulator::meet<bool, emulator::Nothing>(
      emulator::warp(), "wgmma.fence", is_fenced,
      [](const bool* const* in, auto) {
        if (std::all_of(in, in + 32, [](const bool* one) { return *one; })) show_async(emulator::self().block());
      },
      where);
  is_fenced = false;
  emulator::state<Touched>(emulator::self()).is_touched = false;
}

template <class T, bool kIsAcrossA, bool kIsAcrossB, int kRegisters>
void multiply(float (&d)[kRegisters], uint64_t a, uint64_t b, Where where = Where::current()) {
  struct In {
    float* d;
    uint64_t a, b;
  };
  if (emulator::state<Touched>(emulator::self()).is_touched)
    emulator::fail("registers go to wgmma without a fence, at ", emulator::told(where));
  emulator::Block& block = emulator::self().block();
  const unsigned number = emulator::self().warp();
  emulator::Group &group = emulator::warp(), &warpgroup = emulator::warpgroup();
  Multiplier& warp = emulator::state<Multiplier>(group);
  const auto issue = [&](const In* const* in, emulator::Nothing* const*) {
    for (int lane = 0; lane < 32; ++lane)
      if (in[lane]->a != a || in[lane]->b != b) emulator::fail("lanes differ in descriptors, ", emulator::told(where));
    auto& asked = emulator::state<Asked>(warpgroup).products;
    const std::array<uint64_t, 3> mine{a, b, uint64_t(kRegisters * 4 + kIsAcrossA * 2 + kIsAcrossB)};
    if (asked.size() == warp.issued) asked.push_back(mine);
    if (asked[warp.issued++] != mine)
      emulator::fail("the warps of a warpgroup multiply different things, at ", emulator::told(where));
    const bool is_first = !warp.now || warp.now->registers[0] != in[0]->d;
    if (is_first) {
      if (warp.now && warp.now->registers[0])
        emulator::fail("a second set of accumulators, at ", emulator::told(where));
      warp.now = std::make_shared<Accumulators>();
      warp.now->count = kRegisters;
      warp.now->value.resize(32 * kRegisters);
      for (int lane = 0; lane < 32; ++lane) {
        warp.now->registers[lane] = in[lane]->d;
        std::memcpy(&warp.now->value[size_t(lane * kRegisters)], in[lane]->d, sizeof(float) * kRegisters);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < kRegisters; ++i) {
        if (!is_first && std::bit_cast<uint32_t>(in[lane]->d[i]) != kTaken)
          emulator::fail("accumulators are touched while wgmma works on them, at ", emulator::told(where));
        in[lane]->d[i] = std::bit_cast<float>(kTaken);
      }
    ++warp.now->in_flight;
    ++products;
    ++warp.open;
    Multiplication m{
        a,     b,        kIsAcrossA, kIsAcrossB, kRegisters * 2, [](uint16_t bits) { return widen(T{bits}); },
        where, warp.now, {},         {}};
    gather_operands(block, int(number % 4), m, m.left, m.right);
    warp.queue.push_back(std::move(m));
    emulator::later("a wgmma", [&block, &warp, number] { execute(block, int(number % 4), warp); });
  };
  emulator::meet<In, emulator::Nothing>(group, "wgmma.mma_async", In{d, a, b}, issue, where);
}

inline void multiply_commit(Where where = Where::current()) {
  Multiplier& warp = emulator::state<Multiplier>(emulator::warp());
  emulator::meet<emulator::Nothing, emulator::Nothing>(
      emulator::warp(), "wgmma.commit_group", {},
      [&](auto, auto) {
        if (warp.open) warp.groups.push_back(warp.open);
        warp.open = 0;
      },
      where);
}

// "wgmma.wait_group": registers may be touched when all groups that write to them have been waited for.
template <int kPending>
void multiply_wait(Where where = Where::current()) {
  emulator::Group& group = emulator::warp();
  Multiplier& warp = emulator::state<Multiplier>(group);
  emulator::barrier(group, "wgmma.wait_group", where);
  emulator::wait_until([&] { return int(warp.groups.size()) <= kPending; }, "wgmma.wait_group", where);
  if (kPending || !warp.now || warp.now->in_flight) return;
  const unsigned lane = emulator::self().lane();
  float* registers = warp.now->registers[lane];
  if (!registers) return;
  std::memcpy(registers, &warp.now->value[size_t(int(lane) * warp.now->count)],
              sizeof(float) * size_t(warp.now->count));
  warp.now->registers[lane] = nullptr;
  emulator::state<Touched>(emulator::self()).is_touched = true;
}

template <int kRegisters>
void hold(float (&)[kRegisters]) {}

}  // namespace omnimoe::cuda::sm90
