// unpool_nearest and unpool_bed_of_nails on the CPU, compiled once per instruction set (SK_ISA).
#include "unpool2d/unpool2d.h"
#include "window/rows.h"

namespace segkernels::pooling {
inline namespace SK_NS {

template <class Rule>
void expand_all(const Where& where, const Windows& w, const Unpool2dBuffers& b, const Rule& rule,
                const char* name) {
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    expand_rows(where, w, rule, nullptr, static_cast<const T*>(b.input), static_cast<T*>(b.output),
                nullptr, name);
  });
}

void unpool_nearest(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  expand_all(where, w, b, EveryCell{}, "unpool_nearest");
}

void unpool_bed_of_nails(const Where& where, const Windows& w, const Unpool2dBuffers& b,
                         int32_t cell) {
  expand_all(where, w, b, ByCell{cell}, "unpool_bed_of_nails");
}

template <class T>
SK_HD void add_lanes(const T* __restrict from, int64_t step, Acc<T>* __restrict sum, int n) {
  for (int i = 0; i < n; ++i) sum[i] += widen(from[i * step]);
}

// n windows of a contiguous line, or n channels of one window of channels_last.
template <class T>
void sum_cells(const Windows& w, const Place& p, const T* input, T* output, int n) {
  Acc<T> sum[kLanes] = {};
  for (int32_t m = 0; m < w.kernel[0]; ++m) {
    const T* from = input + full_offset(w, p, p.y * w.kernel[0] + m, p.x * w.kernel[1]);
    for (int32_t k = 0; k < w.kernel[1]; ++k) {
      add_lanes(from + k * w.channels, w.channels > 1 ? 1 : w.kernel[1], sum, n);
    }
  }
  T* out = output + pooled_offset(w, p, p.y, p.x);
  for (int i = 0; i < n; ++i) out[i] = narrow_to<T>(sum[i]);
}

void unpool_nearest_backward(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  const Divisor by = divisor_of(w.pooled[0] > 0 ? w.pooled[0] : 1);
  with_scalar_type(b.type, [&](auto scalar) {
    using T = decltype(scalar);
    const T* input = static_cast<const T*>(b.input);
    T* output = static_cast<T*>(b.output);
    const auto line = [&](int64_t i) {
      const Place p = line_of(i, by);
      const int32_t step = w.channels > 1 ? 1 : kLanes;
      for (int32_t x = 0; x < w.pooled[1]; x += step) {
        if (w.channels == 1) {
          sum_cells(w, {p.plane, p.y, x, 0}, input, output, lanes_left(x, w.pooled[1]));
          continue;
        }
        for (int64_t c = 0; c < w.channels; c += kLanes) {
          sum_cells(w, {p.plane, p.y, x, c}, input, output, lanes_left(c, w.channels));
        }
      }
    };
    parallel_for(where, w.planes * w.pooled[0], line, "unpool_nearest_backward");
  });
}

Unpool2dApi unpool2d_rows() {
  return {unpool_nearest, unpool_bed_of_nails, unpool_nearest_backward};
}

}  // namespace SK_NS
}  // namespace segkernels::pooling
