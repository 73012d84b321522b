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

template <class T, int V>
struct SumCells {
  Windows w;
  Raster raster;
  const T* input;
  T* output;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_of<V>(w, row, block, raster);
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

}  // namespace SK_NS
}  // namespace segkernels::pooling
