// argmax of upsampled logits on the CPU: tables of taps, and the choice of instruction set.
#include "common/parallel_for.h"
#include "upsample_argmax/rows.h"

namespace segkernels {
namespace {

template <class T>
LogitPlan<T> plan_of(const ArgmaxCall& call) {
  return {logits_of<T>(call.resampling, call.classes, call.strides, call.logits),
          {},
          {},
          nullptr,
          nullptr,
          nullptr,
          call.resampling.taps()};
}

}  // namespace

int64_t upsample_argmax_workspace(const Where& where, const ArgmaxCall& call) {
  Arena arena(nullptr);
  with_scalar_type(call.type, [&](auto scalar) {
    auto plan = plan_of<decltype(scalar)>(call);
    plan.take(arena, cpu_threads(where));
  });
  return arena.used();
}

void upsample_argmax_cpu(const Where& where, const ArgmaxCall& call, void* workspace) {
  with_scalar_type(call.type, [&](auto scalar) {
    using T = decltype(scalar);
    auto plan = plan_of<T>(call);
    Arena arena(workspace);
    plan.take(arena, cpu_threads(where));
    with_taps(call.resampling, [&](auto taps) {
      cpu::fill<taps.value>(plan.logits.y, plan.y);
      cpu::fill<taps.value>(plan.logits.x, plan.x);
    });
    with_best_isa([&](auto isa) { ArgmaxRows<isa.value, T>::run(where, call, plan); });
  });
}

}  // namespace segkernels
