// The simplex that contains a point, and the point's barycentric weights (Adams et al. 2010,
// section 3). Rounding and ties are those of Kraehenbuehl and Koltun's code, to agree with its
// results. Comparisons here decide vertices, so the build disables fused multiply-adds.
#pragma once

#include "permutohedral/dispatch.h"

namespace segkernels {
inline namespace SK_NS {

SK_HD float round_half_even(float x) { return rintf(x); }
SK_HD double round_half_even(double x) { return rint(x); }

// Bound of coordinates: exact integers in T that fit int32 after a step of the neighbour search.
template <class T>
struct Limit;
template <>
struct Limit<float> {
  static constexpr float value = 16777216.0f - 1024.0f;
};
template <>
struct Limit<double> {
  static constexpr double value = 1073741824.0;
};

template <class T, int D>
struct Scale {
  // sqrt(2/3) (d+1) / sqrt((i+1)(i+2)) of feature i: unit standard deviation for the blur.
  T value[Dims<D>::kMost];
};

template <class T, int D>
struct Simplex {
  int32_t rem[Dims<D>::kMost + 1];   // the nearest remainder-0 vertex
  int32_t rank[Dims<D>::kMost + 1];  // of each coordinate, by descending distance from that vertex
  T sorted[Dims<D>::kMost + 1];      // distance / (d+1), by rank
};

// Registers cannot be indexed at run time: loops over all indices select one there.
#if defined(__CUDA_ARCH__)
template <int D>
constexpr bool kInRegisters = D != kAnyDims;
#else
template <int D>
constexpr bool kInRegisters = false;
#endif

// False for features that are not finite (sets `finite`) or beyond the exact range.
template <class T, int D>
SK_HD bool find_simplex(Dims<D> n, const T* feature, const Scale<T, D>& scale, Simplex<T, D>& s,
                        bool& finite) {
  const T inverse = T(1) / T(n + 1);
  T elevated[Dims<D>::kMost + 1];
  T sum = 0;
#pragma unroll(Dims<D>::kUnroll)
  for (int j = n; j > 0; --j) {
    const T c = feature[j - 1] * scale.value[j - 1];
    elevated[j] = sum - T(j) * c;
    sum += c;
  }
  elevated[0] = sum;

  finite = true;
  bool inside = true;
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i < n; ++i) finite = finite && feature[i] - feature[i] == T(0);
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i <= n; ++i)
    inside = inside && elevated[i] < Limit<T>::value && elevated[i] > -Limit<T>::value;
  if (!finite || !inside) return false;

  T rest[Dims<D>::kMost + 1];
  int32_t plane = 0;
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i <= n; ++i) {
    const T rounded = round_half_even(elevated[i] * inverse);
    rest[i] = elevated[i] - rounded * T(n + 1);
    s.rem[i] = int32_t(rounded) * (n + 1);
    s.rank[i] = 0;
    plane += int32_t(rounded);
  }
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i < n; ++i) {
#pragma unroll(Dims<D>::kUnroll)
    for (int j = i + 1; j <= n; ++j) {
      const int32_t less = rest[i] < rest[j];
      s.rank[i] += less;
      s.rank[j] += 1 - less;
    }
  }
  // The rounded point may be off the plane of sum 0: move it back along the axes with the largest
  // error.
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i <= n; ++i) {
    s.rank[i] += plane;
    const int32_t turn = s.rank[i] < 0 ? n + 1 : s.rank[i] > n ? -(n + 1) : 0;
    s.rank[i] += turn;
    s.rem[i] += turn;
    rest[i] = (elevated[i] - T(s.rem[i])) * inverse;
  }
  if constexpr (kInRegisters<D>) {
#pragma unroll(Dims<D>::kUnroll)
    for (int r = 0; r <= n; ++r) {
      s.sorted[r] = 0;
#pragma unroll(Dims<D>::kUnroll)
      for (int i = 0; i <= n; ++i) s.sorted[r] = s.rank[i] == r ? rest[i] : s.sorted[r];
    }
  } else {
    for (int i = 0; i <= n; ++i) s.sorted[s.rank[i]] = rest[i];
  }
  return true;
}

// The weights of the d+1 vertices.
template <class T, int D>
SK_HD void barycentric(Dims<D> n, const Simplex<T, D>& s, T* weight) {
#pragma unroll(Dims<D>::kUnroll)
  for (int k = 1; k <= n; ++k) weight[k] = s.sorted[n - k] - s.sorted[n + 1 - k];
  weight[0] = s.sorted[n] + (T(1) - s.sorted[0]);
}

// The transpose of features -> weights, for fixed ranks.
template <class T, int D>
SK_HD void simplex_grad(Dims<D> n, const Simplex<T, D>& s, const Scale<T, D>& scale,
                        const T* grad_weight, T* grad_feature) {
  const T inverse = T(1) / T(n + 1);
  T grad_elevated[Dims<D>::kMost + 1];
  const auto grad_of_rank = [&](int r) {
    return (grad_weight[n - r] - grad_weight[r == 0 ? 0 : n + 1 - r]) * inverse;
  };
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i <= n; ++i) {
    if constexpr (kInRegisters<D>) {
      grad_elevated[i] = 0;
#pragma unroll(Dims<D>::kUnroll)
      for (int r = 0; r <= n; ++r)
        grad_elevated[i] = s.rank[i] == r ? grad_of_rank(r) : grad_elevated[i];
    } else {
      grad_elevated[i] = grad_of_rank(s.rank[i]);
    }
  }
  T below = 0;
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i < n; ++i) {
    below += grad_elevated[i];
    grad_feature[i] = (below - T(i + 1) * grad_elevated[i + 1]) * scale.value[i];
  }
}

}  // namespace SK_NS
}  // namespace segkernels
