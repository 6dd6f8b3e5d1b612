// What a build with the sanitizers of memory (-DGEN_ACCEL_WATCHED) sees beyond what they see by
// themselves: which bytes of memory that a thread keeps belong to the call, and to which part of it.
// The products are written out there, as oneDNN's code reads and writes unseen: see common.h.

#pragma once

#include <cstddef>

#ifdef GEN_ACCEL_WATCHED
#include <sanitizer/asan_interface.h>
#endif

namespace {

#ifdef GEN_ACCEL_WATCHED
constexpr bool WATCHED = true;
constexpr size_t GAP = 64;  // bytes between parts of memory that nobody may touch

// Of `size` bytes the first `used` may be touched.
inline void allow(void* from, size_t used, size_t size) {
  __asan_unpoison_memory_region(from, size);
  __asan_poison_memory_region(static_cast<char*>(from) + used, size - used);
}
#else
constexpr bool WATCHED = false;
constexpr size_t GAP = 0;
inline void allow(void*, size_t, size_t) {}
#endif

}  // namespace
