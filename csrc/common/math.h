// exp and log for the CPU's SIMD loops. For float, on scalars and vectors, with an error of about 1
// ulp (range reduction and minimax polynomials after Cody and Waite, as in Moshier's Cephes); for
// double, the library's functions lane by lane.
#pragma once

#include <string.h>

#include "common/vec.h"

namespace segkernels {
inline namespace SK_NS {

template <class To, class From>
SK_HD To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_of keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <int W>
struct FloatMath {
  using V = Vec<float, W>;
  using I = Vec<int32_t, W>;
  using U = Vec<uint32_t, W>;

  // For x <= 0, as softmax needs it: 0 below -87, and NaN for NaN.
  static SK_HD V exp_of(V x) {
    const V zero{};
    const V least = zero - 87.0f;
    const V clamped = x < least ? least : x;
    // Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold.
    const V shifted = clamped * 1.44269504f + 12582912.0f;
    const V n = shifted - 12582912.0f;
    V r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // Unsigned, because the shift drops the high bits.
    const V scale = bits_of<V>((bits_of<U>(shifted) + 127u) << 23);
    return x < least ? zero : p * scale;
  }

  // For normal x > 0.
  static SK_HD V log_of(V x) {
    const int32_t root_half = 0x3F3504F3;
    const I bits = bits_of<I>(x) - root_half;
    const I exponent = bits >> 23;
    // The same trick converts small integers to float.
    const V e = bits_of<V>(exponent + 0x4B400000) - 12582912.0f;
    const V m = bits_of<V>((bits & 0x007FFFFF) + root_half) - 1.0f;
    V p = m * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * m * m - 2.12194440e-4f * e - 0.5f * m * m;
    return m + p + 0.693359375f * e;
  }
};

template <class V>
struct MathOf {  // vectors of double
  static SK_HD V exp_of(V x) {
    for (int i = 0; i < int(sizeof(V) / sizeof(double)); ++i) x[i] = exp(x[i]);
    return x;
  }
  static SK_HD V log_of(V x) {
    for (int i = 0; i < int(sizeof(V) / sizeof(double)); ++i) x[i] = log(x[i]);
    return x;
  }
};
template <>
struct MathOf<double> {
  static SK_HD double exp_of(double x) { return exp(x); }
  static SK_HD double log_of(double x) { return log(x); }
};
template <>
struct MathOf<float> : FloatMath<1> {};
template <>
struct MathOf<Vec<float, 4>> : FloatMath<4> {};
template <>
struct MathOf<Vec<float, 8>> : FloatMath<8> {};

template <class V>
SK_HD V exp_of(V x) {
  return MathOf<V>::exp_of(x);
}
template <class V>
SK_HD V log_of(V x) {
  return MathOf<V>::log_of(x);
}

// Lane i of a vector, or the scalar itself.
template <class T, class V>
SK_HD T lane_of(const V& v, int i) {
  return v[i];
}
template <>
SK_HD float lane_of<float, float>(const float& v, int) {
  return v;
}
template <>
SK_HD double lane_of<double, double>(const double& v, int) {
  return v;
}

template <class T, class V>
SK_HD T max_of(const V& v) {
  T high = lane_of<T>(v, 0);
  for (int i = 1; i < int(sizeof(V) / sizeof(T)); ++i)
    high = lane_of<T>(v, i) > high ? lane_of<T>(v, i) : high;
  return high;
}

template <class T, class V>
SK_HD T sum_of(const V& v) {
  T sum = lane_of<T>(v, 0);
  for (int i = 1; i < int(sizeof(V) / sizeof(T)); ++i) sum += lane_of<T>(v, i);
  return sum;
}

}  // namespace SK_NS
}  // namespace segkernels
