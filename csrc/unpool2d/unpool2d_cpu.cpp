// unpool_nearest and unpool_bed_of_nails on the CPU: the loops of unpool2d.simd.cpp for this
// machine's instruction set. With no threads the functors of unpool2d.h run instead, in order: what
// CUDA runs, for tests.
#include "unpool2d/unpool2d.h"

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

const Unpool2dApi& rows() {
  static const Unpool2dApi chosen = choose();
  return chosen;
}

void nearest(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  if (where.threads == 0) return expand_by_functors(where, w, b, EveryCell{}, "unpool_nearest");
  rows().nearest(where, w, b);
}

void bed_of_nails(const Where& where, const Windows& w, const Unpool2dBuffers& b, int32_t cell) {
  const char* name = "unpool_bed_of_nails";
  if (where.threads == 0) return expand_by_functors(where, w, b, ByCell{cell}, name);
  rows().bed_of_nails(where, w, b, cell);
}

void nearest_backward(const Where& where, const Windows& w, const Unpool2dBuffers& b) {
  if (where.threads == 0) return sum_cells_by_functors(where, w, b);
  rows().nearest_backward(where, w, b);
}

}  // namespace

Unpool2dApi unpool2d_cpu() { return {nearest, bed_of_nails, nearest_backward}; }

}  // namespace segkernels::pooling
