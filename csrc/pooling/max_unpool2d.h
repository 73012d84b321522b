// max_unpool2d: scatters values to the positions that max_pool2d recorded, zero elsewhere. Of
// several values for one place the last in row order stays. With codes, every place is written
// once: windows that tile the plane are expanded; otherwise each place searches the windows that
// cover it. With indices, which may be anywhere in the plane, the sources first atomicMax their
// number into a workspace, then every place gathers the value of its winner.
//
// Backward: gathers the gradient at the recorded positions.
#pragma once

#include "common/simd.h"
#include "pooling/scatter_gather.h"

namespace segkernels::pooling {

struct UnpoolBuffers {
  const void* input;      // pooled
  const void* positions;  // pooled: codes or, if wide, indices
  void* output;           // full
  void* winners;  // CUDA with indices, full: int32_t, or int64_t where a plane has too many sources
  int32_t* status;
  bool wide;
  ScalarType type;
};

struct MaxUnpool2dApi {
  void (*forward)(const Where&, const Windows&, const UnpoolBuffers&);
  void (*backward)(const Where&, const Windows&, const UnpoolBuffers&);
};

// The loops of max_unpool2d.simd.cpp.
template <Isa kIsa>
MaxUnpool2dApi max_unpool2d_loops();

MaxUnpool2dApi max_unpool2d_cpu();
MaxUnpool2dApi max_unpool2d_cuda();

inline bool wide_winners(const Windows& w) {
  return int64_t(w.pooled[0]) * w.pooled[1] > INT32_MAX;
}

inline namespace SK_NS {

// Not atomic on the CPU, where one thread runs these functors.
SK_HD void raise_to(int32_t* at, int32_t value) {
#if defined(__CUDA_ARCH__)
  atomicMax(at, value);
#else
  if (*at < value) *at = value;
#endif
}

SK_HD void raise_to(int64_t* at, int64_t value) {
#if defined(__CUDA_ARCH__)
  atomicMax(reinterpret_cast<long long*>(at), static_cast<long long>(value));
#else
  if (*at < value) *at = value;
#endif
}

// The winners of places: int64_t if `wide`, else int32_t.
struct Winners {
  void* data;
  bool wide;

  SK_HD int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  SK_HD void raise(int64_t i, int64_t value) const {
    if (wide) {
      raise_to(static_cast<int64_t*>(data) + i, value);
    } else {
      raise_to(static_cast<int32_t*>(data) + i, int32_t(value));
    }
  }
};

// One source: the largest source number of each place wins.
struct Claim {
  Windows w;
  Raster raster;
  const int64_t* indices;
  Winners winners;
  int32_t* status;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_of<1>(w, row, block, raster);
    const int64_t index = indices[pooled_offset(w, p, p.y, p.x)];
    if (offset_of_position(w, p, index) < 0) {
      report(status, kIndexOutOfRange);
      return;
    }
    winners.raise(full_offset(w, p, 0, 0) + index * w.channels, int64_t(p.y) * w.pooled[1] + p.x);
  }
};

// One place: gathers the winner's value.
template <class T>
struct GatherWinner {
  Windows w;
  Raster raster;
  const T* input;
  Winners winners;
  T* output;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_of<1>(w, row, block, raster);
    const int64_t at = full_offset(w, p, p.y, p.x), winner = winners.at(at);
    output[at] = winner < 0 ? T(0) : input[pooled_offset(w, p, 0, 0) + winner * w.channels];
  }
};

}  // namespace SK_NS
}  // namespace segkernels::pooling
