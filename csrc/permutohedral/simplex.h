// The simplex that contains a point, and the point's barycentric weights (Adams et al. 2010,
// section 3). Rounding and ties are those of Kraehenbuehl and Koltun's code, to agree with its
// results. Comparisons here decide vertices, so the build disables fused multiply-adds.
#pragma once

#include "common/hd.h"

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
  T value[D];  // sqrt(2/3) (d+1) / sqrt((i+1)(i+2)): unit standard deviation for the blur
};

template <class T, int D>
struct Simplex {
  int32_t rem[D + 1];   // the nearest remainder-0 vertex
  int32_t rank[D + 1];  // of each coordinate, by descending distance from that vertex
  T sorted[D + 1];      // distance / (d+1), by rank
};

// False for features that are not finite (sets `finite`) or beyond the exact range.
template <class T, int D>
SK_HD bool find_simplex(const T (&feature)[D], const Scale<T, D>& scale, Simplex<T, D>& s,
                        bool& finite) {
  T elevated[D + 1];
  T sum = 0;
#pragma unroll
  for (int j = D; j > 0; --j) {
    const T c = feature[j - 1] * scale.value[j - 1];
    elevated[j] = sum - T(j) * c;
    sum += c;
  }
  elevated[0] = sum;

  finite = true;
  bool inside = true;
#pragma unroll
  for (int i = 0; i < D; ++i) finite = finite && feature[i] - feature[i] == T(0);
#pragma unroll
  for (int i = 0; i <= D; ++i)
    inside = inside && elevated[i] < Limit<T>::value && elevated[i] > -Limit<T>::value;
  if (!finite || !inside) return false;

  T rest[D + 1];
  int32_t plane = 0;
#pragma unroll
  for (int i = 0; i <= D; ++i) {
    const T rounded = round_half_even(elevated[i] * (T(1) / T(D + 1)));
    rest[i] = elevated[i] - rounded * T(D + 1);
    s.rem[i] = int32_t(rounded) * (D + 1);
    s.rank[i] = 0;
    plane += int32_t(rounded);
  }
#pragma unroll
  for (int i = 0; i < D; ++i) {
#pragma unroll
    for (int j = i + 1; j <= D; ++j) {
      const int32_t less = rest[i] < rest[j];
      s.rank[i] += less;
      s.rank[j] += 1 - less;
    }
  }
  // The rounded point may be off the plane of sum 0: move it back along the axes with the largest
  // error.
#pragma unroll
  for (int i = 0; i <= D; ++i) {
    s.rank[i] += plane;
    const int32_t turn = s.rank[i] < 0 ? D + 1 : s.rank[i] > D ? -(D + 1) : 0;
    s.rank[i] += turn;
    s.rem[i] += turn;
    rest[i] = (elevated[i] - T(s.rem[i])) * (T(1) / T(D + 1));
  }
#if defined(__CUDA_ARCH__)
  // Scatter by rank, as selects: registers cannot be indexed at run time.
#pragma unroll
  for (int r = 0; r <= D; ++r) {
    s.sorted[r] = 0;
#pragma unroll
    for (int i = 0; i <= D; ++i) s.sorted[r] = s.rank[i] == r ? rest[i] : s.sorted[r];
  }
#else
  for (int i = 0; i <= D; ++i) s.sorted[s.rank[i]] = rest[i];
#endif
  return true;
}

// The weights of the d+1 vertices.
template <class T, int D>
SK_HD void barycentric(const Simplex<T, D>& s, T (&weight)[D + 1]) {
#pragma unroll
  for (int k = 1; k <= D; ++k) weight[k] = s.sorted[D - k] - s.sorted[D + 1 - k];
  weight[0] = s.sorted[D] + (T(1) - s.sorted[0]);
}

// The transpose of features -> weights, for fixed ranks.
template <class T, int D>
SK_HD void simplex_grad(const Simplex<T, D>& s, const Scale<T, D>& scale,
                        const T (&grad_weight)[D + 1], T (&grad_feature)[D]) {
  T grad_elevated[D + 1];
#pragma unroll
  for (int i = 0; i <= D; ++i) {
    grad_elevated[i] = 0;
#pragma unroll
    for (int r = 0; r <= D; ++r) {
      const T g = (grad_weight[D - r] - grad_weight[r == 0 ? 0 : D + 1 - r]) * (T(1) / T(D + 1));
      grad_elevated[i] = s.rank[i] == r ? g : grad_elevated[i];
    }
  }
  T below = 0;
#pragma unroll
  for (int i = 0; i < D; ++i) {
    below += grad_elevated[i];
    grad_feature[i] = (below - T(i + 1) * grad_elevated[i + 1]) * scale.value[i];
  }
}

}  // namespace SK_NS
}  // namespace segkernels
