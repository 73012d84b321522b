// The CPU's loops of upsample_argmax, defined in upsample_argmax.simd.cpp for its instruction set.
#pragma once

#include "common/simd.h"
#include "interpolate/logit_rows.h"
#include "upsample_argmax/upsample_argmax.h"

namespace segkernels {

template <Isa kIsa, class T>
struct ArgmaxRows {
  static void run(const Where&, const ArgmaxCall&, const LogitPlan<T>&);
};

}  // namespace segkernels
