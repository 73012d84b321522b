// max_pool2d on the CPU: the loops of max_pool2d.simd.cpp for this machine's instruction set.
#include "pooling/max_pool2d.h"

namespace segkernels::pooling {
namespace {

MaxPool2dApi rows() {
  return with_best_isa([](auto isa) { return max_pool2d_loops<isa.value>(); });
}

// Windows of so many cells that their codes need more than the one byte of the loops.
void pool_large(const Where& where, const Windows& w, const PoolBuffers& b) {
  with_scalar_type(b.type, [&](auto scalar) {
    using T = decltype(scalar);
    const Pooled<T> out{static_cast<T*>(b.values), b.codes, b.indices};
    const PoolWindow<T, true, 1> f{w, raster_of(w.pooled), static_cast<const T*>(b.input), out};
    parallel_places(where, w, w.pooled[0], w.pooled[1], f, "max_pool2d");
  });
}

void forward(const Where& where, const Windows& w, const PoolBuffers& b) {
  if (int64_t(w.kernel[0]) * w.kernel[1] > 256) return pool_large(where, w, b);
  rows().forward(where, w, b);
}

}  // namespace

MaxPool2dApi max_pool2d_cpu() { return {forward, rows().backward}; }

}  // namespace segkernels::pooling
