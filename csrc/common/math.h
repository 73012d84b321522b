// exp and log for the CPU's SIMD loops: float ones that a compiler vectorises (about 1 ulp from exact; the range reduction and
// polynomials are the classical minimax ones of Cody and Waite), double ones from the library.
#pragma once

#include <math.h>
#include <string.h>

#include "common/hd.h"

namespace segkernels {
inline namespace SK_NS {

SK_HD float from_bits(int32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

SK_HD int32_t to_bits(float f) {
  int32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

// For x <= 0, as softmax needs it; 0 below -87. NaN stays NaN.
SK_HD float exp_of(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = floorf(clamped * 1.44269504f + 0.5f);
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scaled = p * from_bits((int32_t(n) + 127) << 23);
  return x < -87.0f ? 0.0f : scaled;
}

SK_HD double exp_of(double x) { return exp(x); }

// For normal x > 0.
SK_HD float log_of(float x) {
  const int32_t bits = to_bits(x) - 0x3F3504F3;  // of sqrt(1/2)
  const float e = float(bits >> 23);
  const float m = from_bits((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
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

SK_HD double log_of(double x) { return log(x); }

}  // namespace SK_NS
}  // namespace segkernels
