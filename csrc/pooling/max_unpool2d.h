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

template <class I>
struct NoWinner {
  I* winners;
  SK_HD void operator()(int64_t i) const { winners[i] = -1; }
};

// One source: the largest source number of each place wins.
template <class I, bool kChannelsLast>
struct Claim {
  Windows w;
  Raster raster;
  const int64_t* indices;
  I* winners;
  int32_t* status;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_at<kChannelsLast, 1>(row, block, raster);
    const int64_t index = indices[pooled_offset(w, p, p.y, p.x)];
    if (offset_of_position(w, p, index) < 0) {
      report(status, kIndexOutOfRange);
      return;
    }
    raise_to(winners + full_offset(w, p, 0, 0) + index * w.channels, I(I(p.y) * w.pooled[1] + p.x));
  }
};

// One place: gathers the winner's value.
template <class T, class I, bool kChannelsLast>
struct GatherWinner {
  Windows w;
  Raster raster;
  const T* input;
  const I* winners;
  T* output;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_at<kChannelsLast, 1>(row, block, raster);
    const int64_t at = full_offset(w, p, p.y, p.x);
    const I winner = winners[at];
    output[at] = winner < 0 ? T(0) : input[pooled_offset(w, p, 0, 0) + winner * w.channels];
  }
};

template <class T, class I, bool kChannelsLast>
void unpool_by_claims(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const char* name = "max_unpool2d";
  I* winners = static_cast<I*>(b.winners);
  const int64_t pooled_lines = w.planes * w.pooled[0], full_lines = w.planes * w.full[0];
  const int64_t places = full_lines * w.full[1] * w.channels;
  parallel_for(where, places, NoWinner<I>{winners}, name);
  const Claim<I, kChannelsLast> claim{w, raster_of(w.pooled),
                                      static_cast<const int64_t*>(b.positions), winners, b.status};
  const GatherWinner<T, I, kChannelsLast> read{w, raster_of(w.full), static_cast<const T*>(b.input),
                                               winners, static_cast<T*>(b.output)};
  if (kChannelsLast) {
    parallel_rows(where, pooled_lines * w.pooled[1], nullptr, int(w.channels), claim, name);
    parallel_rows(where, full_lines * w.full[1], nullptr, int(w.channels), read, name);
  } else {
    parallel_rows(where, pooled_lines, nullptr, w.pooled[1], claim, name);
    parallel_rows(where, full_lines, nullptr, w.full[1], read, name);
  }
}

template <class T>
void unpool_codes_by_functors(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const char* name = "max_unpool2d";
  const uint8_t* codes = static_cast<const uint8_t*>(b.positions);
  const T* input = static_cast<const T*>(b.input);
  T* output = static_cast<T*>(b.output);
  if (expand_tiles(where, w, ByCode{codes}, input, output, b.status, name)) return;
  scatter_windows<T, uint8_t, false>(where, w, input, codes, output, name);
  check_codes(where, w, codes, b.status, name);
}

inline void unpool_by_functors(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    if (!b.wide) {
      unpool_codes_by_functors<T>(where, w, b);
    } else if (w.channels > 1) {
      wide_winners(w) ? unpool_by_claims<T, int64_t, true>(where, w, b)
                      : unpool_by_claims<T, int32_t, true>(where, w, b);
    } else {
      wide_winners(w) ? unpool_by_claims<T, int64_t, false>(where, w, b)
                      : unpool_by_claims<T, int32_t, false>(where, w, b);
    }
  });
}

inline void unpool_grad_by_functors(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const char* name = "max_unpool2d_backward";
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    const T* input = static_cast<const T*>(b.input);
    T* output = static_cast<T*>(b.output);
    if (b.wide) {
      gather(where, w, input, static_cast<const int64_t*>(b.positions), output, b.status, name);
    } else {
      gather(where, w, input, static_cast<const uint8_t*>(b.positions), output, b.status, name);
    }
  });
}

}  // namespace SK_NS
}  // namespace segkernels::pooling
