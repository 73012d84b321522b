// unpool_nearest and unpool_bed_of_nails on CUDA: launches the functors of unpool2d.h.
#include "pooling/unpool2d.h"

namespace segkernels::pooling {
namespace {

void nearest(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  const DeviceGuard guard(where.device);
  expand_by_functors(where, w, b, EveryCell{}, "unpool_nearest");
}

void bed_of_nails(const Where& where, const Windows& w, const Unpool2dBuffers& b, int32_t cell) {
  const DeviceGuard guard(where.device);
  expand_by_functors(where, w, b, ByCell{cell}, "unpool_bed_of_nails");
}

void nearest_backward(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  const DeviceGuard guard(where.device);
  sum_cells_by_functors(where, w, b);
}

}  // namespace

Unpool2dApi unpool2d_cuda() { return {nearest, bed_of_nails, nearest_backward}; }

}  // namespace segkernels::pooling
