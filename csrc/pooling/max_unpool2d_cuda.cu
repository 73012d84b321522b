// max_unpool2d on CUDA: launches the functors of max_unpool2d.h.
#include "pooling/max_unpool2d.h"

namespace segkernels::pooling {
namespace {

constexpr const char* kForward = "max_unpool2d";

template <class T>
void scatter_codes(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const uint8_t* codes = static_cast<const uint8_t*>(b.positions);
  const T* input = static_cast<const T*>(b.input);
  T* output = static_cast<T*>(b.output);
  if (expand_tiles(where, w, ByCode{codes}, input, output, b.status, kForward)) return;
  scatter_windows<T, uint8_t, false>(where, w, input, codes, output, kForward);
  const CheckCodes check{w, raster_of(w.pooled), codes, b.status};
  parallel_places(where, w, w.pooled[0], w.pooled[1], check, kForward);
}

template <class T>
void scatter_indices(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const Winners winners{b.winners, wide_winners(w)};
  const int64_t places = w.planes * w.full[0] * w.full[1] * w.channels;
  // All bits set: -1, no winner.
  check_cuda(
      cudaMemsetAsync(b.winners, 0xFF, size_t(places) * (winners.wide ? 8 : 4), stream_of(where)),
      kForward);
  const Claim claim{w, raster_of(w.pooled), static_cast<const int64_t*>(b.positions), winners,
                    b.status};
  parallel_places(where, w, w.pooled[0], w.pooled[1], claim, kForward);
  const GatherWinner<T> read{w, raster_of(w.full), static_cast<const T*>(b.input), winners,
                             static_cast<T*>(b.output)};
  parallel_places(where, w, w.full[0], w.full[1], read, kForward);
}

void forward(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const DeviceGuard guard(where.device);
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    b.wide ? scatter_indices<T>(where, w, b) : scatter_codes<T>(where, w, b);
  });
}

void backward(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const DeviceGuard guard(where.device);
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

}  // namespace

MaxUnpool2dApi max_unpool2d_cuda() { return {forward, backward}; }

}  // namespace segkernels::pooling
