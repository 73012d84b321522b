// max_pool2d on the CPU: the loops of max_pool2d.simd.cpp for this machine's instruction set.
#include "pooling/max_pool2d.h"

#include "common/simd.h"

namespace segkernels::pooling {

namespace isa_base {
MaxPool2dApi max_pool2d_rows();
}
#if defined(SK_HAVE_X86_ISAS)
namespace isa_avx2 {
MaxPool2dApi max_pool2d_rows();
}
namespace isa_avx512 {
MaxPool2dApi max_pool2d_rows();
}
#endif

namespace {

MaxPool2dApi choose() {
#if defined(SK_HAVE_X86_ISAS)
  const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return isa_avx512::max_pool2d_rows();
  if (isa == Isa::kAvx2) return isa_avx2::max_pool2d_rows();
#endif
  return isa_base::max_pool2d_rows();
}

const MaxPool2dApi& rows() {
  static const MaxPool2dApi chosen = choose();
  return chosen;
}

void forward(const Where& where, const Windows& w, const PoolBuffers& b) {
  // Larger windows have no codes of one byte, which the loops count in.
  if (int64_t(w.kernel[0]) * w.kernel[1] > 256) return pool_by_functors(where, w, b);
  rows().forward(where, w, b);
}

}  // namespace

MaxPool2dApi max_pool2d_cpu() { return {forward, rows().backward}; }

}  // namespace segkernels::pooling
