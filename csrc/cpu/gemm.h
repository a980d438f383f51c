// Matrix products of a few rows with a panel of columns, and what brings operands into the form they need.
//
// A panel is `depth` units of 2 vectors. A unit is one number of the accumulator's type or, where the machine multiplies
// pairs of bfloat16, two numbers that follow each other along the depth. The other operand is read a unit at a time and
// broadcast. Where there are few rows, packing a panel costs more than it saves: then both operands are read along the
// depth as they lie, and lanes are added at the end, which pays the better the deeper the product is.
#pragma once

#include <cstdlib>

#include "buffers.h"
#include "kernels.h"
#include "vector.h"

namespace omnimoe::cpu::OMNIMOE_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a storage type is multiplied.
template <class T>
struct Scheme {
  using Acc = Accumulator<T>;
  using Unit = Acc;
  using UnitVector = typename Lanes<Acc>::Vector;
  static constexpr int kPerUnit = 1;
  static UnitVector load_units(const T* from) { return load(from); }
  static Unit unit(const T* from, int64_t) { return load_some(from, 1)[0]; }
};

#ifdef __AVX512BF16__
template <>
struct Scheme<BFloat16> {
  using Acc = float;
  using Unit = uint32_t;
  using UnitVector = WordVector;
  static constexpr int kPerUnit = 2;
  static UnitVector load_units(const BFloat16* from) { return load_as<UnitVector>(from); }
  // `left` numbers are left along the depth; past the end stands a zero.
  static Unit unit(const BFloat16* from, int64_t left) {
    return from[0].bits | (left > 1 ? uint32_t{from[1].bits} << 16 : 0);
  }
};
#endif

template <>
inline Scheme<float>::Unit Scheme<float>::unit(const float* from, int64_t) {
  return *from;
}
template <>
inline Scheme<double>::Unit Scheme<double>::unit(const double* from, int64_t) {
  return *from;
}

template <class V>
inline V multiply_add(V sum, float a, V b) {
  return sum + a * b;
}
inline DoubleVector multiply_add(DoubleVector sum, double a, DoubleVector b) { return sum + a * b; }
template <class V>
inline V multiply_add(V sum, V a, V b) {
  return sum + a * b;
}
#ifdef __AVX512BF16__
inline FloatVector multiply_add(FloatVector sum, WordVector a, WordVector b) {
  return same_bits<FloatVector>(
      _mm512_dpbf16_ps(same_bits<__m512>(sum), same_bits<__m512bh>(a), same_bits<__m512bh>(b)));
}
inline FloatVector multiply_add(FloatVector sum, uint32_t a, WordVector b) {
  return multiply_add(sum, WordVector{} + a, b);
}
#endif

template <class T>
constexpr int kLanes = Lanes<Accumulator<T>>::count;
template <class T>
constexpr int kPanel = 2 * kLanes<T>;
constexpr int kMostRows = kVectorBytes == 64 ? 12 : 6;  // accumulators that fit into the registers, in pairs
constexpr int kMostDotRows = kVectorBytes == 64 ? 6 : 3;
constexpr int kDotColumns = 4;
constexpr int64_t kLongRow = 4096;  // bytes of a bank's row, a page of memory
constexpr int64_t kDotBytesAhead = 96 << 10;  // from what is read along the depth to what is fetched meanwhile

template <class T>
constexpr int64_t units(int64_t depth) {
  return ceil_div(depth, Scheme<T>::kPerUnit);
}

// Whether rows are better multiplied along the depth than by packed panels.
template <class T>
constexpr bool is_for_dots(int64_t rows, int64_t depth) {
  return rows <= 4 || rows * 28 <= units<T>(depth);
}

// Memory for one thread, that a loop takes pieces of.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(static_cast<char*>(take_buffer(bytes + 64))) {}
  ~Scratch() { give_buffer(data_); }
  Scratch(const Scratch&) = delete;
  void reset() { used_ = 0; }
  template <class U>
  U* take(int64_t count) {
    U* piece = reinterpret_cast<U*>(data_ + used_);
    used_ += ceil_div(count * sizeof(U), 64) * 64;
    return piece;
  }

 private:
  char* data_;
  int64_t used_ = 0;
};

