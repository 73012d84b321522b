// unpool_nearest and unpool_bed_of_nails on the CPU, compiled once per instruction set (SK_ISA).
#include <string.h>

#include "pooling/scatter_gather_cpu.h"
#include "pooling/unpool2d.h"

namespace segkernels::pooling {
inline namespace SK_NS {

template <class Rule>
void expand_all(const Where& where, const Windows& w, const Unpool2dBuffers& b, const Rule& rule,
                const char* name) {
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    expand_lines(where, w, rule, nullptr, static_cast<const T*>(b.input), static_cast<T*>(b.output),
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

// Adds N (0: `step`) adjacent values to each sum.
template <int N, class A>
SK_HD void add_adjacent(const A* __restrict from, A* __restrict sums, int n, int step) {
  for (int i = 0; i < n; ++i) {
    A sum = sums[i];
    for (int k = 0; k < (N > 0 ? N : step); ++k) sum += from[i * (N > 0 ? N : step) + k];
    sums[i] = sum;
  }
}

// Contiguous: n windows of a line, whose rows of cells begin at `from`.
template <class T>
void sum_columns(const Windows& w, const T* from, T* out, int n) {
  using A = Acc<T>;
  A sums[kLanes] = {}, wide[sizeof(T) < sizeof(A) ? 2 * kLanes : 1];
  const int step = w.kernel[1];
  for (int32_t m = 0; m < w.kernel[0]; ++m, from += w.full[1]) {
    if constexpr (sizeof(T) == sizeof(A)) {
      step == 2 ? add_adjacent<2>(from, sums, n, step) : add_adjacent<0>(from, sums, n, step);
    } else if (step == 2) {
      widen_line(from, wide, 2 * n);
      add_adjacent<2>(wide, sums, n, step);
    } else {
      for (int i = 0; i < n; ++i) {
        for (int k = 0; k < step; ++k) sums[i] += widen_one(from[i * step + k]);
      }
    }
  }
  if constexpr (sizeof(T) == sizeof(A)) {
    memcpy(static_cast<void*>(out), sums, sizeof(T) * n);
  } else {
    narrow_line(sums, out, n);
  }
}

// channels_last: one window, whose first cell is at `from`.
template <class T>
void sum_channels(const Windows& w, const T* from, T* out) {
  constexpr int kWidth = kVectorBytes / sizeof(Acc<T>);
  const int64_t row = w.full[1] * w.channels;
  if (w.channels < kWidth) {
    for (int64_t c = 0; c < w.channels; ++c) {
      Acc<T> sum = 0;
      for (int32_t m = 0; m < w.kernel[0]; ++m) {
        for (int32_t k = 0; k < w.kernel[1]; ++k) {
          sum += widen_one(from[m * row + k * w.channels + c]);
        }
      }
      out[c] = narrow_to<T>(sum);
    }
    return;
  }
  each_block<kWidth>(w.channels, [&](auto count, int64_t c) {
    Vec<Acc<T>, kWidth> sum[count] = {};
    for (int32_t m = 0; m < w.kernel[0]; ++m) {
      const T* cell = from + m * row + c;
      for (int32_t k = 0; k < w.kernel[1]; ++k, cell += w.channels) {
        for (int i = 0; i < count; ++i) sum[i] += load_wide<kWidth>(cell + i * kWidth);
      }
    }
    for (int i = 0; i < count; ++i) store_narrow<kWidth>(out + c + i * kWidth, sum[i]);
  });
}

void unpool_nearest_backward(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  const Divisor by = divisor_of(w.pooled[0] > 0 ? w.pooled[0] : 1);
  with_scalar_type(b.type, [&](auto scalar) {
    using T = decltype(scalar);
    const T* input = static_cast<const T*>(b.input);
    T* output = static_cast<T*>(b.output);
    const auto line = [&](int64_t i) {
      const Place p = line_of(i, by);
      const T* from = input + full_offset(w, p, p.y * w.kernel[0], 0);
      T* out = output + pooled_offset(w, p, p.y, 0);
      const int64_t step = w.kernel[1] * w.channels;
      if (w.channels == 1) {
        for (int32_t x = 0; x < w.pooled[1]; x += kLanes) {
          sum_columns(w, from + x * step, out + x, lanes_left(x, w.pooled[1]));
        }
        return;
      }
      for (int32_t x = 0; x < w.pooled[1]; ++x) {
        sum_channels(w, from + x * step, out + x * w.channels);
      }
    };
    parallel_for(where, w.planes * w.pooled[0], line, "unpool_nearest_backward");
  });
}

}  // namespace SK_NS

template <Isa kIsa>
Unpool2dApi unpool2d_loops() {
  return {unpool_nearest, unpool_bed_of_nails, unpool_nearest_backward};
}

template Unpool2dApi unpool2d_loops<Isa::SK_ISA>();

}  // namespace segkernels::pooling
