// What the Hopper kernels offer to the op file: the grouped products of kernels.h through wgmma and the copy engine,
// for devices of compute capability 9.x.
//
// `why_not` looks at metadata alone. It gives a reason where these kernels do not serve a call, and null where they do;
// with a reason, the sm_80 kernels take it. They serve 16-bit elements, one gathered operand, and operands that the
// copy engine can fetch: addresses and strides of 16 bytes, widths of 8 elements. `run` throws std::runtime_error where
// the driver refuses. Contract and structs are those of kernels.h.
//
// They have run on the emulator of tests/cuda, which knows these instructions, and on no GPU yet: what they compute has
// been checked, how fast has not.
#pragma once

#include "kernels.h"

namespace omnimoe::cuda::sm90 {

const char* why_not(const Product&);
void run(const Product&, const Queue&);

const char* why_not(const Wgrad&);
void run(const Wgrad&, const Queue&);

const char* why_not(const Hidden&);
void run(const Hidden&, const Queue&);

const char* why_not(const HiddenBackward&);
void run(const HiddenBackward&, const Queue&);

}  // namespace omnimoe::cuda::sm90
