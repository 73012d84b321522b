// The taps of a kernel that a box of outputs needs, along one axis.
#pragma once

#include <stdint.h>

namespace segkernels::dilated {

struct TapRange {
  int first, last;  // empty: last < first
};

inline int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Through tap k, outputs start .. start + extent - 1 read `extent` inputs from start + k * dilation
// - padding on. The taps that read an input in 0 .. size - 1 are a contiguous range.
inline TapRange tap_range(int64_t start, int64_t extent, int64_t size, int kernel, int dilation,
                          int padding) {
  const int64_t first = ceil_div(padding - start - extent + 1, dilation);
  const int64_t last = floor_div(size - 1 + padding - start, dilation);
  return {int(first > 0 ? (first < kernel ? first : kernel) : 0),
          int(last < kernel - 1 ? (last < -1 ? -1 : last) : kernel - 1)};
}

}  // namespace segkernels::dilated
