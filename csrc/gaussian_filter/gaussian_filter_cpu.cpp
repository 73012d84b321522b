// The exact Gaussian filter on the CPU: gaussian_filter.simd.cpp for this machine's instruction
// set.
#include "gaussian_filter/gaussian_filter.h"

namespace segkernels {

void gaussian_filter_cpu(const Where& where, const GaussianFilter& f, bool is_double) {
  with_best_isa([&](auto isa) { gaussian_filter<isa.value>(where, f, is_double); });
}

}  // namespace segkernels
