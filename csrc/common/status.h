// What only the values show (NaN, an index out of range) is told by status words: an int32 per
// code, in host memory for the CPU and in device memory for CUDA, set to 1 by whoever sees the
// fault. Plain stores of the same value need no atomics and no synchronisation.
// segkernels/_status.py turns codes into errors.
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
  kStatusCodes = 8,
};

// kStatusCodes words in the memory of a CUDA device; in builds with CUDA.
int32_t* status_words(int device);

inline namespace SK_NS {

SK_HD void report(int32_t* status, StatusCode code) {
  if (status != nullptr) status[code] = 1;
}

}  // namespace SK_NS
}  // namespace segkernels
