// The instructions of csrc/cuda/ptx.h on the emulator, with the fragment layouts of the PTX ISA's sections on
// ldmatrix, mma.m16n8k16 and cp.async. Included by that file, which declares the number formats.
#pragma once

#include "cuda.h"

namespace omnimoe::cuda {

using emulator::Where;

inline unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(emulator::shared_memory()); }
inline uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }

template <class V>
V load(const V* pointer, Where where = Where::current()) {
  emulator::check_global(pointer, sizeof(V), false, where, alignof(V));
  return *pointer;
}
template <class V>
void store(V* pointer, const std::type_identity_t<V>& value, Where where = Where::current()) {
  emulator::check_global(pointer, sizeof(V), true, where, alignof(V));
  *pointer = value;
}

// The copies of one thread: those since the last commit, and committed groups, oldest first.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
};
struct AsyncCopies {
  std::vector<AsyncCopy> open;
  std::deque<std::vector<AsyncCopy>> groups;
};

// The destination is poison until the group has been waited for, so that neither a reader that comes too early nor one
// of the former contents that comes too late can be right.
inline void cp_async(void* to, const void* from, int bytes, Where where = Where::current()) {
  if (emulator::shared_address(to, 16) % 16)
    emulator::fail("cp.async to a misaligned address at ", emulator::told(where));
  if (bytes < 0 || bytes > 16) emulator::fail("cp.async of ", bytes, " bytes at ", emulator::told(where));
  if (bytes) emulator::check_global(from, size_t(bytes), false, where, 16);
  emulator::poison(to, 16);
  emulator::state<AsyncCopies>(emulator::self()).open.push_back({to, from, bytes});
}
inline void cp_async_commit() {
  auto& copies = emulator::state<AsyncCopies>(emulator::self());
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
template <int kLeft>
void cp_async_wait() {
  auto& groups = emulator::state<AsyncCopies>(emulator::self()).groups;
  for (; groups.size() > kLeft; groups.pop_front())
    for (const AsyncCopy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    }
}

struct Fragment {
  uint32_t at[4];
};
inline void ldmatrix_any(uint32_t (&to)[4], const void* row, bool is_transposed, Where where) {
  if (emulator::shared_address(row, 16) % 16) emulator::fail("ldmatrix of a misaligned row at ", emulator::told(where));
  const Fragment got = emulator::meet<const void*, Fragment>(
      emulator::warp(), is_transposed ? "ldmatrix.trans" : "ldmatrix", row,
      [=](const void* const* const* rows, Fragment* const* out) {
        const auto element = [&](int matrix, int r, int c) {
          return uint32_t(static_cast<const uint16_t*>(*rows[8 * matrix + r])[c]);
        };
        for (int lane = 0; lane < 32; ++lane)
          for (int matrix = 0; matrix < 4; ++matrix) {
            const int one = lane / 4, two = lane % 4 * 2;
            out[lane]->at[matrix] = is_transposed ? element(matrix, two, one) | element(matrix, two + 1, one) << 16
                                                  : element(matrix, one, two) | element(matrix, one, two + 1) << 16;
          }
      },
      where);
  std::memcpy(to, got.at, sizeof(to));
}
inline void ldmatrix(uint32_t (&to)[4], const void* row, Where where = Where::current()) {
  ldmatrix_any(to, row, false, where);
}
inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row, Where where = Where::current()) {
  ldmatrix_any(to, row, true, where);
}

inline float widen(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(f16 x) { return float(std::bit_cast<_Float16>(x.bits)); }
template <class T>
T narrow(Wide<T> x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 narrow<f16>(float x) {
  return {std::bit_cast<uint16_t>(_Float16(x))};
}

// Each lane holds of a (16, 16): rows i / 4 and 8 below, columns 2 (i % 4), the next, and 8 to the right; of b (16, 8):
// rows 2 (i % 4), the next, and 8 below, column i / 4; of d (16, 8): rows as a, columns 2 (i % 4) and the next.
template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where = Where::current()) {
  struct In {
    const float* d;
    const uint32_t* a;
    uint32_t b[2];
  };
  struct Out {
    float d[4];
  };
  const Out got = emulator::meet<In, Out>(
      emulator::warp(), "mma.m16n8k16", In{d, a, {b0, b1}},
      [](const In* const* in, Out* const* out) {
        float left[16][16], right[16][8];
        const auto number = [](uint32_t pair, int half) { return widen(T{uint16_t(pair >> 16 * half)}); };
        for (int lane = 0; lane < 32; ++lane)
          for (int half = 0; half < 2; ++half) {
            const int one = lane / 4, two = lane % 4 * 2 + half;
            for (int part = 0; part < 4; ++part)
              left[one + part % 2 * 8][two + part / 2 * 8] = number(in[lane]->a[part], half);
            for (int part = 0; part < 2; ++part) right[two + part * 8][one] = number(in[lane]->b[part], half);
          }
        float sums[16][8] = {};
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 16; ++k)
            for (int column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
        for (int lane = 0; lane < 32; ++lane)
          for (int part = 0; part < 4; ++part)
            out[lane]->d[part] = in[lane]->d[part] + sums[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2];
      },
      where);
  std::memcpy(d, got.d, sizeof(d));
}

}  // namespace omnimoe::cuda
