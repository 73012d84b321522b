// unpool_nearest and unpool_bed_of_nails on the CPU: the loops of unpool2d.simd.cpp for this
// machine's instruction set.
#include "pooling/unpool2d.h"

#include "common/simd.h"

namespace segkernels::pooling {

namespace isa_base {
Unpool2dApi unpool2d_rows();
}
#if defined(SK_HAVE_X86_ISAS)
namespace isa_avx2 {
Unpool2dApi unpool2d_rows();
}
namespace isa_avx512 {
Unpool2dApi unpool2d_rows();
}
#endif

namespace {

Unpool2dApi choose() {
#if defined(SK_HAVE_X86_ISAS)
  const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return isa_avx512::unpool2d_rows();
  if (isa == Isa::kAvx2) return isa_avx2::unpool2d_rows();
#endif
  return isa_base::unpool2d_rows();
}

}  // namespace

Unpool2dApi unpool2d_cpu() {
  static const Unpool2dApi chosen = choose();
  return chosen;
}

}  // namespace segkernels::pooling
