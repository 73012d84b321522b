// argmax over the classes of upsampled logits, and optionally the softmax probability of the
// maximum: interface and CUDA functor. A thread has a few pixels of a column and loops over the
// classes once.
#pragma once

#include "common/simd.h"
#include "common/where.h"
#include "interpolate/interpolate.h"
#include "interpolate/pixels.h"

namespace segkernels {

enum class LabelType : int { kUint8 = 0, kInt16 = 1, kInt32 = 2, kInt64 = 3 };

struct ArgmaxCall {
  Resampling resampling;  // inner is 1, planes the batch
  int32_t classes;
  Strides strides;
  ScalarType type;
  LabelType label_type;
  const void* logits;
  void* labels;      // [batch, out height, out width]
  void* confidence;  // the same, in the computing type; or null
};

inline namespace SK_NS {

SK_HD void store_label(void* labels, LabelType type, int64_t i, int32_t label) {
  switch (type) {
    case LabelType::kUint8:
      static_cast<uint8_t*>(labels)[i] = uint8_t(label);
      break;
    case LabelType::kInt16:
      static_cast<int16_t*>(labels)[i] = int16_t(label);
      break;
    case LabelType::kInt32:
      static_cast<int32_t*>(labels)[i] = label;
      break;
    case LabelType::kInt64:
      static_cast<int64_t*>(labels)[i] = label;
      break;
  }
}

// The order of torch.argmax: NaN is the largest, and the first of equal values wins.
template <class A>
SK_HD bool beats(A value, A best) {
  return value > best || (value != value && best == best);
}

template <class A>
SK_HD bool is_finite(A x) {
  return x - x == A(0);
}

template <class T, int K, bool kConfidence>
struct Argmax {
  using A = Acc<T>;
  static constexpr int kRows = kPixelRows<K>;
  Logits<T> logits;
  void* labels;
  LabelType label_type;
  A* confidence;

  SK_HD int64_t count() const { return PixelIndex::count(logits, kRows); }

  SK_HD void operator()(int64_t i) const {
    const PixelIndex at(logits, kRows, i);
    const PixelColumn<T, K, kRows> column(logits, at.row, at.column);
    const T* plane = logits.data + at.image * logits.strides.batch;
    A best[kRows], sum[kRows], value[kRows];
    int32_t label[kRows] = {};
    column.read(logits, plane, best);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] = A(1);
    for (int32_t c = 1; c < logits.classes; ++c) {
      plane += logits.strides.channel;
      column.read(logits, plane, value);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool wins = beats(value[r], best[r]);
        if constexpr (kConfidence) {
          const A d = value[r] == best[r] ? A(0) : wins ? best[r] - value[r] : value[r] - best[r];
          const A e = exp_fast(d);
          sum[r] = wins ? sum[r] * e + A(1) : sum[r] + e;
        }
        best[r] = wins ? value[r] : best[r];
        label[r] = wins ? c : label[r];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (at.row + r >= logits.y.out) continue;
      const int64_t pixel = (at.image * logits.y.out + at.row + r) * logits.x.out + at.column;
      store_label(labels, label_type, pixel, label[r]);
      // The softmax of NaN or infinity is NaN, also for one class.
      if constexpr (kConfidence) confidence[pixel] = is_finite(best[r]) ? A(1) / sum[r] : A(NAN);
    }
  }
};

}  // namespace SK_NS

// Defined in upsample_argmax.simd.cpp; the tables are in interpolate/logit_blocks.h.
template <class A>
struct LogitTables;
template <Isa kIsa, class A>
void upsample_argmax(const Where&, const ArgmaxCall&, const LogitTables<A>&);

int64_t upsample_argmax_workspace(const Where&, const ArgmaxCall&);
void upsample_argmax_cpu(const Where&, const ArgmaxCall&, void* workspace);
void upsample_argmax_cuda(const Where&, const ArgmaxCall&, void* unused);

}  // namespace segkernels
