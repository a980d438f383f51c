// Kernels with one mistake each, and the one without: whether the emulator refuses them.
#define OMNIMOE_EMULATOR 1
#include "launch.h"
#include "ptx.h"

namespace omnimoe::cuda {
namespace {

enum class Mistake : int {
  none, reads_before_wait, reads_before_barrier, part_of_a_block_at_a_barrier, warp_diverges, shuffle_of_half_a_warp,
  reads_past_the_end, writes_past_the_end, writes_an_input, misaligned_copy, copy_past_the_end, shared_past_the_end,
  misaligned_vector, misaligned_ldmatrix,
};

// Every thread brings 16 bytes into shared memory; out[i] = the sum of all of x.
void sum_kernel(const float* x, int count, Mistake mistake, float* out) {
  const auto is = [&](Mistake one) { return mistake == one; };
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = int(threadIdx.x);
  const float* from = x + 4 * thread + is(Mistake::misaligned_copy);
  const int bytes = 4 * thread + 4 <= count ? 16 : 4 * thread < count ? 4 * (count - 4 * thread) : 0;
  cp_async(shared + 4 * thread, from, is(Mistake::copy_past_the_end) ? 16 : bytes);
  cp_async_commit();
  if (!is(Mistake::reads_before_wait)) cp_async_wait<0>();
  if (is(Mistake::part_of_a_block_at_a_barrier) && thread >= 32) return;
  if (!is(Mistake::reads_before_barrier)) __syncthreads();
  float sum = 0;
  for (int i = 0; i < 4 * int(blockDim.x); ++i) sum += shared[i];
  if (is(Mistake::warp_diverges) && thread % 32 == 3)
    sum = __shfl_xor_sync(0xffffffffu, sum, 1);
  else
    sum = __shfl_xor_sync(is(Mistake::shuffle_of_half_a_warp) ? 0xffffu : 0xffffffffu, sum, 1);
  uint32_t four[4];
  ldmatrix(four, shared + 4 * (thread % 32) + is(Mistake::misaligned_ldmatrix));
  if (is(Mistake::reads_past_the_end)) sum += load(x + count);
  if (is(Mistake::misaligned_vector)) sum += load(reinterpret_cast<const Pack<float, 4>*>(x + 1)).at[0];
  if (is(Mistake::shared_past_the_end) && thread == 0) shared[4 * blockDim.x] = 0;
  if (is(Mistake::writes_an_input)) store(const_cast<float*>(x), 0.f);
  store(out + thread + (is(Mistake::writes_past_the_end) ? 1 : 0), sum);
}

}  // namespace
}  // namespace omnimoe::cuda

// Runs it over 64 threads; 0, or 1 with what the emulator said.
extern "C" __attribute__((visibility("default"))) int sum_with(int mistake, int order, const float* x, int count,
                                                               float* out, char* told, int most) {
  using namespace omnimoe::cuda;
  emulator::machine.order = emulator::Order(order);
  emulator::forget_buffers();
  emulator::announce(x, size_t(count) * 4, false, "x");
  emulator::announce(out, 64 * 4, true, "out");
  try {
    launch(sum_kernel, {1, 64, 64 * 16}, nullptr, x, count, Mistake(mistake), out);
  } catch (const emulator::Error& error) {
    std::strncpy(told, error.what(), size_t(most - 1));
    return 1;
  }
  return 0;
}