template <class T>
inline const T* row_of(const Rows& rows, int64_t r) {
  return static_cast<const T*>(rows.data) + (rows.index ? rows.index[r] : r) * rows.stride;
}

// ---- panels -------------------------------------------------------------------------------------------------------

// Half a panel from rows that lie along the depth: lane i of unit k is unit k of row i. Lanes past `count` are zero.
template <class T>
void pack_along(const T* from, int64_t stride, int count, int64_t depth, typename Scheme<T>::Unit* to) {
  using S = Scheme<T>;
  constexpr int lanes = kLanes<T>, per = S::kPerUnit;
  int64_t k = 0;
  if constexpr (sizeof(typename S::Unit) == 4) {
    for (; k + lanes * per <= depth; k += lanes * per) {
      WordVector square[kFloatLanes];
      for (int i = 0; i < lanes; ++i)
        square[i] = i < count ? same_bits<WordVector>(S::load_units(from + i * stride + k)) : WordVector{};
      transpose(square);
      for (int j = 0; j < lanes; ++j) store_as(to + (k / per + j) * kPanel<T>, square[j]);
    }
  }
  for (; k < depth; k += per)
    for (int i = 0; i < lanes; ++i)
      to[k / per * kPanel<T> + i] = i < count ? S::unit(from + i * stride + k, depth - k) : typename S::Unit{};
}

// One unit of a vector of columns: the numbers of row `first` and, where units are pairs, of row `second` or zeros.
template <class T>
inline typename Scheme<T>::UnitVector unit_across(const T* first, const T* second, int count) {
  constexpr int lanes = kLanes<T>;
#ifdef __AVX512BF16__
  if constexpr (Scheme<T>::kPerUnit == 2) {
    HalfWordVector low{}, high{};
    if (count == lanes) {
      low = load_as<HalfWordVector>(first);
      if (second) high = load_as<HalfWordVector>(second);
    } else {
      std::memcpy(&low, first, count * sizeof(T));
      if (second) std::memcpy(&high, second, count * sizeof(T));
    }
    return __builtin_convertvector(low, WordVector) | (__builtin_convertvector(high, WordVector) << 16);
  } else
#endif
    return count == lanes ? load(first) : load_some(first, count);
}

// One unit of a whole panel, whose columns lie side by side.
template <class T>
inline void panel_across(const T* first, const T* second, typename Scheme<T>::Unit* to) {
#ifdef __AVX512BF16__
  if constexpr (Scheme<T>::kPerUnit == 2) {
    // columns 0 to 15, then 16 to 31, each beside its partner of the second row
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = load_as<__m512i>(first), b = load_as<__m512i>(second);
    store_as(to, _mm512_permutex2var_epi16(a, low, b));
    store_as(to + kLanes<T>, _mm512_permutex2var_epi16(a, high, b));
    return;
  }
#endif
  store_as(to, unit_across<T>(first, second, kLanes<T>));
  store_as(to + kLanes<T>, unit_across<T>(first + kLanes<T>, second + kLanes<T>, kLanes<T>));
}

// Half a panel from rows that lie across it: lane i of unit k is column i of row k. `row(k)` is where row k starts.
template <class T, class RowOf>
inline void pack_across(const RowOf& row, int count, int64_t depth, typename Scheme<T>::Unit* to, int64_t step) {
  constexpr int per = Scheme<T>::kPerUnit;
  const auto pack = [&](int held) __attribute__((always_inline)) {
    int64_t k = 0;
    for (; k + per <= depth; k += per) store_as(to + k / per * step, unit_across<T>(row(k), row(k + per - 1), held));
    if (k < depth) store_as(to + k / per * step, unit_across<T>(row(k), nullptr, held));
  };
  if (count == kLanes<T>) return pack(kLanes<T>);
  pack(count);
}

// Rows as units at an even distance: where they lie if they can be read there, else a copy.
template <class T>
struct Staged {
  const typename Scheme<T>::Unit* data;
  int64_t stride;
};

template <class T>
constexpr bool kReadInPlace = sizeof(T) * Scheme<T>::kPerUnit == sizeof(typename Scheme<T>::Unit);

template <class T>
constexpr int64_t stage_stride(int64_t depth) {
  return ceil_div(units<T>(depth), 16) * 16 + 16;  // not a power of two, which would put all rows into one cache set
}

