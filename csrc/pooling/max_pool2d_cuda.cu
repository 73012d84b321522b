// max_pool2d on CUDA: launches the functors of max_pool2d.h.
#include "pooling/max_pool2d.h"

namespace segkernels::pooling {
namespace {

void forward(const Where& where, const Windows& w, const PoolBuffers& b) {
  const DeviceGuard guard(where.device);
  pool_by_functors(where, w, b);
}

void backward(const Where& where, const Windows& w, const PoolGradBuffers& b) {
  const DeviceGuard guard(where.device);
  pool_grad_by_functors(where, w, b);
}

}  // namespace

MaxPool2dApi max_pool2d_cuda() { return {forward, backward}; }

}  // namespace segkernels::pooling
