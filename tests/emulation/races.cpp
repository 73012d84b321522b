// The race detector of races.h: a hash table from 8-byte words to the last accesses of each byte.
#include "races.h"

#if defined(SK_RACES)
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <string>
#include <vector>

namespace emulation {
[[noreturn]] void fail(const std::string& what);
}

namespace emulation::races {
namespace {

constexpr uint32_t kAtomic = 0x80000000u;

struct Access {
  uint32_t thread;  // 0: none; with kAtomic
  uint64_t epoch;
  const void* from;
};
struct Byte {
  Access write, read, other_read;
};
struct Cell {
  uintptr_t key = 0;
  uint64_t launch = 0;
  Byte byte[8];
};

std::vector<Cell> table(1 << 16);
size_t used = 0;
uint64_t launch = 0;
const char* name = "";
Range stacks_, shared_;
// The linker may keep instrumented copies of std:: functions that this file uses.
bool inside = false;

// Two writes are a race only if the second changes the value.
struct {
  bool set = false;
  const void* at;
  int bytes;
  unsigned char was[16];
  std::string what;
} pending;

Cell& cell_of(uintptr_t key) {
  if (2 * used > table.size()) {
    std::vector<Cell> old(2 * table.size());
    old.swap(table);
    used = 0;
    for (const Cell& c : old) {
      if (c.launch == launch) cell_of(c.key) = c;
    }
  }
  size_t at = (key * 0x9E3779B97F4A7C15ull >> 20) & (table.size() - 1);
  for (;; at = (at + 1) & (table.size() - 1)) {
    Cell& c = table[at];
    if (c.launch == launch && c.key == key) return c;
    if (c.launch != launch) {
      c = Cell{};
      c.key = key;
      c.launch = launch;
      ++used;
      return c;
    }
  }
}

bool conflict(const Access& a, uint32_t thread, uint64_t epoch, bool shared) {
  const uint32_t t = a.thread & ~kAtomic, u = thread & ~kAtomic;
  if (t == 0 || t == u) return false;
  if ((a.thread & kAtomic) && (thread & kAtomic)) return false;
  if (a.epoch >> 32 != epoch >> 32) return false;
  const bool same_block = (t - 1) / 1024 == (u - 1) / 1024;
  if (!same_block) return !shared;
  if (a.epoch >> 16 != epoch >> 16) return false;
  const bool same_warp = (t - 1) / 32 == (u - 1) / 32;
  return !(same_warp && a.epoch != epoch);
}

std::string where(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info) || info.dli_fbase == nullptr) return "?";
  char text[64];
  const size_t offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase);
  snprintf(text, sizeof text, "+0x%zx", offset - 1);  // for addr2line
  return text;
}

std::string tell(const char* kind, const void* p, const Access& a, uint32_t thread,
                 const void* from) {
  const uint32_t t = (a.thread & ~kAtomic) - 1, u = (thread & ~kAtomic) - 1;
  const bool shared = shared_.has(reinterpret_cast<uintptr_t>(p));
  char text[512];
  snprintf(text, sizeof text,
           "race in %s: %s of %s memory %p: thread %u of the %u-th block at %s, then thread %u of "
           "the %u-th block at %s",
           name, kind, shared ? "shared" : "global", p, t % 1024, t / 1024, where(a.from).c_str(),
           u % 1024, u / 1024, where(from).c_str());
  return text;
}

void found(const std::string& what) {
  inside = false;
  fail(what);
}

}  // namespace

void begin_launch(const char* kernel, Range stacks, Range shared) {
  ++launch;
  used = 0;
  name = kernel;
  stacks_ = stacks;
  shared_ = shared;
  pending.set = false;
}

void pause(bool on) { inside = on; }

void flush() {
  if (!pending.set || inside) return;
  pending.set = false;
  if (memcmp(pending.at, pending.was, size_t(pending.bytes)) != 0) found(pending.what);
}

void access(const void* p, int bytes, bool write, bool atomic, const void* from) {
  if (inside || !in_kernel()) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (stacks_.has(at)) return;
  flush();
  inside = true;
  const bool shared = shared_.has(at);
  const Me who = me();
  const Access now{who.thread | (atomic ? kAtomic : 0), who.epoch, from};
  for (int i = 0; i < bytes; ++i) {
    const uintptr_t b = at + i;
    Byte& byte = cell_of(b >> 3).byte[b & 7];
    if (conflict(byte.write, now.thread, now.epoch, shared)) {
      if (!write) found(tell("a read after a write", p, byte.write, now.thread, from));
      if (!pending.set) {
        pending.set = true;
        pending.at = p;
        pending.bytes = bytes > 16 ? 16 : bytes;
        memcpy(pending.was, p, size_t(pending.bytes));
        pending.what = tell("two writes", p, byte.write, now.thread, from);
      }
    }
    if (write) {
      for (const Access& r : {byte.read, byte.other_read}) {
        if (conflict(r, now.thread, now.epoch, shared))
          found(tell("a write after a read", p, r, now.thread, from));
      }
      byte.write = now;
    } else {
      if ((byte.read.thread & ~kAtomic) != who.thread) byte.other_read = byte.read;
      byte.read = now;
    }
  }
  inside = false;
}

}  // namespace emulation::races

// The hooks that the compiler calls.
#define SK_HOOK(name, bytes, write, atomic)                                         \
  void __tsan_##name(void* p) {                                                     \
    emulation::races::access(p, bytes, write, atomic, __builtin_return_address(0)); \
  }
#define SK_HOOKS(n)                           \
  SK_HOOK(read##n, n, false, false)           \
  SK_HOOK(write##n, n, true, false)           \
  SK_HOOK(volatile_read##n, n, false, true)   \
  SK_HOOK(volatile_write##n, n, true, true)   \
  SK_HOOK(unaligned_read##n, n, false, false) \
  SK_HOOK(unaligned_write##n, n, true, false)
extern "C" {
SK_HOOKS(1)
SK_HOOKS(2)
SK_HOOKS(4)
SK_HOOKS(8)
SK_HOOKS(16)
void __tsan_read_range(void* p, unsigned long n) {
  emulation::races::access(p, int(n), false, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long n) {
  emulation::races::access(p, int(n), true, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
// Atomics of the emulation itself; cuda.h reports those of kernels.
unsigned __tsan_atomic32_load(const unsigned* p, int) { return *p; }
void __tsan_atomic32_store(unsigned* p, unsigned v, int) { *p = v; }
unsigned long long __tsan_atomic64_load(const unsigned long long* p, int) { return *p; }
void __tsan_atomic64_store(unsigned long long* p, unsigned long long v, int) { *p = v; }
unsigned char __tsan_atomic8_load(const unsigned char* p, int) { return *p; }
}
#endif
