// The instructions that the sm_80 kernels are made of, one function each, and the number formats. Nothing else of a GPU
// is used there, so that g++ compiles the same kernels for the emulator of tests/cuda, which has functions of its own.
#pragma once

#include <cstdint>

namespace omnimoe::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What sums are taken in.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// N numbers side by side that are loaded and stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

}  // namespace omnimoe::cuda

#if defined(OMNIMOE_EMULATOR)

#include "emulator/sm80.h"

#else

namespace omnimoe::cuda {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char omnimoe_shared_memory[];
  return omnimoe_shared_memory;
}
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Global memory. Kernels touch it through these and cp_async alone.
template <class V>
__device__ inline V load(const V* pointer) {
  return *pointer;
}
template <class V>
__device__ inline void store(V* pointer, const V& value) {
  *pointer = value;
}

// Sixteen bytes from global to shared memory, of which the first `bytes` are read and the others zero. It lands when
// the thread has waited for its group of copies; other threads may read it after a barrier that follows.
__device__ inline void cp_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kLeft` of the newest groups are on their way.
template <int kLeft>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8. Lane i gets of each
// matrix row i / 4, columns 2 (i % 4) and the next; transposed, column i / 4, rows 2 (i % 4) and the next.
__device__ inline void ldmatrix(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b over a (16, 16) tile of a and a (16, 8) tile of b.
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
template <class T>
__device__ inline T narrow(Wide<T> x) {
  return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
}
template <>
__device__ inline f16 narrow<f16>(float x) {
  f16 rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
}

}  // namespace omnimoe::cuda

#endif

namespace omnimoe::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

}  // namespace omnimoe::cuda
