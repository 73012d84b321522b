// float16 and bfloat16 in one instance of a kernel: the type is a number at run time, and the
// conversions of both are computed. For kernels that wait for memory, and for rare cases.
#pragma once

#include <type_traits>

#include "common/scalar.h"

namespace segkernels {

struct Any16 {
  uint16_t bits;
};

inline namespace SK_NS {

// Converts between T and its computing type.
template <class T>
struct Format {
  SK_HD Acc<T> wide(T value) const { return widen(value); }
  SK_HD T narrow(Acc<T> value) const { return narrow_to<T>(value); }
};

template <>
struct Format<Any16> {
  bool half;
  SK_HD float wide(Any16 v) const {
    const float a = widen(Half{v.bits}), b = widen(BFloat16{v.bits});
    return half ? a : b;
  }
  SK_HD Any16 narrow(float f) const {
    const uint16_t a = narrow_to<Half>(f).bits, b = narrow_to<BFloat16>(f).bits;
    return {half ? a : b};
  }
};

template <class T>
Format<T> format_of(ScalarType type) {
  if constexpr (std::is_same_v<T, Any16>) {
    return {type == ScalarType::kHalf};
  } else {
    return {};
  }
}

}  // namespace SK_NS
}  // namespace segkernels
