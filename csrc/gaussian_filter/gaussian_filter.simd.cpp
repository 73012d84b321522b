// The exact Gaussian filter on the CPU, compiled once per instruction set (SK_ISA). SIMD lanes are
// neighbouring queries, and keys are scalars in a loop, so nothing is summed across lanes. Parallel
// over tiles of queries. The order of summation is fixed: within a tile of keys, then over tiles,
// which also keeps rounding errors small.
#include <math.h>
#include <string.h>

#include "common/lanes.h"
#include "common/math.h"
#include "common/parallel_for.h"
#include "gaussian_filter/gaussian_filter.h"

namespace segkernels {
inline namespace SK_ISA {

#if defined(__AVX512F__)
template <>
struct MathOf<Vec<float, 16>> : FloatMath<16> {};
#endif

template <class T>
struct FilterTile {
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  static constexpr int kTile = kGaussianTile;
  using V = Vec<T, kLanes>;

  const GaussianFilter& f;

  const T* of(const void* data, int64_t offset) const {
    return static_cast<const T*>(data) + offset;
  }

  // One tile of queries of one image, with all keys.
  void operator()(int, int64_t item) const {
    const int64_t tiles = f.queries.points / kTile, key_tiles = f.keys.points / kTile;
    const int64_t image = item / tiles, tile = item % tiles;
    const T* x = of(f.queries.features, image * f.dims * f.queries.points + tile * kTile);
    const T* y = of(f.keys.features, image * f.dims * f.keys.points);
    const T* b = of(f.b, image * f.keys.points * f.channels);
    const int rows = f.a == nullptr ? f.channels : f.dims;
    T* out = static_cast<T*>(f.out) + image * rows * f.queries.points + tile * kTile;
    for (int r = 0; r < rows; ++r) memset(out + r * f.queries.points, 0, kTile * sizeof(T));
    for (int64_t t = 0; t < key_tiles; ++t) {
      if (apart(image, tile, t) > T(f.reach)) continue;
      for (int i = 0; i < kTile; i += kLanes) {
        V weights[kTile];
        with_dims(x + i, y + t * kTile, weights);
        if (f.a == nullptr) {
          apply(weights, b + t * kTile * f.channels, out + i);
        } else {
          const T* a = of(f.a, image * f.channels * f.queries.points + tile * kTile + i);
          pull(weights, a, b + t * kTile * f.channels, x + i, y + t * kTile, out + i);
        }
      }
    }
  }

  // Squared distance between the bounding boxes of two tiles.
  T apart(int64_t image, int64_t tile, int64_t key_tile) const {
    const int64_t tiles = f.queries.points / kTile, key_tiles = f.keys.points / kTile;
    const int64_t q = image * f.dims * tiles + tile, k = image * f.dims * key_tiles + key_tile;
    T total = 0;
    for (int d = 0; d < f.dims; ++d) {
      const T above = of(f.keys.low, k)[d * key_tiles] - of(f.queries.high, q)[d * tiles];
      const T below = of(f.queries.low, q)[d * tiles] - of(f.keys.high, k)[d * key_tiles];
      const T gap = above > below ? above : below;
      total += gap > T(0) ? gap * gap : T(0);
    }
    return total;
  }

  void with_dims(const T* x, const T* y, V* weights) const {
    switch (f.dims) {
      case 1:
        return weigh<1>(x, y, weights);
      case 2:
        return weigh<2>(x, y, weights);
      case 3:
        return weigh<3>(x, y, weights);
      case 4:
        return weigh<4>(x, y, weights);
      case 5:
        return weigh<5>(x, y, weights);
      case 6:
        return weigh<6>(x, y, weights);
      default:
        return weigh<0>(x, y, weights);
    }
  }

  // The weights of some queries and a tile of keys. D: number of features, or 0 if not known at
  // compile time.
  template <int D>
  void weigh(const T* x, const T* y, V* weights) const {
    const int dims = D > 0 ? D : f.dims;
    V place[D > 0 ? D : 16];
    for (int d = 0; d < dims; ++d) place[d] = load_lanes<kLanes>(x + d * f.queries.points);
    for (int j = 0; j < kTile; ++j) {
      V total{};
      for (int d = 0; d < dims; ++d) {
        const V step = place[d] - y[d * f.keys.points + j];
        total += step * step;
      }
      weights[j] = exp_of<V>(total * T(-0.5));
    }
  }

  void apply(const V* weights, const T* b, T* out) const {
    int c = 0;
    for (; c + 8 <= f.channels; c += 8) add<8>(weights, b + c, out + c * f.queries.points);
    for (; c + 2 <= f.channels; c += 2) add<2>(weights, b + c, out + c * f.queries.points);
    if (c < f.channels) add<1>(weights, b + c, out + c * f.queries.points);
  }

  // Sums N channels.
  template <int N>
  void add(const V* weights, const T* b, T* out) const {
    V sum[N]{};
    for (int j = 0; j < kTile; ++j) {
      for (int n = 0; n < N; ++n) sum[n] += weights[j] * b[j * f.channels + n];
    }
    for (int n = 0; n < N; ++n) {
      T* to = out + n * f.queries.points;
      store_lanes(to, load_lanes<kLanes>(to) + sum[n]);
    }
  }

  void pull(V* weights, const T* a, const T* b, const T* x, const T* y, T* out) const {
    for (int j = 0; j < kTile; ++j) {
      V product{};
      for (int c = 0; c < f.channels; ++c) {
        product += load_lanes<kLanes>(a + c * f.queries.points) * b[j * f.channels + c];
      }
      weights[j] = weights[j] * product;
    }
    for (int d = 0; d < f.dims; ++d) {
      const V place = load_lanes<kLanes>(x + d * f.queries.points);
      V sum{};
      for (int j = 0; j < kTile; ++j) sum += weights[j] * (y[d * f.keys.points + j] - place);
      T* to = out + d * f.queries.points;
      store_lanes(to, load_lanes<kLanes>(to) + sum);
    }
  }
};

}  // namespace SK_ISA

template <Isa kIsa>
void gaussian_filter(const Where& where, const GaussianFilter& f, bool is_double) {
  const int64_t items = f.batch * (f.queries.points / kGaussianTile);
  const bool is_long = f.keys.points >= 1024;
  is_double ? parallel_tiles(where, items, is_long, FilterTile<double>{f})
            : parallel_tiles(where, items, is_long, FilterTile<float>{f});
}

template void gaussian_filter<Isa::SK_ISA>(const Where&, const GaussianFilter&, bool);
}  // namespace segkernels
