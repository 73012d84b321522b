// A thread pool for loops whose speed must not depend on other processes.
//
// The caller of a loop works on it from the start, and does all of it if no one else comes. Helpers
// may join, from the start or once the time of the first pieces shows that it pays, as long as
// there is work: a helper that the system does not schedule costs nothing, unless it has taken a
// piece. Each thread has a share of the pieces, neighbours in memory, which it takes from the
// front; a thread without work takes pieces from the back of the shares of others. So the shares
// stay in the caches of the same threads from one loop to the next, and uneven work is balanced.
//
// A helper without work, and a caller whose last pieces are still with helpers, spin shortly and
// then sleep. After a long wait a thread spins half as long the next time, after a short one as
// long as ever: on a busy machine, where the other thread often does not run, threads sleep at
// once.
//
// Helpers start with the first loop that asks for them, serve the loops of all calling threads, and
// are never joined: they sleep until the process ends, and die with it at any time. They keep the
// affinity of the thread that started them. A forked child starts with no helpers and an empty
// pool.
#include "common/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace segkernels {
namespace {

constexpr int kMostThreads = 256;  // of a loop
// Loops at the same time that helpers can join. The callers of more loops work alone.
constexpr int kMostLoops = 32;

using Clock = std::chrono::steady_clock;

// If the rest of a loop takes less on one thread, it does not pay to wake another.
constexpr Clock::duration kShort = std::chrono::microseconds(40);

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Waits: spins while the last wait would have been over soon, then sleeps.
class Patience {
 public:
  // `sleep` returns when done() is true.
  template <class Done, class Sleep>
  void wait(const Done& done, const Sleep& sleep) {
    if (done()) return;
    const auto start = Clock::now();
    if (!spin(done, start + budget_)) sleep();
    // Including the time to wake.
    const bool was_short = Clock::now() - start < 2 * kMost;
    budget_ = was_short ? kMost : budget_ > 2 * kLeast ? budget_ / 2 : kLeast;
  }

 private:
  template <class Done>
  static bool spin(const Done& done, Clock::time_point end) {
    do {
      for (int i = 0; i < 8; ++i) {
        pause();
        if (done()) return true;
      }
    } while (Clock::now() < end);
    return false;
  }

  static constexpr Clock::duration kMost = std::chrono::microseconds(200);
  static constexpr Clock::duration kLeast = std::chrono::microseconds(2);
  Clock::duration budget_ = kMost;
};

// A thread's pieces that are not yet taken: [begin, end), packed into one word.
struct alignas(64) Share {
  std::atomic<uint64_t> range{0};

  void set(uint32_t begin, uint32_t end) {
    range.store(uint64_t(begin) << 32 | end, std::memory_order_relaxed);
  }

  bool empty() const {
    const uint64_t now = range.load(std::memory_order_relaxed);
    return uint32_t(now >> 32) >= uint32_t(now);
  }

  // The first piece, or the last, or -1.
  int64_t take(bool first) {
    uint64_t now = range.load(std::memory_order_relaxed);
    for (;;) {
      const uint32_t begin = uint32_t(now >> 32), end = uint32_t(now);
      if (begin >= end) return -1;
      const uint64_t rest = first ? now + (uint64_t(1) << 32) : now - 1;
      if (range.compare_exchange_weak(now, rest, std::memory_order_relaxed))
        return first ? begin : end - 1;
    }
  }
};

}  // namespace

// A place for a loop that helpers can join. Only its owner, a caller, fills it.
struct Slot {
  Loop loop;
  int index;
  bool is_open;  // whether helpers can join, for the owner
  Clock::time_point start;
  int64_t done;  // pieces, while it is not open
  int shares;
  Share share[kMostThreads];

  // Helpers inside, and flags. kClosed: no one may join. kAsleep: the owner sleeps until the last
  // helper has left.
  static constexpr uint32_t kClosed = 1u << 31, kAsleep = 1u << 30;
  std::atomic<uint32_t> helpers{kClosed};
  std::atomic<int> workers{0};  // numbers given out

  std::mutex mutex;
  std::condition_variable left;

  bool join() {
    uint32_t now = helpers.load(std::memory_order_relaxed);
    while ((now & kClosed) == 0) {
      if (helpers.compare_exchange_weak(now, now + 1, std::memory_order_acquire,
                                        std::memory_order_relaxed))
        return true;
    }
    return false;
  }

  void leave() {
    const uint32_t before = helpers.fetch_sub(1, std::memory_order_acq_rel);
    if ((before & kAsleep) == 0 || (before & ~(kAsleep | kClosed)) != 1) return;
    std::lock_guard<std::mutex> lock(mutex);
    left.notify_one();
  }

  bool empty() const {
    return (helpers.load(std::memory_order_acquire) & ~(kAsleep | kClosed)) == 0;
  }

  bool has_pieces() const {
    for (int i = 0; i < shares; ++i) {
      if (!share[i].empty()) return true;
    }
    return false;
  }

  int64_t take(int worker) {
    for (int i = 0; i < shares; ++i) {
      const int of = worker + i < shares ? worker + i : worker + i - shares;
      const int64_t piece = share[of].take(i == 0);
      if (piece >= 0) return piece;
    }
    return -1;
  }
};

namespace {

class Pool {
 public:
  void run(const Loop& loop) {
    const int index = reserve();
    if (index < 0) {
      Pieces all(loop.items);
      return loop.run(loop.context, 0, all);
    }
    Slot& slot = slots_[index];
    fill(slot, index, loop);
    if (loop.is_long) {
      open(slot);
    } else {
      slot.start = Clock::now();
    }
    Pieces pieces(&slot, 0);
    loop.run(loop.context, 0, pieces);
    if (slot.is_open) close(slot);
    used_.fetch_and(~(1u << index), std::memory_order_release);
  }

