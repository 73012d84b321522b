// The CPU's loops of upsample_argmax, one copy an instruction set; `plan` is a LogitPlan of the
// call's type.
#pragma once

#include "common/simd.h"
#include "upsample_argmax/upsample_argmax.h"

namespace segkernels {

namespace isa_base {
void upsample_argmax_rows(const Where&, const ArgmaxCall&, const void* plan);
}
#if defined(SK_HAVE_X86_ISAS)
namespace isa_avx2 {
void upsample_argmax_rows(const Where&, const ArgmaxCall&, const void* plan);
}
namespace isa_avx512 {
void upsample_argmax_rows(const Where&, const ArgmaxCall&, const void* plan);
}
#endif

}  // namespace segkernels
