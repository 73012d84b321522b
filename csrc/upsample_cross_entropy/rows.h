// The CPU's loops of the losses, and what they work in.
#pragma once

#include "common/simd.h"
#include "interpolate/logit_rows.h"
#include "upsample_cross_entropy/upsample_cross_entropy.h"

namespace segkernels {

template <class T>
struct LossPlan {
  using A = Acc<T>;
  LogitPlan<T> logits;
  ReaderTable<A> x_readers;
  int32_t* y_end;    // [in height]: the output after the last that reads a row
  int32_t* y_begin;  // [in height]: the first that does
  A* sums;           // [threads, taps, classes, row_stride]
  double* partial;   // [batch * out height, 2]

  void take(Arena& arena, int threads, bool backward) {
    logits.take(arena, threads);
    const Logits<T>& l = logits.logits;
    if (backward) {
      x_readers.take(arena, l.x, logits.taps);
      y_end = arena.take<int32_t>(l.y.in);
      y_begin = arena.take<int32_t>(l.y.in);
      sums = arena.take<A>(threads * logits.rows_stride());
    } else {
      partial = arena.take<double>(2 * l.batch * l.y.out);
    }
  }
};

// The loops, defined in upsample_cross_entropy.simd.cpp for its instruction set.
template <Isa kIsa, class T>
struct LossRows {
  static void forward(const Where&, const LossCall&, const LossOutputs&, const LossPlan<T>&);
  static void backward(const Where&, const LossCall&, const LossGradient&, const LossPlan<T>&);
};

}  // namespace segkernels
