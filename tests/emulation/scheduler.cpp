// Runs kernel launches: a fiber a CUDA thread, one block after another (all blocks of a cooperative
// launch together), in an order drawn from SK_EMULATION_SEED (0: ascending). Implements barriers,
// shuffles, shared memory, and the checks of a launch.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <map>
#include <memory>
#include <mutex>

#include "cuda.h"
#include "races.h"
#undef __CUDACC__
#undef __CUDA_ARCH__

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Switches stacks. SK_UCONTEXT: the other processors' way, for a test.
#if defined(__x86_64__) && !defined(SK_UCONTEXT)
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
extern "C" void emulation_switch(void** from, void* to);

struct Context {
  void* sp = nullptr;
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    sp = top - 8;
  }
  static void change(Context& from, const Context& to) { emulation_switch(&from.sp, to.sp); }
};
#else
#include <ucontext.h>
struct Context {
  ucontext_t context{};
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, const Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

namespace emulation {

uint3 thread_idx, block_idx;
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr int kFibers = 4096;
constexpr size_t kDefaultShared = 48 << 10;
constexpr size_t kCanary = 64;
constexpr size_t kShared = 16 << 20;     // of all blocks that run together
constexpr unsigned char kSpoilt = 0xFF;  // initial bytes of shared memory: NaN as floats
constexpr unsigned char kGap = 0xC5;

enum class State { kNew, kReady, kBarrier, kGrid, kShuffle, kDone };

struct Fiber {
  Context context;
  char* stack = nullptr;
  bool prepared = false;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
#endif
};

struct Block;

struct Thread {
  Block* block = nullptr;
  Fiber* fiber = nullptr;
  int index = 0;
  uint3 place{};
  State state = State::kNew;
  unsigned mask = 0;  // of the shuffle in which it waits
  const char* what = "";
  int source = 0, bytes = 0;
  unsigned char given[16], taken[16];
  int warp_syncs = 0;
};

// A __shared__ variable or the dynamic array, with a guard gap on either side.
struct Variable {
  const char* key;
  unsigned char* at;
  size_t bytes;
};

// Lanes that wait in a shuffle, and lanes that have exited or never existed.
struct Warp {
  unsigned waiting = 0, done = 0;
};

struct Block {
  uint3 place{};
  uint64_t number = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Variable> variables;
  size_t shared_bytes = 0;
  int barriers = 0, waiting = 0, done = 0;
};

std::mutex one_launch;
std::vector<Block*> resident;
std::vector<Thread*> ready;
Thread* current = nullptr;
uint64_t grid_syncs = 0;
int grid_waiting = 0;
bool cooperative = false;
size_t dynamic_bytes = 0;
const std::function<void()>* body = nullptr;
std::string kernel;
std::string failure;
Context scheduler;
char* stacks = nullptr;
std::unique_ptr<unsigned char[]> shared(new unsigned char[kShared]);
size_t shared_used = 0;
std::vector<Fiber> fibers;
std::vector<Fiber*> idle;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake = nullptr;
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
#endif

thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;
// The device and stream that Python announced (emulation_expect).
cudaStream_t expected_stream = nullptr;
int expected_device = 0;
bool expecting = false, capturing = false, can_cooperate = true;

struct Count {
  uint64_t launches = 0, blocks = 0;
};
std::map<std::string, Count>& counts() {
  static std::map<std::string, Count> all;
  return all;
}

uint64_t random_state = [] {
  const char* text = getenv("SK_EMULATION_SEED");
  return text != nullptr && *text ? strtoull(text, nullptr, 10) : 1;
}();

uint64_t next_random() {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return random_state * 0x2545F4914F6CDD1Dull;
}

template <class It>
void mix(It first, It last) {
  if (random_state == 0) return;
  for (size_t i = size_t(last - first); i > 1; --i)
    std::swap(first[i - 1], first[next_random() % i]);
}

void make_fibers() {
  if (stacks != nullptr) return;
  void* memory = mmap(nullptr, kFibers * kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulated CUDA: no memory for stacks");
  stacks = static_cast<char*>(memory);
  fibers.resize(kFibers);
  for (int i = kFibers - 1; i >= 0; --i) {
    fibers[i].stack = stacks + size_t(i) * kStack;
    idle.push_back(&fibers[i]);
  }
}

void start(Thread& t) {
  current = &t;
  thread_idx = t.place;
  block_idx = t.block->place;
}

void leave(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.fake, scheduler_bottom, scheduler_size);
#endif
  Context::change(fiber.context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake, &scheduler_bottom, &scheduler_size);
#endif
}

std::string place_of(const Thread& t) {
  return kernel + ", block " + std::to_string(t.block->place.x) + ", thread " +
         std::to_string(t.index);
}

// Marks the threads of `ready` from `first` on, which waited, as ready.
void make_ready(size_t first) {
  mix(ready.begin() + long(first), ready.end());
  for (size_t i = first; i < ready.size(); ++i) ready[i]->state = State::kReady;
}

// Releases the shuffle in which `t` waits, if all lanes of its mask that have not exited wait
// there.
void release_shuffle(Thread& t) {
  Warp& warp = t.block->warps[t.index / 32];
  unsigned taking = t.mask & ~warp.done;
  if ((taking & ~warp.waiting) != 0) return;
  Thread* const lanes = &t.block->threads[t.index / 32 * 32];
  for (unsigned rest = taking; rest != 0; rest &= rest - 1) {
    const Thread& o = lanes[__builtin_ctz(rest)];
    if (o.mask != t.mask || strcmp(o.what, t.what) != 0) return;
  }
  const bool is_sync = strcmp(t.what, "__syncwarp") == 0;
  const size_t first = ready.size();
  for (unsigned rest = taking; rest != 0; rest &= rest - 1) {
    Thread& o = lanes[__builtin_ctz(rest)];
    if (o.source < 0 || o.source >= 32 || (taking >> o.source & 1) == 0) {
      fail(std::string(o.what) + " by thread " + std::to_string(o.index) + " reads lane " +
           std::to_string(o.source) + ", which does not take part");
    }
    memcpy(o.taken, lanes[o.source].given, size_t(o.bytes));
    o.warp_syncs += is_sync;
    ready.push_back(&o);
  }
  warp.waiting &= ~taking;
  make_ready(first);
}

// Releases the block's barrier if all its threads wait there or have exited (Volta's rule), and the
// grid's if all threads wait there.
void release_barriers(Block& block) {
  const auto release = [](Block& b, State state) {
    const size_t first = ready.size();
    for (Thread& t : b.threads) {
      if (t.state == state) ready.push_back(&t);
    }
    make_ready(first);
  };
  if (block.waiting > 0 && block.waiting + block.done == int(block.threads.size())) {
    ++block.barriers;
    block.waiting = 0;
    release(block, State::kBarrier);
  }
  if (grid_waiting > 0 && size_t(grid_waiting) == resident.size() * block.threads.size()) {
    ++grid_syncs;
    grid_waiting = 0;
    for (Block* b : resident) release(*b, State::kGrid);
  }
}

// Runs new threads on one fiber, until one waits.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  for (;;) {
    Thread& me = *current;
    Fiber& fiber = *me.fiber;
    (*body)();
    races::flush();
    me.state = State::kDone;
    me.fiber = nullptr;
    ++me.block->done;
    Warp& warp = me.block->warps[me.index / 32];
    warp.done |= 1u << me.index % 32;
    // The other lanes may have waited for this thread.
    for (unsigned rest = warp.waiting; rest != 0; rest &= rest - 1) {
      Thread& t = me.block->threads[me.index / 32 * 32 + __builtin_ctz(rest)];
      if (t.state == State::kShuffle) release_shuffle(t);
    }
    release_barriers(*me.block);
    if (!ready.empty() && ready.back()->state == State::kNew) {
      Thread& next = *ready.back();
      ready.pop_back();
      next.fiber = &fiber;
      start(next);
      continue;
    }
    idle.push_back(&fiber);
    leave(fiber);
  }
}

