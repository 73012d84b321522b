// argmax of upsampled logits on the CPU, compiled once per instruction set: rows of pixels in
// parallel, a block of pixels at a time, its classes in cache.
#include <math.h>

#include "upsample_argmax/rows.h"

namespace segkernels {
inline namespace SK_ISA {

template <class A>
void best_of(const A* block, int32_t classes, A* best, int32_t* label) {
  constexpr int64_t kBlock = LogitPlan<A>::kPixelBlock;
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
  constexpr int64_t kBlock = LogitPlan<A>::kPixelBlock;
  A sum[kBlock] = {};
  for (int32_t c = 0; c < classes; ++c) {
    const A* value = block + c * kBlock;
#pragma GCC ivdep
    for (int64_t i = 0; i < kBlock; ++i) sum[i] += exp_fast(value[i] - best[i]);
  }
  for (int64_t i = 0; i < kBlock; ++i) out[i] = is_finite(best[i]) ? A(1) / sum[i] : A(NAN);
}

template <class T, int K>
void rows(const Where& where, const LogitPlan<T>& plan, const ArgmaxCall& call) {
  using A = Acc<T>;
  constexpr int64_t kBlock = LogitPlan<T>::kPixelBlock;
  const Logits<T>& l = plan.logits;
  parallel_chunks(where, l.batch * l.y.out, [&](int64_t thread, int64_t begin, int64_t end) {
    LogitRows<T, K> source(plan, thread);
    A best[kBlock], confidence[kBlock];
    int32_t label[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      source.move_to(row / l.y.out, int32_t(row % l.y.out));
      for (int64_t x = 0; x < l.x.out; x += kBlock) {
        const A* block = source.block(x);
        const int64_t n = l.x.out - x < kBlock ? l.x.out - x : kBlock;
        best_of(block, l.classes, best, label);
        for (int64_t i = 0; i < n; ++i)
          store_label(call.labels, call.label_type, row * l.x.out + x + i, label[i]);
        if (call.confidence == nullptr) continue;
        confidence_of(block, l.classes, best, confidence);
        A* out = static_cast<A*>(call.confidence) + row * l.x.out + x;
        for (int64_t i = 0; i < n; ++i) out[i] = confidence[i];
      }
    }
  });
}

}  // namespace SK_ISA

template <Isa kIsa, class T>
void ArgmaxRows<kIsa, T>::run(const Where& where, const ArgmaxCall& call,
                              const LogitPlan<T>& plan) {
  with_taps(call.resampling, [&](auto taps) { rows<T, taps.value>(where, plan, call); });
}

template struct ArgmaxRows<Isa::SK_ISA, Half>;
template struct ArgmaxRows<Isa::SK_ISA, BFloat16>;
template struct ArgmaxRows<Isa::SK_ISA, float>;
template struct ArgmaxRows<Isa::SK_ISA, double>;

}  // namespace segkernels
