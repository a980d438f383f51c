// Global memory: only what has been announced may be touched.
#pragma once

#include <map>

#include "core.h"

namespace emulator {

struct Buffer {
  uintptr_t end;
  bool is_writable;
  std::string name;
};
inline std::map<uintptr_t, Buffer> buffers;  // by where they begin

// Announces memory that kernels may read, and write if said. Overlapping announcements: the last one counts.
inline void announce(const void* data, size_t bytes, bool is_writable, const std::string& name = "a tensor") {
  if (!data || !bytes) return;
  Buffer& buffer = buffers[reinterpret_cast<uintptr_t>(data)];
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  buffer = {std::max(buffer.end, end), is_writable || buffer.is_writable, name};
  // what was announced within may have been freed since, and its memory taken for this one
  for (auto stale = buffers.upper_bound(reinterpret_cast<uintptr_t>(data)); stale != buffers.end() && stale->first < end;)
    stale = buffers.erase(stale);
}
inline void forget_buffers() { buffers.clear(); }

// Throws unless the access is aligned to its size (a power of two) and within one announced buffer.
inline void check_global(const void* pointer, size_t bytes, bool writes, const Where& where, size_t alignment = 0) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  if (begin % (alignment ? alignment : bytes)) fail("a misaligned access of ", bytes, " bytes at ", told(where));
  auto found = buffers.upper_bound(begin);
  while (found != buffers.begin()) {
    --found;
    if (begin + bytes <= found->second.end) {
      if (writes && !found->second.is_writable) fail("a write into ", found->second.name, " at ", told(where));
      return;
    }
    // buffers may lie within others, as slices of one tensor do; but seldom more than a few deep
    if (begin - found->first > (uintptr_t{1} << 40)) break;
  }
  std::string near = "no tensor";
  found = buffers.upper_bound(begin);
  if (found != buffers.begin()) {
    --found;
    near = std::to_string(int64_t(begin - found->second.end)) + " bytes past the end of " + found->second.name;
  }
  fail(writes ? "a write" : "a read", " of ", bytes, " bytes out of bounds at ", told(where), ": ", near);
}

}  // namespace emulator
