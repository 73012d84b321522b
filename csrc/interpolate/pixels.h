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
  Format<T> format;
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

// Pixels that a thread reads at once: fewer where their taps would take too many registers.
template <int K>
constexpr int kPixelRows = K == kAnyTaps ? 1
                           : K == 4      ? 2
                                         : 4;

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
      window.move_to(ty[r].start, !copies(l.y),
                     [&](int k) { window.value[0][k] = along(l, plane, ty[r].start, k, tx); });
      value[r] = blend(l, ty[r], window.value[0]);
    }
  }

  SK_HD static A along(const Logits<T>& l, const T* plane, int32_t start, int k,
                       const Taps<A, K>& tx) {
    if (k >= tap_count<K>(l.y)) return A(0);
    const T* row = plane + tap_position(l.y, start, k) * l.strides.row;
    return sum_taps(l.x, tx, [&](int i) {
      return l.format.wide(row[tap_position(l.x, tx.start, i) * l.strides.column]);
    });
  }

  SK_HD static A blend(const Logits<T>& l, const Taps<A, K>& taps, const A* values) {
    return sum_taps(l.y, taps, [&](int k) { return values[k]; });
  }
};

// The pixels of thread i: `rows` neighbours in a column.
struct PixelIndex {
  int64_t image;
  int32_t row, column;

  template <class T>
  SK_HD PixelIndex(const Logits<T>& l, int rows, int64_t i) {
    int32_t row_block;
    image = divide(divide(i, l.x.out, column), (l.y.out + rows - 1) / rows, row_block);
    row = row_block * rows;
  }

  template <class T>
  SK_HD static int64_t count(const Logits<T>& l, int rows) {
    return l.batch * ((l.y.out + rows - 1) / rows) * l.x.out;
  }
};

}  // namespace SK_NS

// The logits of an ArgmaxCall or a LossCall.
template <class T, class Call>
Logits<T> logits_of(const Call& call) {
  const auto g = call.resampling.template geometry<Acc<T>>();
  return {g.y,
          g.x,
          call.resampling.planes,
          call.classes,
          call.strides,
          static_cast<const T*>(call.logits),
          format_of<T>(call.type)};
}

}  // namespace segkernels
