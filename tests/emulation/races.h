// Detects races between the threads of a launch. .cu files are compiled with -fsanitize=thread, and
// races.cpp implements the hooks (__tsan_read4(p) ...) in place of libtsan. Two accesses race if
// they are by different threads, at least one writes, no barrier is between them (between blocks:
// no grid barrier), and they are not both atomic or volatile. A write of the value that memory
// already holds is no race.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulation::races {

struct Me {
  uint32_t thread;  // in the launch, from 1; 1024 numbers a block
  uint64_t epoch;   // grid barriers << 32 | barriers << 16 | __syncwarps
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool has(uintptr_t at) const { return at >= begin && at < end; }
};

#if defined(SK_RACES)
// `shared`: memory that one block sees at a time.
void begin_launch(const char* kernel, Range stacks, Range shared);
void access(const void* p, int bytes, bool write, bool atomic, const void* from);
void flush();
void pause(bool);  // for the emulation's own accesses in a kernel
#else
inline void begin_launch(const char*, Range, Range) {}
inline void access(const void*, int, bool, bool, const void*) {}
inline void flush() {}
inline void pause(bool) {}
#endif

bool in_kernel();
Me me();

}  // namespace emulation::races
