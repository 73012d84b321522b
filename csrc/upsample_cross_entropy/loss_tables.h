// Tables of taps and scratch memory of the losses' CPU loops, and the loops' declarations.
#pragma once

#include "common/simd.h"
#include "interpolate/logit_blocks.h"
#include "upsample_cross_entropy/upsample_cross_entropy.h"

namespace segkernels {

template <class A>
struct LossTables {
  LogitTables<A> logits;
  ReaderTable<A> x_readers;
  int32_t* y_end;    // [in height]: one past the last output row that reads a row
  int32_t* y_begin;  // [in height]: the first output row that does
  A* sums;           // [workers, taps, classes, row_stride]
  double* partial;   // [batch * out height, 2]

  explicit LossTables(const LossCall& call) : logits(call) {}

  void allocate(Arena& arena, int threads, bool backward) {
    logits.allocate(arena, threads);
    if (backward) {
      x_readers.allocate(arena, logits.x, logits.taps);
      y_end = arena.allocate<int32_t>(logits.y.in);
      y_begin = arena.allocate<int32_t>(logits.y.in);
      sums = arena.allocate<A>(threads * logits.rows_stride());
    } else {
      partial = arena.allocate<double>(2 * logits.batch * logits.y.out);
    }
  }
};

// Defined in upsample_cross_entropy.simd.cpp.
template <Isa kIsa, class A>
struct LossLoops {
  static void forward(const Where&, const LossCall&, const LossOutputs&, const LossTables<A>&);
  static void backward(const Where&, const LossCall&, const LossGradient&, const LossTables<A>&);
};

}  // namespace segkernels
