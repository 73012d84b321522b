// argmax of upsampled logits on CUDA: launches the functor of upsample_argmax.h.
#include "interpolate/launch.h"
#include "upsample_argmax/upsample_argmax.h"

namespace segkernels {

void upsample_argmax_cuda(const Where& where, const ArgmaxCall& call, void*) {
  const DeviceGuard guard(where.device);
  with_logits(call.resampling, call.type, [&](auto scalar, auto taps) {
    using T = decltype(scalar);
    const auto launch = [&](auto with_confidence) {
      const Argmax<T, taps.value, with_confidence.value> f{
          logits_of<T>(call), call.labels, call.label_type, static_cast<Acc<T>*>(call.confidence)};
      parallel_for_many_registers(where, f.count(), f, "upsample_argmax");
    };
    call.confidence != nullptr ? launch(std::true_type{}) : launch(std::false_type{});
  });
}

}  // namespace segkernels
