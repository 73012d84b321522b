// unpool_nearest and unpool_bed_of_nails on the CPU: the loops of unpool2d.simd.cpp for this
// machine's instruction set.
#include "pooling/unpool2d.h"

namespace segkernels::pooling {

Unpool2dApi unpool2d_cpu() {
  return with_best_isa([](auto isa) { return unpool2d_loops<isa.value>(); });
}

}  // namespace segkernels::pooling
