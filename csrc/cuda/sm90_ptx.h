// Hopper's own instructions, one function each: mbarriers, the copy engine (TMA), wgmma, shares of registers.
//
// Kernels use nothing of sm_90 but these, so that a host compiler can build them against emulated ones. Layouts are
// those of the PTX ISA: "Asynchronous Warpgroup Level Matrix Instructions" (shared-memory layout, matrix descriptor,
// register fragments) and "Tensors" (tiled mode, swizzling modes, out-of-bound access).
#pragma once

#include "ptx.h"

#if defined(OMNIMOE_EMULATOR)
#include "emulator/sm90.h"
#else

#include <cuda.h>

namespace omnimoe::cuda::sm90 {

using TensorMap = CUtensorMap;

// Two numbers as elements of 16 bits in one word, the first one low.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (__is_same(T, bf16))
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// 1 / (1 + exp(-x)), to about 1e-6 of it.
__device__ inline float sigmoid(float x) {
  float power, share;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.f + power));
  return share;
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------

__device__ inline void barrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes initialised barriers visible to the copy engine; a __syncthreads follows.
__device__ inline void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier that lies at the same place in the other block of a pair.
__device__ inline void barrier_arrive_in_other(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 other;\n"
      "mapa.shared::cluster.u32 other, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [other];\n}\n" ::"r"(shared_address(barrier)),
      "r"(rank ^ 1)
      : "memory");
}

// Arrives, and lets the phase wait for so many bytes of the copy engine besides.
__device__ inline void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete; the phase before a fresh barrier's first has parity 1 and is.
__device__ inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t is_done = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(is_done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!is_done);
}

// Arrives once the thread's cp_async until here have landed.
__device__ inline void barrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// ---- the copy engine ------------------------------------------------------------------------------------------------

__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Fetches the box at (column, row, matrix), zeros where it leaves the tensor. All bytes of the box count for the
// barrier.
__device__ inline void load_box(void* to, const TensorMap* map, uint64_t* barrier, int column, int row, int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(matrix)
      : "memory");
}

// The same for both blocks of a pair: to the same place in each, counted by the barrier at the same place in each.
__device__ inline void load_box_for_pair(void* to, const TensorMap* map, uint64_t* barrier, int column, int row,
                                         int matrix) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(matrix), "h"(uint16_t(3))
      : "memory");
}

// Orders a thread's ordinary writes to shared memory before what wgmma and the copy engine do after the next barrier.
__device__ inline void order_shared_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warps ----------------------------------------------------------------------------------------------------------

// A barrier of some of the block's warps; 0 is __syncthreads'.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Of the block within its cluster, which is of two blocks or this one alone.
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster's blocks that have not ended.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------

// Before the first wgmma, and before one whose registers other instructions have touched.
__device__ inline void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most so many of the committed groups are in flight.
template <int kPending>
__device__ inline void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving other uses of the accumulators across this point.
template <int kRegisters>
__device__ inline void hold(float (&d)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define OMNIMOE_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OMNIMOE_16(i) OMNIMOE_4(i), OMNIMOE_4(i + 4), OMNIMOE_4(i + 8), OMNIMOE_4(i + 12)
#define OMNIMOE_64(i) OMNIMOE_16(i), OMNIMOE_16(i + 16), OMNIMOE_16(i + 32), OMNIMOE_16(i + 48)
#define OMNIMOE_NAMES_64                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OMNIMOE_NAMES_128                                                                            \
  OMNIMOE_NAMES_64                                                                                   \
      ", "                                                                                           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define OMNIMOE_WGMMA(shape, type, names, a_b_flags, ...)                                             \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " a_b_flags \
               : __VA_ARGS__                                                                          \
               : "l"(a), "l"(b), "n"(int(kIsAcrossA)), "n"(int(kIsAcrossB)))

// d += A B with A 64 x 16 and B 16 x N behind descriptors; kIsAcross says that the operand lies along M or N, not along
// the depth ("trans"). Thread t of the warpgroup holds d[4 j + 2 h + c] = D[16 (t / 32) + t % 32 / 4 + 8 h]
// [8 j + 2 (t % 4) + c].
template <class T, bool kIsAcrossA, bool kIsAcrossB, int kRegisters>
__device__ inline void multiply(float (&d)[kRegisters], uint64_t a, uint64_t b) {
  static_assert(kRegisters == 64 || kRegisters == 128, "N is 128 or 256");
  constexpr bool kIsBF16 = __is_same(T, bf16);
  if constexpr (kRegisters == 64 && kIsBF16)
    OMNIMOE_WGMMA("m64n128k16", "bf16", OMNIMOE_NAMES_64, "%64, %65, 1, 1, 1, %66, %67;", OMNIMOE_64(0));
  else if constexpr (kRegisters == 64)
    OMNIMOE_WGMMA("m64n128k16", "f16", OMNIMOE_NAMES_64, "%64, %65, 1, 1, 1, %66, %67;", OMNIMOE_64(0));
  else if constexpr (kIsBF16)
    OMNIMOE_WGMMA("m64n256k16", "bf16", OMNIMOE_NAMES_128, "%128, %129, 1, 1, 1, %130, %131;", OMNIMOE_64(0),
                  OMNIMOE_64(64));
  else
    OMNIMOE_WGMMA("m64n256k16", "f16", OMNIMOE_NAMES_128, "%128, %129, 1, 1, 1, %130, %131;", OMNIMOE_64(0),
                  OMNIMOE_64(64));
}

#undef OMNIMOE_WGMMA
#undef OMNIMOE_NAMES_128
#undef OMNIMOE_NAMES_64
#undef OMNIMOE_64
#undef OMNIMOE_16
#undef OMNIMOE_4

}  // namespace omnimoe::cuda::sm90

#endif
