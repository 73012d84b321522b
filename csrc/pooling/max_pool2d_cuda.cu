// max_pool2d on CUDA: launches the functors of max_pool2d.h.
#include "pooling/max_pool2d.h"

namespace segkernels::pooling {
namespace {

template <class T>
void pool(const Where& where, const Windows& w, const PoolBuffers& b, const Ordering<T>& order) {
  const T* input = static_cast<const T*>(b.input);
  const Pooled<T> out{static_cast<T*>(b.values), b.codes, b.indices};
  const char* name = "max_pool2d";
  const Raster raster = raster_of(w.pooled);
  if constexpr (kVectorChannels<T> > 1) {
    constexpr int V = kVectorChannels<T>, kWindows = kVectorColumns<T>;
    if (w.channels > 1 && packs(input, w.channels, V) && out.aligned(w.channels, V)) {
      const PoolWindow<T, true, V> f{w, raster, input, out, order};
      return parallel_places<V>(where, w, w.pooled[0], w.pooled[1], f, name);
    }
    if (w.channels == 1 && tiled_2x2(w) && packs(input, w.full[1], 2 * kWindows) &&
        out.aligned(w.pooled[1], kWindows)) {
      const Pool2x2<T, kWindows> f{w, raster, input, out, order};
      return parallel_rows(where, w.planes * w.pooled[0], nullptr, w.pooled[1] / kWindows, f, name);
    }
  }
  const PoolWindow<T, true, 1> f{w, raster, input, out, order};
  parallel_places(where, w, w.pooled[0], w.pooled[1], f, name);
}

void forward(const Where& where, const Windows& w, const PoolBuffers& b) {
  const DeviceGuard guard(where.device);
  switch (b.type) {
    case ScalarType::kDouble:
      return pool<double>(where, w, b, {});
    case ScalarType::kFloat:
      return pool<float>(where, w, b, {});
    default:
      return pool<uint16_t>(where, w, b,
                            {b.type == ScalarType::kHalf ? kHalfInfinity : kBFloat16Infinity});
  }
}

template <class P>
void scatter(const Where& where, const Windows& w, const PoolGradBuffers& b) {
  const P* positions = static_cast<const P*>(b.positions);
  const char* name = "max_pool2d_backward";
  with_scalar_type(b.type, [&](auto scalar) {
    using T = decltype(scalar);
    // The 16-bit types share an instance, except where the conversions of both would take time:
    // with vectors of values and codes.
    using Any = std::conditional_t<sizeof(T) == 2, Any16, T>;
    using InVectors = std::conditional_t<sizeof(P) == 1, T, Any>;
    if constexpr (sizeof(P) == 1) {
      using Bits = BitsOf<sizeof(T)>;
      if (expand_tiles(where, w, ByCode{positions}, static_cast<const Bits*>(b.grad),
                       static_cast<Bits*>(b.grad_input), nullptr, name)) {
        return;
      }
    }
    if (scatter_vectors<InVectors, P, true>(where, w, static_cast<const InVectors*>(b.grad),
                                            positions, static_cast<InVectors*>(b.grad_input),
                                            format_of<InVectors>(b.type), name)) {
      return;
    }
    scatter_places<Any, P, true>(where, w, static_cast<const Any*>(b.grad), positions,
                                 static_cast<Any*>(b.grad_input), format_of<Any>(b.type), name);
  });
}

void backward(const Where& where, const Windows& w, const PoolGradBuffers& b) {
  const DeviceGuard guard(where.device);
  b.wide ? scatter<int64_t>(where, w, b) : scatter<uint8_t>(where, w, b);
}

}  // namespace

MaxPool2dApi max_pool2d_cuda() { return {forward, backward}; }

}  // namespace segkernels::pooling
