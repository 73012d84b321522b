// max_unpool2d on the CPU: the loops of max_unpool2d.simd.cpp for this machine's instruction set.
#include "pooling/max_unpool2d.h"

#include "common/simd.h"

namespace segkernels::pooling {

namespace isa_base {
MaxUnpool2dApi max_unpool2d_rows();
}
#if defined(SK_HAVE_X86_ISAS)
namespace isa_avx2 {
MaxUnpool2dApi max_unpool2d_rows();
}
namespace isa_avx512 {
MaxUnpool2dApi max_unpool2d_rows();
}
#endif

namespace {

MaxUnpool2dApi choose() {
#if defined(SK_HAVE_X86_ISAS)
  const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return isa_avx512::max_unpool2d_rows();
  if (isa == Isa::kAvx2) return isa_avx2::max_unpool2d_rows();
#endif
  return isa_base::max_unpool2d_rows();
}

}  // namespace

MaxUnpool2dApi max_unpool2d_cpu() {
  static const MaxUnpool2dApi chosen = choose();
  return chosen;
}

}  // namespace segkernels::pooling
