// Threads of the CPU code. thread_pool.cpp says how they work.
#pragma once

#include <stdint.h>

#include "common/hd.h"

namespace segkernels {

struct Slot;

// The items of a loop that a thread runs: while (pieces.next()), those in [begin, end). A piece
// often begins where the one before ended.
class Pieces {
 public:
  SK_HD explicit Pieces(int64_t items) : items_(items) {}  // all in one piece
  SK_HD Pieces(Slot* slot, int worker) : slot_(slot), worker_(worker) {}

  int64_t begin = 0, end = 0;

  SK_HD bool next() {
    if (slot_ != nullptr) return take();
    begin = end;
    end = items_;
    return begin < end;
  }

 private:
  bool take();

  Slot* slot_ = nullptr;
  int worker_ = 0;
  int64_t items_ = 0;
};

// A loop over `items`, cut into pieces of equal size, at most kMostPieces.
struct Loop {
  // Runs pieces until there are no more. `worker` is below `threads`; threads inside a loop at the
  // same time have different ones.
  void (*run)(const void* context, int worker, Pieces& pieces) noexcept;
  const void* context;
  int64_t items, pieces;
  int threads;   // at most: the caller and helpers; no more than 256 are used
  bool is_long;  // a piece takes longer than waking a thread: helpers may join from the start
};

constexpr int64_t kMostPieces = 1 << 30;

// Runs a loop on this thread, and on helpers that have time. Returns when all items are done.
void run_loop(const Loop& loop);

}  // namespace segkernels