template <class T>
Staged<T> stage(const Rows& rows, int64_t first, int64_t count, int64_t depth, typename Scheme<T>::Unit* copy) {
  using S = Scheme<T>;
  using Unit = typename S::Unit;
  if constexpr (kReadInPlace<T>) {
    const int64_t bytes = rows.stride * sizeof(T);
    if (!rows.index && depth % S::kPerUnit == 0 && rows.stride % S::kPerUnit == 0 && bytes % 1024)
      return {reinterpret_cast<const Unit*>(row_of<T>(rows, first)), rows.stride / S::kPerUnit};
  }
  const int64_t stride = stage_stride<T>(depth);
  for (int64_t r = 0; r < count; ++r) {
    const T* from = row_of<T>(rows, first + r);
    Unit* to = copy + r * stride;
    if constexpr (kReadInPlace<T>) {
      to[units<T>(depth) - 1] = 0;
      std::memcpy(to, from, depth * sizeof(T));
    } else {
      int64_t k = 0;
      for (; k + kLanes<T> <= depth; k += kLanes<T>) store_as(to + k, load(from + k));
      if (k < depth) store_as(to + k, load_some(from + k, depth - k));
    }
  }
  return {copy, stride};
}

// ---- products -----------------------------------------------------------------------------------------------------

// What is packed next, fetched into the second cache while something else is multiplied: up to two runs of 64 bytes a
// unit, which lie `step` bytes apart.
struct Ahead {
  const char* runs[2];
  int64_t step;
};

// R rows times a panel. Row i, unit k of the left operand is at left[i * row_step + k * unit_step].
template <class T, int R, int Fetched>
inline __attribute__((always_inline)) void panel_product(
    const typename Scheme<T>::Unit* left, int64_t row_step, int64_t unit_step, const typename Scheme<T>::Unit* panel,
    int64_t count, Ahead ahead, typename Lanes<Accumulator<T>>::Vector (&sums)[R][2]) {
  using UnitVector = typename Scheme<T>::UnitVector;
  for (int i = 0; i < R; ++i) sums[i][0] = sums[i][1] = typename Lanes<Accumulator<T>>::Vector{};
  for (int64_t k = 0; k < count; ++k) {
    const UnitVector low = load_as<UnitVector>(panel + k * kPanel<T>);
    const UnitVector high = load_as<UnitVector>(panel + k * kPanel<T> + kLanes<T>);
    for (int run = 0; run < Fetched; ++run) __builtin_prefetch(ahead.runs[run] + k * ahead.step, 0, 2);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const auto unit = left[i * row_step + k * unit_step];
      sums[i][0] = multiply_add(sums[i][0], unit, low);
      sums[i][1] = multiply_add(sums[i][1], unit, high);
    }
  }
}

// R staged rows times C rows of a bank, both along the depth; lanes of a total are still apart. Several rows of a bank
// are fetched ahead, a single one by the processor itself.
template <class T, int R, int C>
inline __attribute__((always_inline)) void along_depth(
    const typename Scheme<T>::Unit* left, int64_t row_step, const T* const* right, int64_t depth,
    typename Lanes<Accumulator<T>>::Vector (&total)[R][C]) {
  using S = Scheme<T>;
  using V = typename Lanes<Accumulator<T>>::Vector;
  using UnitVector = typename S::UnitVector;
  constexpr int lanes = kLanes<T>, per = S::kPerUnit;
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < C; ++j) total[i][j] = V{};
  int64_t k = 0;  // in units
  for (; (k + lanes) * per <= depth; k += lanes) {
    UnitVector columns[C];
    for (int j = 0; j < C; ++j) {
      columns[j] = S::load_units(right[j] + k * per);
      if constexpr (C > 1) __builtin_prefetch(right[j] + k * per + kDotBytesAhead / sizeof(T), 0, 2);
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const UnitVector row = load_as<UnitVector>(left + i * row_step + k);
      for (int j = 0; j < C; ++j) total[i][j] = multiply_add(total[i][j], row, columns[j]);
    }
  }
  if (k * per < depth) {
    const int64_t rest = depth - k * per;
    UnitVector columns[C];
    for (int j = 0; j < C; ++j) {
      T tail[lanes * per] = {};
      std::memcpy(tail, right[j] + k * per, rest * sizeof(T));
      columns[j] = S::load_units(tail);
    }
    for (int i = 0; i < R; ++i) {
      typename S::Unit tail[lanes] = {};
      std::memcpy(tail, left + i * row_step + k, units<T>(rest) * sizeof(typename S::Unit));
      const UnitVector row = load_as<UnitVector>(tail);
      for (int j = 0; j < C; ++j) total[i][j] = multiply_add(total[i][j], row, columns[j]);
    }
  }
}

