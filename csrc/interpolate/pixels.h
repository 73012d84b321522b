// Interpolated logits of single pixels, for argmax and the losses of upsampled logits: a thread has
// all classes of its pixels, and stores none of the logits. Logits may have any strides.
#pragma once

#include "interpolate/kernels.h"

namespace segkernels {

struct Strides {
  int64_t batch, channel, row, column;  // in elements
};

// Logits [batch, classes, in height, in width] and the axes of the output pixels.
template <class T>
struct Logits {
  using A = Acc<T>;
  Axis<A> y, x;
  int64_t batch;
  int32_t classes;
  Strides strides;
  const T* data;
};

inline namespace SK_NS {

// exp for x <= 0, also for minus infinity.
SK_HD float exp_fast(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return exp_of(x < -100.0f ? -100.0f : x);
#endif
}
SK_HD double exp_fast(double x) { return exp(x); }

// Pixels a thread: fewer where their taps would take too many registers.
template <class T, int K>
constexpr int kPixelRows = (K == 4 ? 2 : 4) / (sizeof(T) == 8 ? 2 : 1);

// R pixels in a column, read class by class: neighbouring rows share most of their taps.
template <class T, int K, int R>
struct PixelColumn {
  using A = Acc<T>;
  Taps<A, K> tx, ty[R];

  SK_HD PixelColumn(const Logits<T>& l, int32_t first, int32_t x) {
    tx = taps_at<K>(l.x, x);
#pragma unroll
    for (int r = 0; r < R; ++r)
      ty[r] = taps_at<K>(l.y, first + r < l.y.out ? first + r : l.y.out - 1);
  }

  // The logits of one class, whose plane is `plane`.
  SK_HD void read(const Logits<T>& l, const T* plane, A* value) const {
    RowWindow<A, K, 1> window;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      window.move_to(ty[r].start, l.y.kind != kIdentity,
                     [&](int k) { window.value[0][k] = along(l, plane, ty[r].start, k, tx); });
      value[r] = blend(ty[r], window.value[0]);
    }
  }

  SK_HD static A along(const Logits<T>& l, const T* plane, int32_t start, int k,
                       const Taps<A, K>& tx) {
    const T* row = plane + tap_position(l.y, start, k) * l.strides.row;
    A sum = widen(row[tap_position(l.x, tx.start, 0) * l.strides.column]);
    if constexpr (K > 1) sum = tx.weight[0] * sum;
#pragma unroll
    for (int i = 1; i < K; ++i) {
      sum = mul_add(tx.weight[i], A(widen(row[tap_position(l.x, tx.start, i) * l.strides.column])),
                    sum);
    }
    return sum;
  }

  SK_HD static A blend(const Taps<A, K>& taps, const A* values) {
    A sum = values[0];
    if constexpr (K > 1) sum = taps.weight[0] * sum;
#pragma unroll
    for (int k = 1; k < K; ++k) sum = mul_add(taps.weight[k], values[k], sum);
    return sum;
  }
};

// The R pixels of thread i.
template <int R>
struct PixelIndex {
  int64_t image;
  int32_t row, column;

  template <class T>
  SK_HD PixelIndex(const Logits<T>& l, int64_t i) {
    int32_t row_block;
    image = divide(divide(i, l.x.out, column), (l.y.out + R - 1) / R, row_block);
    row = row_block * R;
  }

  template <class T>
  SK_HD static int64_t count(const Logits<T>& l) {
    return l.batch * ((l.y.out + R - 1) / R) * l.x.out;
  }
};

}  // namespace SK_NS

// The logits of an ArgmaxCall or a LossCall.
template <class T, class Call>
Logits<T> logits_of(const Call& call) {
  const auto g = call.resampling.template geometry<Acc<T>>();
  return {g.y,          g.x,          call.resampling.planes,
          call.classes, call.strides, static_cast<const T*>(call.logits)};
}

}  // namespace segkernels
