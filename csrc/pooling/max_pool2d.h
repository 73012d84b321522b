// max_pool2d: the maximum of every window, and its position as a code of one byte or as a flat
// index of the plane. The order is torch's: NaN is the largest, the last of several NaN wins, -0
// equals 0, and the first of equal values wins. Parallel over windows, and over channels in
// channels_last.
//
// Backward: the gradient of a place is the sum, in row order, over the windows whose maximum it is.
#pragma once

#include <math.h>

#include "common/parallel_for.h"
#include "common/scalar.h"
#include "common/simd.h"
#include "pooling/geometry.h"
#include "pooling/scatter_gather.h"

namespace segkernels::pooling {

struct PoolBuffers {
  const void* input;  // full
  void* values;       // pooled
  uint8_t* codes;     // pooled, or null
  int64_t* indices;   // pooled, or null
  ScalarType type;
};

struct PoolGradBuffers {
  const void* grad;       // pooled
  const void* positions;  // pooled
  void* grad_input;       // full
  float* sums;            // CPU, 16-bit types: one plane a thread
  bool wide;              // positions are indices, not codes
  ScalarType type;
};

struct MaxPool2dApi {
  void (*forward)(const Where&, const Windows&, const PoolBuffers&);
  void (*backward)(const Where&, const Windows&, const PoolGradBuffers&);
};

// The loops of max_pool2d.simd.cpp.
template <Isa kIsa>
MaxPool2dApi max_pool2d_loops();

MaxPool2dApi max_pool2d_cpu();
MaxPool2dApi max_pool2d_cuda();

inline namespace SK_NS {

// Values as they are compared. 16-bit types are compared as integers in the same order, with -0
// equal to 0 and every NaN the largest.
SK_HD int16_t order_of_bits(uint16_t bits, int16_t infinity) {
  const int16_t magnitude = int16_t(bits & 0x7FFF), sign = int16_t(int16_t(bits) >> 15);
  const int16_t ordered = int16_t((magnitude ^ sign) - sign);
  const int16_t nan = int16_t(-int16_t(magnitude > infinity));  // a mask, so that loops vectorise
  return int16_t((ordered & ~nan) | (nan & 0x7FFF));
}

constexpr int16_t kHalfInfinity = 0x7C00, kBFloat16Infinity = 0x7F80;  // as bits

SK_HD int16_t order_of(Half h) { return order_of_bits(h.bits, kHalfInfinity); }
SK_HD int16_t order_of(BFloat16 b) { return order_of_bits(b.bits, kBFloat16Infinity); }
SK_HD float order_of(float f) { return f; }
SK_HD double order_of(double d) { return d; }

template <class T>
SK_HD T lowest() {
  return narrow_to<T>(Acc<T>(-INFINITY));
}

// The order of values of T.
template <class T>
struct Ordering {
  SK_HD auto of(T value) const { return order_of(value); }
  SK_HD T least() const { return lowest<T>(); }
};

// Half and BFloat16 in one instance: their orders differ in one constant.
template <>
struct Ordering<uint16_t> {
  int infinity;
  SK_HD int16_t of(uint16_t bits) const { return order_of_bits(bits, infinity); }
  SK_HD uint16_t least() const { return uint16_t(0x8000 | infinity); }
};

SK_HD bool replaces(int16_t a, int16_t best) { return (a > best) | (a == 0x7FFF); }
SK_HD bool replaces(float a, float best) { return (a > best) | (a != a); }
SK_HD bool replaces(double a, double best) { return (a > best) | (a != a); }

template <class T>
struct Best {
  T value;
  int32_t code;

  SK_HD void update(const Ordering<T>& order, T other, int32_t other_code) {
    if (replaces(order.of(other), order.of(value))) {
      value = other;
      code = other_code;
    }
  }
};

SK_HD int64_t index_of(const Windows& w, int32_t start_y, int32_t start_x, int32_t code) {
  const int32_t m = code / w.kernel[1], n = code - m * w.kernel[1];
  return int64_t(start_y + m * w.dilation[0]) * w.full[1] + start_x + n * w.dilation[1];
}

template <class T>
struct Pooled {
  T* values;
  uint8_t* codes;
  int64_t* indices;

  bool aligned(int64_t row, int v) const {
    return packs(values, row, v) && packs(codes, row, v) && packs(indices, row, v);
  }

  // Writes V windows or channels. Cell 0 of the i-th is at (y, x + i * step).
  template <int V>
  SK_HD void write(const Windows& w, int64_t at, int32_t y, int32_t x, int32_t step,
                   const Best<T> (&best)[V]) const {
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) out.lane[i] = best[i].value;
    store(values + at, out);
    if (codes != nullptr) {
      Pack<uint8_t, V> found;
      for (int i = 0; i < V; ++i) found.lane[i] = uint8_t(best[i].code);
      store(codes + at, found);
    }
    if (indices != nullptr) {
      Pack<int64_t, V> found;
      for (int i = 0; i < V; ++i) found.lane[i] = index_of(w, y, x + i * step, best[i].code);
      store(indices + at, found);
    }
  }
};

// Any windows: one window and V channels a call; if not kAnyLayout, of contiguous planes.
template <class T, bool kAnyLayout, int V>
struct PoolWindow {
  Windows w;
  Raster raster;
  const T* input;
  Pooled<T> out;
  Ordering<T> order = {};

  SK_HD void operator()(int64_t row, int block) const {
    const Place p =
        kAnyLayout ? place_of<V>(w, row, block, raster) : place_at<false, V>(row, block, raster);
    const Cells ys = cells_inside(w, 0, p.y), xs = cells_inside(w, 1, p.x);
    Best<T> best[V];
    for (int i = 0; i < V; ++i) best[i] = {order.least(), ys.begin * w.kernel[1] + xs.begin};
    for (int32_t m = ys.begin; m < ys.end; ++m) {
      const int32_t y = ys.start + m * w.dilation[0];
      for (int32_t n = xs.begin; n < xs.end; ++n) {
        const T* from = input + full_offset(w, p, y, xs.start + n * w.dilation[1]);
        const Pack<T, V> pack = load<T, V>(from);
        for (int i = 0; i < V; ++i) best[i].update(order, pack.lane[i], m * w.kernel[1] + n);
      }
    }
    out.write(w, pooled_offset(w, p, p.y, p.x), ys.start, xs.start, 0, best);
  }
};

// 2x2 windows that tile a contiguous plane: V neighbouring windows a call.
template <class T, int V>
struct Pool2x2 {
  Windows w;
  Raster raster;
  const T* input;
  Pooled<T> out;
  Ordering<T> order;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_at<false, V>(row, block, raster);
    const T* from = input + full_offset(w, p, 2 * p.y, 2 * p.x);
    const Pack<T, 2 * V> upper = load<T, 2 * V>(from), lower = load<T, 2 * V>(from + w.full[1]);
    Best<T> best[V];
    for (int i = 0; i < V; ++i) {
      best[i] = {upper.lane[2 * i], 0};
      best[i].update(order, upper.lane[2 * i + 1], 1);
      best[i].update(order, lower.lane[2 * i], 2);
      best[i].update(order, lower.lane[2 * i + 1], 3);
    }
    out.write(w, pooled_offset(w, p, p.y, p.x), 2 * p.y, 2 * p.x, 2, best);
  }
};

}  // namespace SK_NS
}  // namespace segkernels::pooling
