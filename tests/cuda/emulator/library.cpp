// The ops of csrc/cuda as they are, over the emulator: a library of kernels for CPU tensors, in a namespace of its own
// (-DOMNIMOE_LIBRARY=...) or in omnimoe's.
#define OMNIMOE_EMULATOR 1
#define OMNIMOE_SM90 1
#include "grouped_mm.cu"
#include "hidden.cu"
#include "hidden_backward.cu"
#include "ops.cu"
#include "plan.cu"
#include "rows.cu"
#include "sm90_grouped_mm.cu"
#include "sm90_hidden.cu"
#include "sm90_hidden_backward.cu"

// Called through ctypes: how threads take turns, an index of emulator::Order, and a seed for the last one.
extern "C" __attribute__((visibility("default"))) void set_order(int order, int seed) {
  emulator::machine.order = emulator::Order(order);
  emulator::machine.random.seed(unsigned(seed));
}
extern "C" __attribute__((visibility("default"))) long launches() { return long(emulator::machine.launches); }
// Products of wgmma since the library was loaded.
extern "C" __attribute__((visibility("default"))) long hopper_products() { return omnimoe::cuda::sm90::products; }
