// The element types of tensors. float16 and bfloat16 are storage types: values are widened to float
// for arithmetic and rounded to nearest even on the way back. The host's conversions are
// branch-free integer arithmetic, which compilers vectorise.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace segkernels {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Numbered as in segkernels/ops/_dtypes.py.
enum class ScalarType : int { kHalf = 0, kBFloat16 = 1, kFloat = 2, kDouble = 3 };

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

// The type in which values of T are computed and accumulated.
template <class T>
using Acc = typename AccOf<T>::type;

// f(T{}) with the type that `type` names.
template <class F>
void with_scalar_type(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::kHalf:
      return f(Half{});
    case ScalarType::kBFloat16:
      return f(BFloat16{});
    case ScalarType::kFloat:
      return f(float{});
    case ScalarType::kDouble:
      return f(double{});
  }
  throw std::runtime_error("segkernels: unknown scalar type");
}

// f(A{}) with the type in which values of `type` are computed.
template <class F>
void with_computing_type(ScalarType type, const F& f) {
  if (type == ScalarType::kDouble) return f(double{});
  f(float{});
}

// f(T{}) with the type that `type` names, of those that are computed in A.
template <class A, class F>
void with_stored_type(ScalarType type, const F& f) {
  with_scalar_type(type, [&](auto scalar) {
    if constexpr (std::is_same_v<Acc<decltype(scalar)>, A>) f(scalar);
  });
}

inline namespace SK_NS {

SK_HD float widen(Half h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h.bits));
#else
  const int32_t sign = int32_t(h.bits & 0x8000u) << 16;
  const int32_t magnitude = h.bits & 0x7FFF;
  const int32_t normal = (magnitude << 13) + (112 << 23);
  const int32_t infinite = (magnitude << 13) + (224 << 23);  // or NaN
  const int32_t tiny = bits_of<int32_t>(float(magnitude) * 0x1p-24f);
  const int32_t bits = magnitude < 0x0400 ? tiny : magnitude < 0x7C00 ? normal : infinite;
  return bits_of<float>(bits | sign);
#endif
}

SK_HD float widen(BFloat16 b) { return bits_of<float>(int32_t(uint32_t(b.bits) << 16)); }
SK_HD float widen(float f) { return f; }
SK_HD double widen(double d) { return d; }

SK_HD void narrow(float f, Half& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __half_as_ushort(__float2half_rn(f));
#else
  const int32_t sign = (bits_of<int32_t>(f) >> 16) & 0x8000;
  const int32_t magnitude = bits_of<int32_t>(f) & 0x7FFFFFFF;
  const int32_t rounded = (magnitude - (112 << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13;
  const int32_t normal = rounded < 0x7C00 ? rounded : 0x7C00;
  // The last bit of 0.5f is the smallest float16, so this sum rounds as float16 does.
  const int32_t tiny = bits_of<int32_t>(bits_of<float>(magnitude) + 0.5f) - bits_of<int32_t>(0.5f);
  const int32_t finite = magnitude < 0x38800000 ? tiny : normal;
  out.bits = uint16_t(sign | (magnitude > 0x7F800000 ? 0x7E00 : finite));
#endif
}

SK_HD void narrow(float f, BFloat16& out) {
#if defined(__CUDA_ARCH__)
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(f));
#else
  const uint32_t bits = uint32_t(bits_of<int32_t>(f));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
#endif
}

SK_HD void narrow(float f, float& out) { out = f; }
SK_HD void narrow(double d, double& out) { out = d; }

template <class T>
SK_HD T narrow_to(Acc<T> value) {
  T out;
  narrow(value, out);
  return out;
}

}  // namespace SK_NS
}  // namespace segkernels
