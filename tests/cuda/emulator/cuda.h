// CUDA's names for g++: qualifiers, indices, launches, barriers and the shuffles of a warp. Kernels must not use
// __shared__ (shared memory is dynamic, see shared_memory()), nor <<<>>> (see csrc/cuda/launch.h).
#pragma once

#include <bit>
#include <math.h>
#include <type_traits>

#include "core.h"
#include "memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __align__(n) alignas(n)
using std::max;
using std::min;

#define threadIdx (::emulator::self().index)
#define blockIdx (::emulator::self().block().index)
#define blockDim (::emulator::machine.shape.block)
#define gridDim (::emulator::machine.shape.grid)

using cudaStream_t = void*;

namespace emulator {

template <class... Parameters>
void launch(const Shape& shape, void (*kernel)(Parameters...), const std::type_identity_t<Parameters>&... arguments) {
  run(shape, [&] { kernel(arguments...); });
}

inline void check_mask(uint32_t mask, const Where& where) {
  if (mask != 0xffffffffu) fail("a shuffle of part of a warp at ", told(where), ": masks are full here");
}

template <class T, class Source>
T shuffle(const char* name, uint32_t mask, T value, Source source, const Where& where) {
  check_mask(mask, where);
  return meet<T, T>(
      warp(), name, value,
      [&](const T* const* in, T* const* out) {
        for (int lane = 0; lane < 32; ++lane) *out[lane] = *in[source(lane)];
      },
      where);
}

}  // namespace emulator

inline void __syncthreads(emulator::Where where = emulator::Where::current()) {
  emulator::barrier(*emulator::self().block().all, "__syncthreads", where);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask, where);
  emulator::barrier(emulator::warp(), "__syncwarp", where);
}

// The source lane of every lane follows from the operand, which must be the same in all lanes but for __shfl_sync.
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int with, int = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle("__shfl_xor_sync", mask, value, [=](int lane) { return lane ^ with; }, where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle(
      "__shfl_up_sync", mask, value, [=](int lane) { return lane >= int(by) ? lane - int(by) : lane; }, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int = 32, emulator::Where where = emulator::Where::current()) {
  return emulator::shuffle(
      "__shfl_down_sync", mask, value, [=](int lane) { return lane + int(by) < 32 ? lane + int(by) : lane; }, where);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int = 32, emulator::Where where = emulator::Where::current()) {
  struct In {
    T value;
    int from;
  };
  emulator::check_mask(mask, where);
  return emulator::meet<In, T>(
      emulator::warp(), "__shfl_sync", In{value, from},
      [](const In* const* in, T* const* out) {
        for (int lane = 0; lane < 32; ++lane) *out[lane] = in[in[lane]->from & 31]->value;
      },
      where);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Where where = emulator::Where::current()) {
  emulator::check_mask(mask, where);
  return emulator::meet<int, uint32_t>(
      emulator::warp(), "__ballot_sync", predicate,
      [](const int* const* in, uint32_t* const* out) {
        uint32_t bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= uint32_t(*in[lane] != 0) << lane;
        for (int lane = 0; lane < 32; ++lane) *out[lane] = bits;
      },
      where);
}
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(uint32_t bits) { return bits ? std::countr_zero(bits) + 1 : 0; }