// R staged rows times 4 rows of a bank: sums[i][j] = left[i] . right[j]. One or two rows only wait for memory, which
// gives short rows of a bank fastest one after the other, and long ones side by side. The sums are the same.
template <class T, int R>
inline __attribute__((always_inline)) void dot_product(
    const typename Scheme<T>::Unit* left, int64_t row_step, const T* const (&right)[kDotColumns], int64_t depth,
    Accumulator<T>* sums, int64_t sums_stride) {
  typename Lanes<Accumulator<T>>::Vector total[R][kDotColumns];
  if (R <= 2 && depth * int64_t{sizeof(T)} <= kLongRow) {
    for (int j = 0; j < kDotColumns; ++j) {
      typename Lanes<Accumulator<T>>::Vector one[R][1];
      along_depth<T, R, 1>(left, row_step, right + j, depth, one);
      for (int i = 0; i < R; ++i) total[i][j] = one[i][0];
    }
  } else {
    along_depth<T, R, kDotColumns>(left, row_step, right, depth, total);
  }
  for (int i = 0; i < R; ++i) sum_four<Accumulator<T>>(total[i], sums + i * sums_stride);
}

// Products of a number of rows that is known only now; the tile is (rows, kPanel).

constexpr int64_t kRunOfSums = 128;  // units that are added up before they join the rest: shorter sums round less

// Where it `adds`, to what the tile holds; as if all had been one product, if that was a number of whole runs.
template <class T, int Fetched = 0, int R = kMostRows>
void panel_tile(int64_t rows, const typename Scheme<T>::Unit* left, int64_t row_step, int64_t unit_step,
                const typename Scheme<T>::Unit* panel, int64_t count, Accumulator<T>* tile, Ahead ahead = {},
                bool adds = false) {
  if constexpr (R > 1)
    if (rows < R)
      return panel_tile<T, Fetched, R - 1>(rows, left, row_step, unit_step, panel, count, tile, ahead, adds);
  typename Lanes<Accumulator<T>>::Vector sums[R][2];
  for (int64_t start = 0; start == 0 || start < count; start += kRunOfSums) {
    panel_product<T, R, Fetched>(left + start * unit_step, row_step, unit_step, panel + start * kPanel<T>,
                                 least(kRunOfSums, count - start), ahead, sums);
    for (int run = 0; run < Fetched; ++run) ahead.runs[run] += kRunOfSums * ahead.step;
    for (int i = 0; i < R; ++i) {
      Accumulator<T>* to = tile + i * kPanel<T>;
      if (start || adds) {
        sums[i][0] += load(to);
        sums[i][1] += load(to + kLanes<T>);
      }
      store(to, sums[i][0]);
      store(to + kLanes<T>, sums[i][1]);
    }
  }
}

template <class T, int R = kMostDotRows>
void dot_tile(int64_t rows, const typename Scheme<T>::Unit* left, int64_t row_step, const T* const (&right)[kDotColumns],
              int64_t depth, Accumulator<T>* tile) {
  if constexpr (R > 1)
    if (rows < R) return dot_tile<T, R - 1>(rows, left, row_step, right, depth, tile);
  dot_product<T, R>(left, row_step, right, depth, tile, kPanel<T>);
}

// Cuts `count` rows into blocks of nearly equal size, none above `most`: block(first, size).
template <class F>
inline void in_blocks(int64_t count, int64_t most, const F& block) {
  int64_t done = 0;
  for (int64_t blocks = ceil_div(count, most); blocks; --blocks) {
    const int64_t size = ceil_div(count - done, blocks);
    block(done, size);
    done += size;
  }
}

}  // namespace omnimoe::cpu::OMNIMOE_ISA
