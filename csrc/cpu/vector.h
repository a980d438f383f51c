// Vectors of one width, chosen by the flags this file is compiled with: 64 bytes with AVX-512, else 32 with AVX2.
//
// Every translation unit that includes it is compiled once for each instruction set, so nothing here may be shared
// between them: all of it lies in a namespace named after the set, and no header with inline functions of others is
// included, since the linker would keep one copy of those, perhaps the one that the machine cannot run.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace omnimoe::cpu::OMNIMOE_ISA {

#ifdef __AVX512F__
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif

typedef float FloatVector __attribute__((vector_size(kVectorBytes)));
typedef double DoubleVector __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
typedef uint32_t WordVector __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfWordVector __attribute__((vector_size(kVectorBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kFloatLanes = kVectorBytes / 4;

template <class V>
inline V load_as(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
inline void store_as(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class To, class From>
inline To same_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(To));
  return to;
}

// Lanes of an accumulator type.
template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using Vector = FloatVector;
  static constexpr int count = kVectorBytes / 4;
};
template <>
struct Lanes<double> {
  using Vector = DoubleVector;
  static constexpr int count = kVectorBytes / 8;
};

template <class A>
inline typename Lanes<A>::Vector broadcast(A value) {
  return typename Lanes<A>::Vector{} + value;
}

template <class A>
inline A sum(typename Lanes<A>::Vector v) {
  A lanes[Lanes<A>::count];
  store_as(lanes, v);
  // Halves are added to halves, so that the additions do not wait for each other.
  for (int width = Lanes<A>::count / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The sums of the lanes of four vectors.
template <class A>
inline void sum_four(const typename Lanes<A>::Vector (&v)[4], A* to) {
  if constexpr (sizeof(A) == 4) {
#ifdef __AVX512F__
    const __m512 a = same_bits<__m512>(v[0]), b = same_bits<__m512>(v[1]);
    const __m512 c = same_bits<__m512>(v[2]), d = same_bits<__m512>(v[3]);
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
    const __m256 a = same_bits<__m256>(v[0]), b = same_bits<__m256>(v[1]);
    const __m256 c = same_bits<__m256>(v[2]), d = same_bits<__m256>(v[3]);
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  } else {
    for (int j = 0; j < 4; ++j) to[j] = sum<A>(v[j]);
  }
}

// Storage to accumulator and back, a vector at a time. Rounding is to nearest, ties to even.

inline FloatVector load(const float* from) { return load_as<FloatVector>(from); }
inline DoubleVector load(const double* from) { return load_as<DoubleVector>(from); }
inline FloatVector load(const BFloat16* from) {
  const WordVector wide = __builtin_convertvector(load_as<HalfWordVector>(from), WordVector);
  return same_bits<FloatVector>(wide << 16);
}
inline FloatVector load(const Float16* from) {
#ifdef __AVX512F__
  return same_bits<FloatVector>(_mm512_cvtph_ps(load_as<__m256i>(from)));
#else
  return same_bits<FloatVector>(_mm256_cvtph_ps(load_as<__m128i>(from)));
#endif
}

inline void store(float* to, FloatVector v) { store_as(to, v); }
inline void store(double* to, DoubleVector v) { store_as(to, v); }
inline void store(BFloat16* to, FloatVector v) {
#ifdef __AVX512BF16__
  store_as(to, _mm512_cvtneps_pbh(same_bits<__m512>(v)));
#else
  const WordVector bits = same_bits<WordVector>(v);
  const WordVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const WordVector is_nan = same_bits<WordVector>(v != v);
  store_as(to, __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan), HalfWordVector));
#endif
}
inline void store(Float16* to, FloatVector v) {
#ifdef __AVX512F__
  store_as(to, _mm512_cvtps_ph(same_bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  store_as(to, _mm256_cvtps_ph(same_bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
}

// The accumulator of a storage type.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// The first `count` lanes, the rest zero; memory past them is not touched.
template <class T>
inline auto load_some(const T* from, int count) {
  if (count == Lanes<Accumulator<T>>::count) return load(from);
  T lanes[Lanes<Accumulator<T>>::count] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <class T, class V>
inline void store_some(T* to, V v, int count) {
  if (count == Lanes<Accumulator<T>>::count) return store(to, v);
  T lanes[Lanes<Accumulator<T>>::count];
  store(lanes, v);
  std::memcpy(to, lanes, count * sizeof(T));
}

// Whole vectors past the caches, for what is written once and not read soon. finish_stream() before others may read it.
template <class T, class V>
inline void stream(T* to, V v) {
  T lanes[Lanes<Accumulator<T>>::count] __attribute__((aligned(64)));
  constexpr int bytes = sizeof(lanes);
  store(lanes, v);
  if (reinterpret_cast<uintptr_t>(to) % bytes) {
    std::memcpy(to, lanes, bytes);
    return;
  }
#ifdef __AVX512F__
  if constexpr (bytes == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load_as<__m512i>(lanes));
    return;
  }
#endif
  if constexpr (bytes == 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load_as<__m256i>(lanes));
  else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), load_as<__m128i>(lanes));
}
inline void finish_stream() { _mm_sfence(); }

// Swaps rows and columns of a square of 32-bit lanes.
inline void transpose(WordVector (&row)[kFloatLanes]) {
#ifdef __AVX512F__
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = same_bits<__m512i>(row[i]);
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  // a[4 * g + j] now holds column j of each quarter for rows 4 g to 4 g + 3
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    row[j] = same_bits<WordVector>(_mm512_shuffle_i32x4(even, even2, 0x88));
    row[8 + j] = same_bits<WordVector>(_mm512_shuffle_i32x4(even, even2, 0xdd));
    row[4 + j] = same_bits<WordVector>(_mm512_shuffle_i32x4(odd, odd2, 0x88));
    row[12 + j] = same_bits<WordVector>(_mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
#else
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = same_bits<__m256>(row[i]);
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
    a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
    a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
    a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    row[j] = same_bits<WordVector>(_mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    row[4 + j] = same_bits<WordVector>(_mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
#endif
}

}  // namespace omnimoe::cpu::OMNIMOE_ISA
