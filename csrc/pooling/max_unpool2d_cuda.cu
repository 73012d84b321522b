// max_unpool2d on CUDA: launches the functors of max_unpool2d.h.
#include "pooling/max_unpool2d.h"

namespace segkernels::pooling {
namespace {

void forward(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const DeviceGuard guard(where.device);
  unpool_by_functors(where, w, b);
}

void backward(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const DeviceGuard guard(where.device);
  unpool_grad_by_functors(where, w, b);
}

}  // namespace

MaxUnpool2dApi max_unpool2d_cuda() { return {forward, backward}; }

}  // namespace segkernels::pooling
