// The CPU's loops of the losses, one copy an instruction set.
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

struct LossRows {
  void (*forward)(const Where&, const LossCall&, const LossOutputs&, const void* plan);
  void (*backward)(const Where&, const LossCall&, const LossGradient&, const void* plan);
};

namespace isa_base {
const LossRows& upsample_loss_rows();
}
#if defined(SK_HAVE_X86_ISAS)
namespace isa_avx2 {
const LossRows& upsample_loss_rows();
}
namespace isa_avx512 {
const LossRows& upsample_loss_rows();
}
#endif

}  // namespace segkernels
