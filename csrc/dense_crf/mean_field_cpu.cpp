// Chooses the copy of mean_field.simd.cpp for this machine.
#include "common/simd.h"
#include "dense_crf/mean_field.h"

namespace segkernels {

namespace isa_base {
void mean_field(const Where&, const MeanField&, bool);
}
#if defined(SK_HAVE_X86_ISAS)
namespace isa_avx2 {
void mean_field(const Where&, const MeanField&, bool);
}
namespace isa_avx512 {
void mean_field(const Where&, const MeanField&, bool);
}
#endif

void mean_field_cpu(const Where& where, const MeanField& m, bool is_double) {
#if defined(SK_HAVE_X86_ISAS)
  static const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return isa_avx512::mean_field(where, m, is_double);
  if (isa == Isa::kAvx2) return isa_avx2::mean_field(where, m, is_double);
#endif
  isa_base::mean_field(where, m, is_double);
}

}  // namespace segkernels
