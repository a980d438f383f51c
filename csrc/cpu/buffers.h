// Memory that is kept for the next time.
//
// Fresh memory costs a page fault for every 4 KiB, which at a few hundred megabytes takes longer than the product that
// fills it. The gradients of a bank are such memory: as large as the bank, needed in every step, freed after it. So
// blocks come back here and are handed out again.
#pragma once

#include <cstdint>

namespace omnimoe::cpu {

// A block of at least so many bytes, aligned to 64; what is in it is undefined.
void* take_buffer(int64_t bytes);
// Takes it back. Free blocks never hold more than was in use at once; OMNIMOE_KEEP_MEMORY=0 keeps none.
void give_buffer(void* data);

}  // namespace omnimoe::cpu
