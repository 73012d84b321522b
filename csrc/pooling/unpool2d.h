// unpool_nearest: copies every value to all cells of its kernel_h x kernel_w block.
// unpool_bed_of_nails: to one cell, zero to the others. Every place is written once. Parallel over
// blocks.
//
// Backward of unpool_nearest: sums a block in row order. Parallel over blocks.
#pragma once

#include "common/simd.h"
#include "pooling/scatter_gather.h"

namespace segkernels::pooling {

struct Unpool2dBuffers {
  const void* input;
  void* output;
  ScalarType type;
};

struct Unpool2dApi {
  void (*nearest)(const Where&, const Windows&, const Unpool2dBuffers&);
  void (*bed_of_nails)(const Where&, const Windows&, const Unpool2dBuffers&, int32_t cell);
  void (*nearest_backward)(const Where&, const Windows&, const Unpool2dBuffers&);
};

// The loops of unpool2d.simd.cpp.
template <Isa kIsa>
Unpool2dApi unpool2d_loops();

Unpool2dApi unpool2d_cpu();
Unpool2dApi unpool2d_cuda();

inline namespace SK_NS {

template <class T, bool kChannelsLast, int V>
struct SumCells {
  Windows w;
  Raster raster;
  const T* input;
  T* output;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_at<kChannelsLast, V>(row, block, raster);
    Acc<T> sum[V];
    for (int i = 0; i < V; ++i) sum[i] = 0;
    for (int32_t m = 0; m < w.kernel[0]; ++m) {
      const T* from = input + full_offset(w, p, p.y * w.kernel[0] + m, p.x * w.kernel[1]);
      for (int32_t n = 0; n < w.kernel[1]; ++n) {
        const Pack<T, V> cell = load<T, V>(from + n * w.channels);
        for (int i = 0; i < V; ++i) sum[i] += widen(cell.lane[i]);
      }
    }
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) out.lane[i] = narrow_to<T>(sum[i]);
    store(output + pooled_offset(w, p, p.y, p.x), out);
  }
};

template <class Rule>
void expand_by_functors(const Where& where, const Windows& w, const Unpool2dBuffers& b,
                        const Rule& rule, const char* name) {
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    expand_tiles(where, w, rule, static_cast<const T*>(b.input), static_cast<T*>(b.output), nullptr,
                 name);
  });
}

inline void sum_cells_by_functors(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  const char* name = "unpool_nearest_backward";
  with_scalar_type(b.type, [&](auto scalar) {
    using T = decltype(scalar);
    constexpr int kChannels = 16 / sizeof(T);
    const T* input = static_cast<const T*>(b.input);
    T* output = static_cast<T*>(b.output);
    const Raster raster = raster_of(w.pooled);
    const int64_t lines = w.planes * w.pooled[0];
    if (w.channels == 1) {
      parallel_rows(where, lines, nullptr, w.pooled[1],
                    SumCells<T, false, 1>{w, raster, input, output}, name);
    } else if (packs(input, w.channels, kChannels) && packs(output, w.channels, kChannels)) {
      parallel_rows(where, lines * w.pooled[1], nullptr, int(w.channels / kChannels),
                    SumCells<T, true, kChannels>{w, raster, input, output}, name);
    } else {
      parallel_rows(where, lines * w.pooled[1], nullptr, int(w.channels),
                    SumCells<T, true, 1>{w, raster, input, output}, name);
    }
  });
}

}  // namespace SK_NS
}  // namespace segkernels::pooling
