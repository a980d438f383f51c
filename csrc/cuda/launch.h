// How kernels are launched: by the CUDA runtime, or by the emulator of tests/cuda where g++ compiles them for it.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(OMNIMOE_EMULATOR)
#include "emulator/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace omnimoe::cuda {

struct LaunchShape {
  unsigned blocks, threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x
};

#if defined(OMNIMOE_EMULATOR)

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
            const std::type_identity_t<Parameters>&... arguments) {
  emulator::launch({dim3(shape.blocks), dim3(shape.threads), dim3(shape.cluster), shape.shared_bytes}, kernel,
                   arguments...);
}

#else

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
            const std::type_identity_t<Parameters>&... arguments) {
  if (shape.shared_bytes > (48 << 10))
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shape.shared_bytes)),
          "shared memory of a kernel");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::type_identity_t<Parameters>(arguments)...), "launch of a kernel");
}

#endif

}  // namespace omnimoe::cuda
