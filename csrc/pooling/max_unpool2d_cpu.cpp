// max_unpool2d on the CPU: the loops of max_unpool2d.simd.cpp for this machine's instruction set.
#include "pooling/max_unpool2d.h"

namespace segkernels::pooling {

MaxUnpool2dApi max_unpool2d_cpu() {
  return with_best_isa([](auto isa) { return max_unpool2d_loops<isa.value>(); });
}

}  // namespace segkernels::pooling
