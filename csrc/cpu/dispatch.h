#pragma once

#include "kernels.h"

namespace omnimoe::cpu {

// The best kernels that this machine runs, or null; and their name: "avx512bf16", "avx512", "avx2" or "none".
const Kernels* kernels();
const char* kernels_name();

}  // namespace omnimoe::cpu
