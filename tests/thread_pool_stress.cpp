// Stress test of csrc/common/thread_pool.cpp, built by .ci/sanitize with ThreadSanitizer: callers
// at the same time run loops of many sizes; every item must run once, workers must be distinct.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "common/thread_pool.h"

namespace {

using segkernels::Pieces;

constexpr int kThreads = 5;

struct Work {
  std::vector<int> runs;  // of each item; plain, so that the sanitizer sees accesses by two threads
  std::atomic<bool> taken[kThreads];  // whether a thread has this worker
  int spin;
};

void check(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "failed: %s\n", what);
  abort();
}

void run(const void* context, int worker, Pieces& pieces) noexcept {
  Work& work = *const_cast<Work*>(static_cast<const Work*>(context));
  check(0 <= worker && worker < kThreads, "worker in range");
  check(!work.taken[worker].exchange(true), "workers are distinct");
  while (pieces.next()) {
    for (int64_t i = pieces.begin; i < pieces.end; ++i) {
      ++work.runs[i];
      for (volatile int k = 0; k < work.spin; ++k) continue;
    }
  }
  work.taken[worker] = false;
}

void call(int seed, int loops) {
  unsigned state = unsigned(seed) * 7919 + 1;
  const auto random = [&](int most) {
    return int((state = state * 1103515245 + 12345) >> 8) % most;
  };
  for (int n = 0; n < loops; ++n) {
    Work work{};
    work.runs.assign(1 + random(300), 0);
    work.spin = random(3) == 0 ? 2000 : 0;
    const int64_t items = int64_t(work.runs.size());
    const int64_t pieces = 1 + random(int(items));
    segkernels::run_loop({run, &work, items, pieces, 1 + random(kThreads), random(2) == 0});
    check(std::count(work.runs.begin(), work.runs.end(), 1) == items, "every item runs once");
    if (random(20) == 0) std::this_thread::sleep_for(std::chrono::microseconds(random(500)));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int loops = argc > 1 ? atoi(argv[1]) : 300;
  for (int callers : {1, 3, 40}) {  // 40: more than the pool has places for
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i) threads.emplace_back(call, i, loops);
    for (std::thread& thread : threads) thread.join();
    printf("%d callers, %d loops each: every item ran once\n", callers, loops);
  }
}
