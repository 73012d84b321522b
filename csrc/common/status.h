// Reports invalid values found inside kernels (NaN, an index out of range). There is one int32
// status word a code, in host memory for the CPU and in device memory for CUDA; a kernel sets it to
// 1. All stores write the same value, so they need no atomics. segkernels/_status.py turns codes
// into errors.
#pragma once

#include "common/hd.h"

namespace segkernels {

enum StatusCode : int {
  kFeaturesNotFinite = 0,
  kFeaturesTooLarge = 1,
  kTooManyVertices = 2,
  kScoresNotFinite = 3,
  kProbsOutOfRange = 4,
  kLabelOutOfRange = 5,
  kIndexOutOfRange = 6,
  kCodeOutOfRange = 7,
  kProbsClipped = 8,  // a warning
  kStatusCodes = 9,
};

// The kStatusCodes words of a CUDA device. Only in builds with CUDA.
int32_t* status_words(int device);

inline namespace SK_NS {

SK_HD void report(int32_t* status, StatusCode code) {
  if (status != nullptr) status[code] = 1;
}

}  // namespace SK_NS
}  // namespace segkernels
