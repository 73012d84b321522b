// Races between the threads of a launch, found from the compiler's own hooks: .cu files compiled
// with -fsanitize=thread call __tsan_read4(p) and the like, and races.cpp answers them in place of
// libtsan. Two accesses conflict when one writes, they are by different threads, no barrier stands
// between them (between blocks there is none but a grid's), and they are not both atomic or
// volatile. Writes of the value that is there already pass.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulation::races {

struct Me {
  uint32_t thread;  // of the launch, from 1; 1024 numbers a block
  uint64_t epoch;   // grid barriers << 32 | barriers << 16 | __syncwarps
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool has(uintptr_t at) const { return at >= begin && at < end; }
};

#if defined(SK_RACES)
// `shared`: memory that only one block sees at a time.
void begin_launch(const char* kernel, Range stacks, Range shared);
void access(const void* p, int bytes, bool write, bool atomic, const void* from);
void flush();
void pause(bool);  // the shim's own work in a kernel
#else
inline void begin_launch(const char*, Range, Range) {}
inline void access(const void*, int, bool, bool, const void*) {}
inline void flush() {}
inline void pause(bool) {}
#endif

bool in_kernel();
Me me();

}  // namespace emulation::races
