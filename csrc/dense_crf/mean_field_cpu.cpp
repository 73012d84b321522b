// Mean field on the CPU: mean_field.simd.cpp for this machine's instruction set.
#include "dense_crf/mean_field.h"

namespace segkernels {

void mean_field_cpu(const Where& where, const MeanField& m, bool is_double) {
  with_best_isa([&](auto isa) { mean_field<isa.value>(where, m, is_double); });
}

}  // namespace segkernels
