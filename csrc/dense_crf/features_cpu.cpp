// The features of a grid of points on the CPU: parallel over lines of points of a feature. One
// rounded division each, so that the results equal torch's.
#include "dense_crf/features.h"

#include "common/parallel_for.h"
#include "common/scalar.h"
#include "permutohedral/dispatch.h"

namespace segkernels {
namespace {

// Loops are copied for a stride of 1, so that they vectorise.
template <class T, class S>
void divide_line(const S* from, int64_t stride, int64_t n, T sigma, T* out) {
  const auto value = [](S s) {
    if constexpr (std::is_integral_v<S>) {
      return T(s);
    } else {
      return T(widen(s));
    }
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = value(from[i]) / sigma;
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = value(from[i * stride]) / sigma;
  }
}

template <class T, class S>
struct FeatureLine {
  const GridFeatures& f;

  int64_t width() const { return f.size[f.axes - 1]; }

  int64_t lines() const {
    int64_t count = 1;
    for (int a = 0; a + 1 < f.axes; ++a) count *= f.size[a];
    return count;
  }

  void operator()(int64_t i) const {
    const int64_t line = i % lines(), dims = f.axes + f.channels;
    const int64_t feature = i / lines() % dims, image = i / lines() / dims;
    T* out = static_cast<T*>(f.out) + i * width();
    int64_t at[3] = {};  // of the line, on each axis
    for (int64_t rest = line, a = f.axes - 2; a >= 0; rest /= f.size[a], --a)
      at[a] = rest % f.size[a];
    if (feature < f.axes) {
      const T sigma = static_cast<const T*>(f.sxy)[feature];
      const T other = T(at[f.axes - 1 - feature]) / sigma;
      for (int64_t x = 0; x < width(); ++x) out[x] = feature == 0 ? T(x) / sigma : other;
      return;
    }
    const int64_t channel = feature - f.axes;
    const S* from = static_cast<const S*>(f.image) + image * f.stride[0] + channel * f.stride[1];
    for (int a = 0; a + 1 < f.axes; ++a) from += at[a] * f.stride[2 + a];
    divide_line(from, f.stride[1 + f.axes], width(), static_cast<const T*>(f.srgb)[channel], out);
  }
};

template <class T, class S>
void run(const Where& where, const GridFeatures& f) {
  const FeatureLine<T, S> line{f};
  parallel_for(where, f.batch * (f.axes + f.channels) * line.lines(), line, "grid_features");
}

}  // namespace

void grid_features_cpu(const Where& where, const GridFeatures& f, bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    using T = decltype(scalar);
    if (f.image_type == kUint8) return run<T, uint8_t>(where, f);
    with_scalar_type(ScalarType(f.image_type),
                     [&](auto stored) { run<T, decltype(stored)>(where, f); });
  });
}

}  // namespace segkernels