void resume(Thread& t) {
  start(t);
  if (t.fiber == nullptr) {
    t.fiber = idle.back();
    idle.pop_back();
  }
  Fiber& fiber = *t.fiber;
  if (!fiber.prepared) {
    mprotect(fiber.stack, kGuard, PROT_NONE);
    fiber.context.prepare(fiber.stack, kStack, fiber_main);
    fiber.prepared = true;
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, kStack);
#endif
  Context::change(scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  current = nullptr;
}

// After a failure no fiber can be resumed.
[[noreturn]] void give_up(const std::string& what) {
  idle.clear();
  for (int i = kFibers - 1; i >= 0; --i) {
#if defined(__SANITIZE_ADDRESS__)
    if (fibers[i].prepared)
      __asan_unpoison_memory_region(fibers[i].stack + kGuard, kStack - kGuard);
#endif
    fibers[i].prepared = false;
    idle.push_back(&fibers[i]);
  }
  ready.clear();
  resident.clear();
  throw std::runtime_error("emulated CUDA: " + what);
}

void run_until_idle() {
  while (!ready.empty()) {
    Thread& t = *ready.back();
    ready.pop_back();
    resume(t);
    if (!failure.empty()) give_up(std::exchange(failure, {}));
  }
  std::string what;
  for (const Block* b : resident) {
    if (b->done == int(b->threads.size())) continue;
    what += ", block " + std::to_string(b->place.x) + ": " + std::to_string(b->done) +
            " threads are done, " + std::to_string(b->waiting) + " wait in __syncthreads";
    int shown = 0;
    for (const Thread& t : b->threads) {
      if (t.state != State::kShuffle || shown++ > 3) continue;
      char text[96];
      snprintf(text, sizeof text, "; thread %d waits in %s with mask %08X", t.index, t.what,
               t.mask);
      what += text;
    }
  }
  if (!what.empty()) give_up("deadlock in " + kernel + what);
  for (const Block* b : resident) {
    for (const Variable& v : b->variables) {
#if !defined(__SANITIZE_ADDRESS__)
      for (size_t i = 0; i < kCanary; ++i) {
        if (v.at[-1 - int64_t(i)] != kGap || v.at[v.bytes + i] != kGap)
          give_up(std::string("a write outside the shared memory ") + v.key + " in " + kernel);
      }
#endif
      (void)v;
    }
  }
}

// `bytes` of the block's shared memory, aligned to `alignment` and to no more.
void* add_variable(Block& block, const char* key, size_t bytes, size_t alignment) {
  const size_t twice = 2 * alignment;
  const auto base = reinterpret_cast<uintptr_t>(shared.get());
  const uintptr_t at = (base + shared_used + kCanary + twice) / twice * twice + alignment;
  const size_t end = at + bytes + kCanary - base;
  if (end > kShared) fail("too much shared memory together");
  unsigned char* const from = shared.get() + shared_used;
  const Variable v{key, reinterpret_cast<unsigned char*>(at), bytes};
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(v.at, bytes);
#else
  memset(from, kGap, end - shared_used);
#endif
  (void)from;
  memset(v.at, kSpoilt, bytes);
  shared_used = end;
  block.variables.push_back(v);
  return v.at;
}

void free_shared() {
  shared_used = 0;
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(shared.get(), kShared);
#endif
}

void set_up(Block& block, uint32_t number) {
  block.place = {number % grid_dim.x, number / grid_dim.x % grid_dim.y,
                 number / grid_dim.x / grid_dim.y};
  block.barriers = block.waiting = block.done = 0;
  block.shared_bytes = dynamic_bytes;
  block.variables.clear();
  if (dynamic_bytes > 0) add_variable(block, "(dynamic)", dynamic_bytes, 16);
  const size_t count = size_t(block_dim.x) * block_dim.y * block_dim.z;
  block.threads.resize(count);
  block.warps.assign((count + 31) / 32, {});
  if (count % 32 != 0) block.warps.back().done = ~0u << count % 32;
  for (size_t i = count; i-- > 0;) {
    Thread& t = block.threads[i];
    t.block = &block;
    t.index = int(i);
    t.place = {unsigned(i % block_dim.x), unsigned(i / block_dim.x % block_dim.y),
               unsigned(i / block_dim.x / block_dim.y)};
    t.state = State::kNew;
    t.warp_syncs = 0;
    ready.push_back(&t);
  }
}

cudaError_t bad_launch(const Launch& l) {
  const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || threads == 0 || threads > 1024 ||
      l.block.z > 64 || l.grid.x > 0x7FFFFFFFu || l.grid.y > 65535 || l.grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (l.shared > kDefaultShared) return cudaErrorInvalidValue;
  const uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  if (l.cooperative && blocks * threads > kFibers) return cudaErrorCooperativeLaunchTooLarge;
  return cudaSuccess;
}

}  // namespace

