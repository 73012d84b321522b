// unpool_nearest and unpool_bed_of_nails on CUDA: launches the functors of unpool2d.h.
#include "pooling/unpool2d.h"

namespace segkernels::pooling {
namespace {

// One cell, or every cell if it is -1: a rule for both operators.
struct OneOrEveryCell : ByCell {
  SK_HD static bool picks(int32_t wanted, int32_t at) { return wanted == at || wanted < 0; }
};

void expand(const Where& where, const Windows& w, const Unpool2dBuffers& b, int32_t cell,
            const char* name) {
  const DeviceGuard guard(where.device);
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    expand_tiles(where, w, OneOrEveryCell{{cell}}, static_cast<const T*>(b.input),
                 static_cast<T*>(b.output), nullptr, name);
  });
}

void nearest(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  expand(where, w, b, -1, "unpool_nearest");
}

void bed_of_nails(const Where& where, const Windows& w, const Unpool2dBuffers& b, int32_t cell) {
  expand(where, w, b, cell, "unpool_bed_of_nails");
}

void nearest_backward(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  const DeviceGuard guard(where.device);
  const char* name = "unpool_nearest_backward";
  with_scalar_type(b.type, [&](auto scalar) {
    using T = decltype(scalar);
    const T* input = static_cast<const T*>(b.input);
    T* output = static_cast<T*>(b.output);
    const Raster raster = raster_of(w.pooled);
    if constexpr (kVectorChannels<T> > 1) {
      constexpr int V = kVectorChannels<T>;
      if (w.channels > 1 && packs(input, w.channels, V) && packs(output, w.channels, V)) {
        const SumCells<T, V> f{w, raster, input, output};
        return parallel_places<V>(where, w, w.pooled[0], w.pooled[1], f, name);
      }
    }
    const SumCells<T, 1> f{w, raster, input, output};
    parallel_places(where, w, w.pooled[0], w.pooled[1], f, name);
  });
}

}  // namespace

Unpool2dApi unpool2d_cuda() { return {nearest, bed_of_nails, nearest_backward}; }

}  // namespace segkernels::pooling
