// What the op file needs of the device its tensors are on. For the emulator, that is a CPU whose kernels may touch only
// the tensors of the call, and where fresh memory holds NaN.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>

#include "kernels.h"

#if defined(OMNIMOE_EMULATOR)
#define OMNIMOE_DISPATCH_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <atomic>
#define OMNIMOE_LIBRARY omnimoe
#define OMNIMOE_DISPATCH_KEY CUDA
#endif

namespace omnimoe::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t bytes_of(const Tensor& x) {
  int64_t last = 0;
  for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
  return x.numel() ? (last + 1) * int64_t(x.element_size()) : 0;
}

#if defined(OMNIMOE_EMULATOR)

inline bool is_here(const Tensor& x) { return x.is_cpu(); }

// One call of an op: its device and its stream.
class Call {
 public:
  explicit Call(const Tensor& x) {
    STD_TORCH_CHECK(is_here(x), "the first operand must be on the device of the others");
    emulator::forget_buffers();
  }
  bool has(const Tensor& x) const { return is_here(x); }
  Queue queue() const { return {nullptr, 3}; }
  bool is_hopper() const {
    const char* capability = std::getenv("OMNIMOE_EMULATED_CAPABILITY");
    return capability && capability[0] == '9';
  }
};

inline const void* read(const Tensor& x) {
  emulator::announce(x.const_data_ptr(), size_t(bytes_of(x)), false, "an input");
  return x.const_data_ptr();
}
inline void* written(Tensor& x) {
  emulator::announce(x.mutable_data_ptr(), size_t(bytes_of(x)), true, "an output");
  return x.mutable_data_ptr();
}
inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> type = std::nullopt) {
  Tensor made = torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
  if (made.numel()) emulator::poison(made.mutable_data_ptr(), size_t(bytes_of(made)));
  return made;
}

#else

inline bool is_here(const Tensor& x) { return x.is_cuda(); }

struct Device {
  int multiprocessors, capability;
};
// Asked once a device; two threads that ask at once find the same.
inline Device device_of(int index) {
  constexpr int kMost = 64;
  static std::atomic<int> known[kMost];
  const int at = index < 0 || index >= kMost ? 0 : index;
  int packed = at == index ? known[at].load() : 0;
  if (!packed) {
    int multiprocessors = 0, capability = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "multiprocessors");
    check(cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, index), "compute capability");
    packed = multiprocessors << 8 | capability;
    if (at == index) known[at].store(packed);
  }
  return {packed >> 8, packed & 255};
}

class Call {
 public:
  explicit Call(const Tensor& x) : index_(index_of(x)), guard_(index_), device_(device_of(index_)) {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream) == 0, "no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  bool has(const Tensor& x) const { return is_here(x) && x.get_device_index() == index_; }
  Queue queue() const { return {stream_, device_.multiprocessors}; }
  // OMNIMOE_CUDA_KERNELS=sm_80 takes the kernels for every device on Hopper too, to compare them.
  bool is_hopper() const {
    const char* wanted = std::getenv("OMNIMOE_CUDA_KERNELS");
    return device_.capability == 9 && !(wanted && !std::strcmp(wanted, "sm_80"));
  }

 private:
  static int index_of(const Tensor& x) {
    STD_TORCH_CHECK(is_here(x), "the first operand must be on the device of the others");
    return x.get_device_index();
  }
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_;
  cudaStream_t stream_;
};

inline const void* read(const Tensor& x) { return x.const_data_ptr(); }
inline void* written(Tensor& x) { return x.mutable_data_ptr(); }
inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

#endif

inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes,
                    std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_zeros(like, {sizes.begin(), sizes.size()}, type);
}

}  // namespace omnimoe::cuda
