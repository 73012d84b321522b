// argmax of upsampled logits on the CPU: tables of taps, the choice of instruction set, and CUDA's
// functor run by a loop.
#include "common/parallel_for.h"
#include "interpolate/logit_rows.h"
#include "upsample_argmax/rows.h"

namespace segkernels {
namespace {

void rows(const Where& where, const ArgmaxCall& call, const void* plan) {
#if defined(SK_HAVE_X86_ISAS)
  static const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return isa_avx512::upsample_argmax_rows(where, call, plan);
  if (isa == Isa::kAvx2) return isa_avx2::upsample_argmax_rows(where, call, plan);
#endif
  isa_base::upsample_argmax_rows(where, call, plan);
}

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

int threads_of(const Where& where) { return where.threads > 1 ? where.threads : 1; }

}  // namespace

int64_t upsample_argmax_workspace(const Where& where, const ArgmaxCall& call) {
  Arena arena(nullptr);
  with_scalar_type(call.type, [&](auto scalar) {
    auto plan = plan_of<decltype(scalar)>(call);
    plan.take(arena, threads_of(where));
  });
  return arena.used();
}

void upsample_argmax_cpu(const Where& where, const ArgmaxCall& call, void* workspace) {
  with_scalar_type(call.type, [&](auto scalar) {
    auto plan = plan_of<decltype(scalar)>(call);
    Arena arena(workspace);
    plan.take(arena, threads_of(where));
    with_taps(call.resampling, [&](auto taps) {
      cpu::fill<taps.value>(plan.logits.y, plan.y);
      cpu::fill<taps.value>(plan.logits.x, plan.x);
    });
    rows(where, call, &plan);
  });
}

void upsample_argmax_plain(const Where& where, const ArgmaxCall& call) {
  with_argmax(call,
              [&](const auto& f) { parallel_for(where, f.count(), f, "upsample_argmax_plain"); });
}

}  // namespace segkernels
