// argmax of upsampled logits on the CPU: builds the tables of taps and calls the loops of
// upsample_argmax.simd.cpp.
#include "common/parallel_for.h"
#include "interpolate/logit_blocks.h"
#include "upsample_argmax/upsample_argmax.h"

namespace segkernels {
namespace {

template <class T>
LogitTables<T> tables_of(const ArgmaxCall& call) {
  return {logits_of<T>(call), {}, {}, nullptr, nullptr, nullptr, call.resampling.taps()};
}

}  // namespace

int64_t upsample_argmax_workspace(const Where& where, const ArgmaxCall& call) {
  Arena arena(nullptr);
  with_scalar_type(call.type, [&](auto scalar) {
    auto tables = tables_of<decltype(scalar)>(call);
    tables.allocate(arena, cpu_threads(where));
  });
  return arena.used();
}

void upsample_argmax_cpu(const Where& where, const ArgmaxCall& call, void* workspace) {
  with_scalar_type(call.type, [&](auto scalar) {
    using T = decltype(scalar);
    auto tables = tables_of<T>(call);
    Arena arena(workspace);
    tables.allocate(arena, cpu_threads(where));
    with_taps(call.resampling, [&](auto taps) {
      cpu::fill<taps.value>(tables.logits.y, tables.y);
      cpu::fill<taps.value>(tables.logits.x, tables.x);
    });
    with_best_isa([&](auto isa) { upsample_argmax<isa.value>(where, call, tables); });
  });
}

}  // namespace segkernels
