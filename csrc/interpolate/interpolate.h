// The native interface of interpolate: forward and backward of a 2-D resampling.
#pragma once

#include "common/where.h"
#include "interpolate/kernels.h"
#include "interpolate/tables.h"

namespace segkernels {

// Arguments of a resampling; planes and inner as in kernels.h.
struct Resampling {
  int64_t planes, inner;
  int64_t in_height, in_width, out_height, out_width;
  double factor_y, factor_x;  // 0: computed from the sizes
  Mode mode;
  bool align_corners;
  Rule rule;

  bool same_size() const { return in_height == out_height && in_width == out_width; }

  // Taps of an output along an axis. On CUDA torch copies a map whose size stays the same: a second
  // tap of weight 0 would turn a neighbour's infinity into NaN.
  int taps() const { return rule == Rule::kCuda && same_size() ? 1 : taps_of(mode); }

  template <class A>
  Geometry<A> geometry() const {
    if (in_width * inner > INT32_MAX || out_width * inner > INT32_MAX || in_height > INT32_MAX ||
        out_height > INT32_MAX) {
      throw std::runtime_error("segkernels: interpolate: a row or column has 2^31 values or more");
    }
    const bool same = same_size();
    return {planes, int32_t(inner),
            make_axis<A>(in_height, out_height, mode, align_corners, factor_y, rule, same),
            make_axis<A>(in_width, out_width, mode, align_corners, factor_x, rule, same)};
  }
};

// f(integral_constant<K>) with the number of taps.
template <class F>
void with_taps(int taps, const F& f) {
  switch (taps) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

template <class F>
void with_taps(const Resampling& r, const F& f) {
  with_taps(r.taps(), f);
}

void interpolate_cpu(const Where&, const Resampling&, ScalarType, const void* input, void* output);
void interpolate_backward_cpu(const Where&, const Resampling&, ScalarType, const void* grad_output,
                              void* grad_input);

void interpolate_cuda(const Where&, const Resampling&, ScalarType, const void* input, void* output);
void interpolate_backward_cuda(const Where&, const Resampling&, ScalarType, const void* grad_output,
                               void* grad_input);

}  // namespace segkernels
