// argmax of upsampled logits on the CPU, compiled once per instruction set (SK_ISA). Parallel over
// rows of pixels, in blocks of pixels whose classes stay in cache.
#include <math.h>

#include "interpolate/logit_blocks.h"
#include "upsample_argmax/upsample_argmax.h"

namespace segkernels {
inline namespace SK_ISA {

template <class A>
void best_of(const A* block, int32_t classes, A* best, int32_t* label) {
  constexpr int64_t kBlock = LogitTables<A>::kPixelBlock;
  for (int64_t i = 0; i < kBlock; ++i) {
    best[i] = block[i];
    label[i] = 0;
  }
  for (int32_t c = 1; c < classes; ++c) {
    const A* value = block + c * kBlock;
#pragma GCC ivdep
    for (int64_t i = 0; i < kBlock; ++i) {
      const bool wins = (value[i] > best[i]) | ((value[i] != value[i]) & (best[i] == best[i]));
      best[i] = wins ? value[i] : best[i];
      label[i] = wins ? c : label[i];
    }
  }
}

template <class A>
void confidence_of(const A* block, int32_t classes, const A* best, A* out) {
  constexpr int64_t kBlock = LogitTables<A>::kPixelBlock;
  A sum[kBlock] = {};
  for (int32_t c = 0; c < classes; ++c) {
    const A* value = block + c * kBlock;
#pragma GCC ivdep
    for (int64_t i = 0; i < kBlock; ++i) sum[i] += exp_fast(value[i] - best[i]);
  }
  for (int64_t i = 0; i < kBlock; ++i) out[i] = is_finite(best[i]) ? A(1) / sum[i] : A(NAN);
}

template <class A>
void argmax_rows(const Where& where, const LogitTables<A>& t, const ArgmaxCall& call) {
  constexpr int64_t kBlock = LogitTables<A>::kPixelBlock;
  parallel_chunks(where, t.batch * t.y.out, [&](int worker, Pieces& pieces) {
    LogitBlocks<A> source(t, worker);
    A best[kBlock], confidence[kBlock];
    int32_t label[kBlock];
    while (pieces.next()) {
      for (int64_t row = pieces.begin; row < pieces.end; ++row) {
        source.move_to(row / t.y.out, int32_t(row % t.y.out));
        for (int64_t x = 0; x < t.x.out; x += kBlock) {
          const A* block = source.block(x);
          const int64_t n = t.x.out - x < kBlock ? t.x.out - x : kBlock;
          best_of(block, t.classes, best, label);
          for (int64_t i = 0; i < n; ++i)
            store_label(call.labels, call.label_type, row * t.x.out + x + i, label[i]);
          if (call.confidence == nullptr) continue;
          confidence_of(block, t.classes, best, confidence);
          A* out = static_cast<A*>(call.confidence) + row * t.x.out + x;
          for (int64_t i = 0; i < n; ++i) out[i] = confidence[i];
        }
      }
    }
  });
}

}  // namespace SK_ISA

template <Isa kIsa, class A>
void upsample_argmax(const Where& where, const ArgmaxCall& call, const LogitTables<A>& tables) {
  argmax_rows(where, tables, call);
}

template void upsample_argmax<Isa::SK_ISA>(const Where&, const ArgmaxCall&,
                                           const LogitTables<float>&);
template void upsample_argmax<Isa::SK_ISA>(const Where&, const ArgmaxCall&,
                                           const LogitTables<double>&);

}  // namespace segkernels
