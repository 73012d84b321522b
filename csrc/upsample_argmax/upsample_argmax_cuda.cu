// argmax of upsampled logits on CUDA: launches the functor of upsample_argmax.h.
#include "interpolate/launch.h"
#include "upsample_argmax/upsample_argmax.h"

namespace segkernels {

void upsample_argmax_cuda(const Where& where, const ArgmaxCall& call, void*) {
  const DeviceGuard guard(where.device);
  with_argmax(call, [&](const auto& f) {
    parallel_for_many_registers(where, f.count(), f, "upsample_argmax");
  });
}

}  // namespace segkernels