bool known(const char* type) {
  counts()[type];
  return true;
}

void check_stream(cudaStream_t stream, const char* what) {
  if (!expecting) return;
  if (stream != expected_stream) fail(std::string(what) + " on another stream than Python's");
  if (device != expected_device) fail(std::string(what) + " on another device than Python's");
}

void run(const Launch& l, const char* name, const char* type, size_t parameter_bytes,
         const std::function<void()>& function) {
  const std::lock_guard<std::mutex> lock(one_launch);
  kernel = name;
  check_stream(l.stream, kernel.c_str());
  if (parameter_bytes > 4096) fail(kernel + ": parameters above 4096 bytes");
  if (const cudaError_t error = bad_launch(l)) {
    last_error = error;
    return;
  }
  make_fibers();
  body = &function;
  grid_dim = l.grid;
  block_dim = l.block;
  dynamic_bytes = l.shared;
  cooperative = l.cooperative;
  grid_syncs = 0;
  grid_waiting = 0;
  const auto begin = reinterpret_cast<uintptr_t>(stacks);
  const auto memory = reinterpret_cast<uintptr_t>(shared.get());
  races::begin_launch(kernel.c_str(), {begin, begin + kFibers * kStack},
                      {memory, memory + kShared});
  std::vector<uint32_t> numbers(size_t(l.grid.x) * l.grid.y * l.grid.z);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = uint32_t(i);
  mix(numbers.begin(), numbers.end());
  Count& count = counts()[type];
  ++count.launches;
  count.blocks = std::max<uint64_t>(count.blocks, numbers.size());
  std::vector<Block> blocks(cooperative ? numbers.size() : 1);
  resident.clear();
  ready.clear();
  for (Block& b : blocks) resident.push_back(&b);
  for (size_t i = 0; i < numbers.size(); ++i) {
    Block& block = blocks[cooperative ? i : 0];
    block.number = i;
    if (i == 0 || !cooperative) free_shared();
    set_up(block, numbers[i]);
    if (cooperative && i + 1 < numbers.size()) continue;
    mix(ready.begin(), ready.end());
    run_until_idle();
  }
  resident.clear();
}

