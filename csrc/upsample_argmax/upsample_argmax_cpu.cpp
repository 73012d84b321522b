// argmax of upsampled logits on the CPU: builds the tables of taps and calls the loops of
// upsample_argmax.simd.cpp.
#include "common/parallel_for.h"
#include "interpolate/logit_blocks.h"
#include "upsample_argmax/upsample_argmax.h"

namespace segkernels {

int64_t upsample_argmax_workspace(const Where& where, const ArgmaxCall& call) {
  Arena arena(nullptr);
  with_computing_type(call.type, [&](auto scalar) {
    LogitTables<decltype(scalar)>(call).allocate(arena, cpu_threads(where));
  });
  return arena.used();
}

void upsample_argmax_cpu(const Where& where, const ArgmaxCall& call, void* workspace) {
  with_computing_type(call.type, [&](auto scalar) {
    LogitTables<decltype(scalar)> tables(call);
    Arena arena(workspace);
    tables.allocate(arena, cpu_threads(where));
    tables.fill();
    with_best_isa([&](auto isa) { upsample_argmax<isa.value>(where, call, tables); });
  });
}

}  // namespace segkernels
