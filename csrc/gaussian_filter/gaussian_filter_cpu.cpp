// Chooses the copy of gaussian_filter.simd.cpp for this machine.
#include "common/simd.h"
#include "gaussian_filter/gaussian_filter.h"

namespace segkernels {

namespace isa_base {
void gaussian_filter(const Where&, const GaussianFilter&, bool);
}
#if defined(SK_HAVE_X86_ISAS)
namespace isa_avx2 {
void gaussian_filter(const Where&, const GaussianFilter&, bool);
}
namespace isa_avx512 {
void gaussian_filter(const Where&, const GaussianFilter&, bool);
}
#endif

void gaussian_filter_cpu(const Where& where, const GaussianFilter& f, bool is_double) {
#if defined(SK_HAVE_X86_ISAS)
  static const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return isa_avx512::gaussian_filter(where, f, is_double);
  if (isa == Isa::kAvx2) return isa_avx2::gaussian_filter(where, f, is_double);
#endif
  isa_base::gaussian_filter(where, f, is_double);
}

}  // namespace segkernels