void* dynamic_shared() {
  if (dynamic_bytes == 0) fail("a dynamic shared array of 0 bytes");
  return current->block->variables.front().at;
}

void* static_shared(const char* key, size_t bytes, size_t alignment) {
  Block& block = *current->block;
  for (const Variable& v : block.variables) {
    if (strcmp(v.key, key) == 0) return v.at;
  }
  block.shared_bytes = (block.shared_bytes + alignment - 1) / alignment * alignment + bytes;
  if (block.shared_bytes > kDefaultShared)
    fail("shared memory above 48 KB: " + std::to_string(block.shared_bytes));
  return add_variable(block, key, bytes, alignment);
}

void wait(State state) {
  races::flush();
  Thread& me = *current;
  me.state = state;
  if (state == State::kShuffle) {
    me.block->warps[me.index / 32].waiting |= 1u << me.index % 32;
    release_shuffle(me);
  } else {
    release_barriers(*me.block);
  }
  leave(*me.fiber);
}

void sync_threads() {
  ++current->block->waiting;
  wait(State::kBarrier);
}

void sync_grid() {
  if (!cooperative) fail("a barrier of the grid in a launch that is not cooperative");
  ++grid_waiting;
  wait(State::kGrid);
}

void shuffle(unsigned mask, void* value, int bytes, int source, const char* what) {
  Thread& me = *current;
  if ((mask >> (me.index % 32) & 1) == 0)
    fail(std::string(what) + " by a thread that its mask leaves out");
  if (bytes > int(sizeof me.given)) fail(std::string(what) + " of too large a value");
  memcpy(me.given, value, size_t(bytes));
  me.mask = mask, me.source = source, me.bytes = bytes, me.what = what;
  wait(State::kShuffle);
  memcpy(value, me.taken, size_t(bytes));
}

void fail(const std::string& what) {
  if (current == nullptr) throw std::runtime_error("emulated CUDA: " + what);
  failure = what + " (" + place_of(*current) + ")";
  leave(*current->fiber);
  abort();
}

void atomic_begin(const void* at, int bytes) {
  races::access(at, bytes, true, true, __builtin_return_address(0));
}

void pause_races(bool on) { races::pause(on); }

namespace races {
bool in_kernel() { return current != nullptr; }
Me me() {
  const Block& b = *current->block;
  return {uint32_t(b.number * 1024 + unsigned(current->index) + 1),
          grid_syncs << 32 | uint64_t(b.barriers & 0xFFFF) << 16 | (current->warp_syncs & 0xFFFF)};
}
}  // namespace races

}  // namespace emulation

using namespace emulation;

const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
  }
  return "unknown error";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaGetDevice(int* to) {
  *to = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) {
  if (index < 0 || index > 7) return cudaErrorInvalidDevice;
  device = index;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : int(can_cooperate);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  check_stream(stream, "cudaMemsetAsync");
  memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

static cudaError_t unless_capturing() {
  return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return unless_capturing(); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return unless_capturing(); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  if (const cudaError_t error = unless_capturing()) return error;
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** to, size_t bytes) {
  if (const cudaError_t error = unless_capturing()) return error;
  *to = malloc(bytes);
  return cudaSuccess;
}

// Called by tests through ctypes (__init__.py).
#define SK_EXPORT extern "C" __attribute__((visibility("default")))

// From now on every launch must use this device and stream.
SK_EXPORT void emulation_expect(int index, void* stream) {
  expecting = true;
  expected_device = index;
  expected_stream = static_cast<cudaStream_t>(stream);
}
SK_EXPORT void emulation_capture(int on) { capturing = on != 0; }
SK_EXPORT void emulation_cooperative(int on) { can_cooperate = on != 0; }
// Appends "launches, most blocks, type" for every kernel instance of the module.
SK_EXPORT int emulation_count(const char* path) {
  FILE* to = fopen(path, "a");
  if (to == nullptr) return 1;
  for (const auto& [name, n] : counts()) {
    fprintf(to, "%llu\t%llu\t%s\n", static_cast<unsigned long long>(n.launches),
            static_cast<unsigned long long>(n.blocks), name.c_str());
  }
  return fclose(to);
}