  // After each piece of a loop that is not open: lets helpers join if the rest takes long.
  void open_if_long(Slot& slot) {
    const Clock::duration took = Clock::now() - slot.start;
    const int64_t done = ++slot.done;
    if (took.count() * (slot.loop.pieces - done) >= kShort.count() * done) open(slot);
  }

 private:
  // A slot that no one uses, or -1.
  int reserve() {
    uint32_t used = used_.load(std::memory_order_relaxed);
    while (~used != 0) {
      const int index = __builtin_ctz(~used);
      if (used_.compare_exchange_weak(used, used | 1u << index, std::memory_order_acquire,
                                      std::memory_order_relaxed))
        return index;
    }
    return -1;
  }

  static void fill(Slot& slot, int index, const Loop& loop) {
    slot.loop = loop;
    slot.index = index;
    slot.is_open = false;
    slot.done = 0;
    int64_t shares = loop.threads < kMostThreads ? loop.threads : kMostThreads;
    if (loop.pieces < shares) shares = loop.pieces;
    slot.shares = int(shares);
    for (int64_t i = 0; i < shares; ++i)
      slot.share[i].set(uint32_t(loop.pieces * i / shares),
                        uint32_t(loop.pieces * (i + 1) / shares));
    slot.workers.store(1, std::memory_order_relaxed);
  }

  // Lets helpers join.
  void open(Slot& slot) {
    slot.is_open = true;
    start_helpers(slot.shares - 1);
    slot.helpers.store(0, std::memory_order_release);
    open_.fetch_or(1u << slot.index, std::memory_order_seq_cst);
    wake();
  }

  // Waits for the helpers inside.
  void close(Slot& slot) {
    hide(slot.index);
    slot.helpers.fetch_or(Slot::kClosed, std::memory_order_acq_rel);
    thread_local Patience patience;
    const auto is_empty = [&] { return slot.empty(); };
    patience.wait(is_empty, [&] {
      std::unique_lock<std::mutex> lock(slot.mutex);
      slot.helpers.fetch_or(Slot::kAsleep, std::memory_order_acq_rel);
      slot.left.wait(lock, is_empty);
    });
  }

  void hide(int index) { open_.fetch_and(~(1u << index), std::memory_order_relaxed); }

  void wake() {
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    {
      std::lock_guard<std::mutex> lock(mutex_);
    }
    work_.notify_one();
  }

  void start_helpers(int wanted) {
    if (started_.load(std::memory_order_relaxed) >= wanted) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if (Clock::now() < retry_) return;
    // Signals go to the threads that expect them, except those of a thread's own faults.
    sigset_t others, before;
    sigfillset(&others);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS})
      sigdelset(&others, fault);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    try {
      for (int i = started_.load(std::memory_order_relaxed); i < wanted; ++i) {
        std::thread([this, i] { help(i); }).detach();
        started_.store(i + 1, std::memory_order_relaxed);
      }
    } catch (const std::exception&) {
      // The system has no more threads or memory: those that there are do the work for a while.
      retry_ = Clock::now() + std::chrono::seconds(1);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void help(int number) {
    Patience patience;
    const auto is_open = [&] { return open_.load(std::memory_order_seq_cst) != 0; };
    for (;;) {
      patience.wait(is_open, [&] {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        work_.wait(lock, is_open);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      });
      join_one(number);
    }
  }

  // Helps with one of the open loops.
  void join_one(int number) {
    const uint32_t open = open_.load(std::memory_order_acquire);
    if (open == 0) return;
    // Helpers begin to look in different places.
    const int turn = number % kMostLoops;
    const uint32_t turned = open >> turn | (turn == 0 ? 0 : open << (kMostLoops - turn));
    const int index = (__builtin_ctz(turned) + turn) % kMostLoops;
    Slot& slot = slots_[index];
    if (!slot.join()) return;
    const int worker = slot.workers.fetch_add(1, std::memory_order_relaxed);
    if (worker + 1 >= slot.shares) {
      hide(index);  // all have come
    } else {
      wake();  // two, four, eight, ...
      wake();
    }
    if (worker < slot.shares && slot.has_pieces()) {
      Pieces pieces(&slot, worker);
      slot.loop.run(slot.loop.context, worker, pieces);
    }
    hide(index);  // no piece is left
    slot.leave();
  }

  std::atomic<uint32_t> used_{0};
  alignas(64) std::atomic<uint32_t> open_{0};  // slots that have work and room
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int> started_{0};
  Clock::time_point retry_{};  // when more helpers may be started
  std::mutex mutex_;
  std::condition_variable work_;
  Slot slots_[kMostLoops];
};

std::atomic<Pool*> shared_pool{nullptr};

// A forked child has none of the threads.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { shared_pool.store(nullptr); });

// Never deleted, because helpers use it until the process ends.
Pool& pool() {
  Pool* now = shared_pool.load(std::memory_order_acquire);
  if (now != nullptr) return *now;
  Pool* mine = new Pool;
  if (shared_pool.compare_exchange_strong(now, mine)) return *mine;
  delete mine;
  return *now;
}

}  // namespace

bool Pieces::take() {
  if (worker_ == 0 && !slot_->is_open && end > begin) pool().open_if_long(*slot_);
  const int64_t piece = slot_->take(worker_);
  if (piece < 0) return false;
  const Loop& loop = slot_->loop;
  const int64_t size = loop.items / loop.pieces, more = loop.items % loop.pieces;
  begin = piece * size + (piece < more ? piece : more);
  end = begin + size + (piece < more);
  return true;
}

void run_loop(const Loop& loop) { pool().run(loop); }

}  // namespace segkernels
