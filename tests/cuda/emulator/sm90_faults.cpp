// One product of one stage, right or with one mistake: whether the emulator gives the product, and refuses each
// mistake.
#define OMNIMOE_EMULATOR 1
#include "launch.h"
#include "sm90_tiles.h"

namespace omnimoe::cuda::sm90 {
namespace {

enum class Mistake : int {
  none,
  reads_before_landing,
  expects_too_few_bytes,
  expects_too_many_bytes,
  no_fence_of_registers,
  reads_before_wait,
  touches_in_flight,
  refills_while_read,
  writes_without_proxy_fence,
  writes_with_proxy_fence,
  warps_disagree,
  barrier_not_shown,
  other_leading_offset,
  other_stride_offset,
  tile_off_the_pattern,
  descriptor_without_swizzle,
};

constexpr int kColumns = 128, kBytesA = 64 * 128, kBytesB = kColumns * 128;

// d (64, 128) = A B over a depth of 64; A (64, 64) and B^T (128, 64), or with their rows along the depth.
template <bool kIsAcrossA, bool kIsAcrossB>
void multiply_once(const TensorMap map_a, const TensorMap map_b, const Mistake mistake, float* out) {
  const auto is = [&](Mistake one) { return mistake == one; };
  char* a = reinterpret_cast<char*>(shared_memory());
  char* b = a + kBytesA;
  auto* barrier = reinterpret_cast<uint64_t*>(b + kBytesB);
  if (is(Mistake::tile_off_the_pattern)) b += 128;
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    if (!is(Mistake::barrier_not_shown)) barrier_init_done();
  }
  __syncthreads();
  const auto fetch = [&](int matrix) {
    load_box(a, &map_a, barrier, 0, 0, matrix);
    for (int i = 0; i < (kIsAcrossB ? 2 : 1); ++i) load_box(b + i * kPanelBytes, &map_b, barrier, 64 * i, 0, matrix);
  };
  if (threadIdx.x == 0) {
    uint32_t bytes = kBytesA + kBytesB;
    if (is(Mistake::expects_too_few_bytes)) bytes = kBytesA;
    if (is(Mistake::expects_too_many_bytes)) bytes += 128;
    barrier_arrive_expecting(barrier, bytes);
    fetch(0);
  }
  if (!is(Mistake::reads_before_landing)) barrier_wait(barrier, 0);
  if (is(Mistake::writes_without_proxy_fence) || is(Mistake::writes_with_proxy_fence)) {
    for (int i = int(threadIdx.x); i < kBytesA; i += 128) a[i] = 0;
    if (is(Mistake::writes_with_proxy_fence)) order_shared_writes();
    named_barrier(1, 128);
  }
  float d[64];
  for (float& one : d) one = 0;
  if (!is(Mistake::no_fence_of_registers)) multiply_begin();
  uint64_t of_a = describe<kIsAcrossA>(shared_address(a)), of_b = describe<kIsAcrossB>(shared_address(b));
  if (is(Mistake::other_leading_offset)) of_b ^= uint64_t{1024 / 16} << 16;
  if (is(Mistake::other_stride_offset)) of_b ^= uint64_t{1024 / 16 + 2048 / 16} << 32;
  if (is(Mistake::descriptor_without_swizzle)) of_b &= ~(uint64_t{3} << 62);
  if (is(Mistake::warps_disagree) && threadIdx.x / 32 == 3) of_a += 2;
  for (int step = 0; step < 4; ++step) {
    multiply<bf16, kIsAcrossA, kIsAcrossB>(d, of_a + step * kDepthStep<kIsAcrossA>,
                                           of_b + step * kDepthStep<kIsAcrossB>);
    if (is(Mistake::touches_in_flight)) d[0] += 1;
  }
  multiply_commit();
  if (is(Mistake::refills_while_read) && threadIdx.x == 0) {
    barrier_arrive_expecting(barrier, kBytesA + kBytesB);
    fetch(1);  // there is none: zeros
  }
  if (!is(Mistake::reads_before_wait)) multiply_wait<0>();
  const int row = int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4, column = int(threadIdx.x) % 4 * 2;
  for (int i = 0; i < 64; ++i) out[(row + i / 2 % 2 * 8) * kColumns + column + i / 4 * 8 + i % 2] = d[i];
  multiply_wait<0>();
}

template <bool kIsAcrossA, bool kIsAcrossB>
void run(const void* a, const void* b, int mistake, float* out) {
  const TensorMap map_a = encode_map(true, a, {64, 64, 1}, {128, 64 * 128}, 64);
  const TensorMap map_b = kIsAcrossB ? encode_map(true, b, {kColumns, 64, 1}, {kColumns * 2, 64 * kColumns * 2}, 64)
                                     : encode_map(true, b, {64, kColumns, 1}, {128, kColumns * 128}, kColumns);
  launch(&multiply_once<kIsAcrossA, kIsAcrossB>, {1, 128, size_t(kBytesA + kBytesB) + 1024}, nullptr, map_a, map_b,
         Mistake(mistake), out);
}

}  // namespace
}  // namespace omnimoe::cuda::sm90

// Called through ctypes; gives what the emulator says, nothing where it is content.
extern "C" __attribute__((visibility("default"))) const char* multiply_once(int is_across_a, int is_across_b,
                                                                            const void* a, const void* b, int mistake,
                                                                            float* out, int order) {
  namespace sm90 = omnimoe::cuda::sm90;
  static std::string said;
  emulator::forget_buffers();
  emulator::announce(a, 64 * 64 * 2, false);
  emulator::announce(b, 64 * sm90::kColumns * 2, false);
  emulator::machine.order = emulator::Order(order);
  said.clear();
  try {
    if (is_across_a)
      is_across_b ? sm90::run<true, true>(a, b, mistake, out) : sm90::run<true, false>(a, b, mistake, out);
    else
      is_across_b ? sm90::run<false, true>(a, b, mistake, out) : sm90::run<false, false>(a, b, mistake, out);
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
