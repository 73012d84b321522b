// max_pool2d on the CPU: the loops of max_pool2d.simd.cpp for this machine's instruction set.
#include "pooling/max_pool2d.h"

namespace segkernels::pooling {
namespace {

MaxPool2dApi rows() {
  return with_best_isa([](auto isa) { return max_pool2d_loops<isa.value>(); });
}

void forward(const Where& where, const Windows& w, const PoolBuffers& b) {
  // The loops store codes in one byte.
  if (int64_t(w.kernel[0]) * w.kernel[1] > 256) return pool_by_functors(where, w, b);
  rows().forward(where, w, b);
}

}  // namespace

MaxPool2dApi max_pool2d_cpu() { return {forward, rows().backward}; }

}  // namespace segkernels::pooling
