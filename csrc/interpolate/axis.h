// One axis of a resampling: the taps of an output (inputs and weights), and the outputs that read
// an input. The arithmetic is that of torch's F.interpolate on the same device, including the
// rounding of source coordinates, which decides what an output reads.
#pragma once

#include <math.h>

#include "common/scalar.h"
#include "common/vec.h"

namespace segkernels {

enum class Mode : int { kNearest = 0, kNearestExact = 1, kBilinear = 2, kBicubic = 3 };

// The arithmetic to follow. For the nearest modes torch has two on the CPU (the general one, and
// one for small outputs and channels_last), and another on CUDA.
enum class Rule : int { kCpu = 0, kCpuSmall = 1, kCuda = 2 };

enum AxisKind : int {
  kIdentity,
  kHalved,       // i >> 1
  kFloor,        // floor(scale * i) in the computing type
  kFloorSingle,  // the same in float
  kExact,        // floor(source + 0.5), for a source coordinate clamped to 0
  kExactDouble,  // floor(scale * (i + 0.5)) in double, rounded to float first
  kExactSingle,  // the same in float
  kLinear,
  kLinearAligned,
  kCubic,
  kCubicAligned,
};

// Sizes are below 2^31; A is float or double.
template <class A>
struct Axis {
  int32_t in, out;
  A scale;    // input steps per output step
  A inverse;  // 1 / scale, or 0: only for estimates
  AxisKind kind;
  bool cuda;
};

// As K, the number of taps: that of the axis' kind, at run time. For float64 on CUDA and for rare
// cases, to which one instance of a kernel is enough.
constexpr int kAnyTaps = 0;

template <int K>
constexpr int kMostTaps = K == kAnyTaps ? 4 : K;

// Weights of the inputs start .. start + K - 1, clamped to the axis.
template <class A, int K>
struct Taps {
  int32_t start;
  A weight[kMostTaps<K>];
};

constexpr int taps_of(Mode mode) {
  return mode == Mode::kBilinear ? 2 : mode == Mode::kBicubic ? 4 : 1;
}

// factor: the scale factor of the source coordinates, or 0 for out / in.
template <class A>
Axis<A> make_axis(int64_t in, int64_t out, Mode mode, bool align_corners, double factor, Rule rule,
                  bool same_size) {
  Axis<A> axis{int32_t(in), int32_t(out), A(0), A(0), kIdentity, rule == Rule::kCuda};
  const bool single = rule != Rule::kCpu && (mode == Mode::kNearest || mode == Mode::kNearestExact);
  if (align_corners) {
    axis.scale = out > 1 ? A(in - 1) / A(out - 1) : A(0);
  } else if (single) {
    axis.scale = A(factor > 0 ? float(1.0 / factor) : float(in) / float(out));
  } else {
    axis.scale = factor > 0 ? A(1.0 / factor) : A(in) / A(out);
  }
  const bool copied = rule == Rule::kCuda ? same_size : in == out;
  switch (mode) {
    case Mode::kNearest:
      axis.kind = single ? kFloorSingle : kFloor;
      if (rule == Rule::kCpuSmall && in == out) {
        axis.kind = kIdentity;
      } else if (rule == Rule::kCpuSmall && out == 2 * in) {
        axis.kind = kHalved;
        axis.scale = A(0.5);
      }
      break;
    case Mode::kNearestExact:
      axis.kind = rule == Rule::kCpu        ? kExact
                  : rule == Rule::kCpuSmall ? kExactDouble
                                            : kExactSingle;
      break;
    case Mode::kBilinear:
      axis.kind = copied ? kIdentity : align_corners ? kLinearAligned : kLinear;
      break;
    case Mode::kBicubic:
      axis.kind = same_size && rule == Rule::kCuda ? kIdentity
                  : align_corners                  ? kCubicAligned
                                                   : kCubic;
      break;
  }
  if (axis.kind == kIdentity) axis.scale = A(1);
  axis.inverse = axis.scale > A(0) ? A(1) / axis.scale : A(0);
  return axis;
}

inline namespace SK_NS {

template <int K, class A>
SK_HD int tap_count([[maybe_unused]] const Axis<A>& axis) {
  if constexpr (K != kAnyTaps) return K;
  return axis.kind < kLinear ? 1 : axis.kind < kCubic ? 2 : 4;
}

// Whether the rules are CUDA's, for the compiler to leave out the others. The emulation of CUDA has
// the CPU's.
#if defined(__CUDA_ARCH__) && !defined(SK_EMULATED)
constexpr bool kOnlyCuda = true;
#else
constexpr bool kOnlyCuda = false;
#endif

// Whether outputs copy inputs. On CUDA an axis that is copied has one tap, and needs no rule.
template <class A>
SK_HD bool copies(const Axis<A>& axis) {
  return !kOnlyCuda && axis.kind == kIdentity;
}

SK_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
SK_HD double fused(double a, double b, double c) { return fma(a, b, c); }

SK_HD int32_t clamp_index(int32_t i, int32_t size) { return i < 0 ? 0 : i >= size ? size - 1 : i; }

// The source coordinate of output i. torch's compilers fuse the multiply and the add.
template <class A>
SK_HD A source_of(const Axis<A>& axis, int32_t i) {
  if (axis.kind == kLinearAligned || axis.kind == kCubicAligned) return axis.scale * A(i);
  const A source = fused(axis.scale, A(i) + A(0.5), A(-0.5));
  return axis.kind != kCubic && source < A(0) ? A(0) : source;
}

template <class A>
SK_HD int32_t nearest_of(const Axis<A>& axis, int32_t i) {
  int32_t index = i;
  if (kOnlyCuda && axis.kind != kFloorSingle && axis.kind != kExactSingle) return i;
  switch (axis.kind) {
    case kHalved:
      return i >> 1;
    case kFloor:
      index = int32_t(floorf(float(axis.scale * A(i))));
      break;
    case kFloorSingle:
      index = int32_t(floorf(float(axis.scale) * float(i)));
      break;
    case kExact:
      index = int32_t(floorf(float(double(source_of(axis, i)) + 0.5)));
      break;
    case kExactDouble:
      index = int32_t(floorf(float((double(i) + 0.5) * double(axis.scale))));
      break;
    case kExactSingle:
      index = int32_t(floorf((float(i) + 0.5f) * float(axis.scale)));
      break;
    default:
      return i;
  }
  return index < axis.in ? index : axis.in - 1;
}

// Cubic convolution with a = -0.75 (Keys 1981, eq. 4): |x| <= 1, and 1 < |x| < 2.
template <class A>
SK_HD A cubic_near(A x) {
  return fused(fused(A(1.25), x, A(-2.25)) * x, x, A(1));
}

template <class A>
SK_HD A cubic_far(A x) {
  return fused(fused(fused(A(-0.75), x, A(3.75)), x, A(-6)), x, A(3));
}

template <class A>
SK_HD int32_t floor_of(const Axis<A>& axis, A source) {
  // torch's floorf first rounds a double to float, except in the bilinear kernels on CUDA.
  const bool linear = axis.kind == kLinear || axis.kind == kLinearAligned;
  const int32_t index = axis.cuda && linear ? int32_t(source) : int32_t(floorf(float(source)));
  return index < axis.in ? index : axis.in - 1;
}

template <int K, class A>
SK_HD Taps<A, K> taps_at(const Axis<A>& axis, int32_t i) {
  Taps<A, K> taps;
  const int count = tap_count<K>(axis);
  if (count == 1) {
    taps.start = nearest_of(axis, i);
    taps.weight[0] = A(1);
  } else if (copies(axis)) {
    taps.start = i;
    for (int k = 0; k < K; ++k) taps.weight[k] = A(k == 0);
  } else if constexpr (K != 1) {
    const A source = source_of(axis, i);
    const int32_t index = floor_of(axis, source);
    A t = source - A(index);
    // floorf may round a double up; torch's bicubic kernel on CUDA keeps the negative difference.
    if (t < A(0) && !(axis.cuda && count == 4)) t = A(0);
    if (t > A(1)) t = A(1);
    if (count == 2) {
      taps.start = index;
      taps.weight[0] = A(1) - t;
      taps.weight[1] = t;
    } else if constexpr (K != 2) {
      taps.start = index - 1;
      taps.weight[0] = cubic_far(t + A(1));
      taps.weight[1] = cubic_near(t);
      taps.weight[2] = cubic_near(A(1) - t);
      taps.weight[3] = cubic_far(A(1) - t + A(1));
    }
  }
  return taps;
}

// The input that tap k reads. An identity reads one input only: a NaN next to it must not reach the
// output through a zero weight.
template <class A>
SK_HD int32_t tap_position(const Axis<A>& axis, int32_t start, int k) {
  return copies(axis) ? start : clamp_index(start + k, axis.in);
}

template <int K, class A>
SK_HD int32_t start_at(const Axis<A>& axis, int32_t i) {
  const int count = tap_count<K>(axis);
  if (count == 1) return nearest_of(axis, i);
  if (copies(axis)) return i;
  return floor_of(axis, source_of(axis, i)) - (count == 4);
}

// The first output whose taps start at `start` or later; `out` if none does. Starts are monotonic,
// so a guess is corrected by steps with the function of the forward pass.
template <int K, class A>
SK_HD int32_t first_output(const Axis<A>& axis, int32_t start) {
  if (start_at<K>(axis, 0) >= start) return 0;
  if (axis.scale <= A(0)) return axis.out;
  const bool centred = axis.kind == kLinear || axis.kind == kCubic || axis.kind == kExact ||
                       axis.kind == kExactDouble || axis.kind == kExactSingle;
  const A shift = axis.kind == kLinear || axis.kind == kCubic ? A(0.5) : A(0);
  const A guess =
      (A(start + (tap_count<K>(axis) == 4)) + shift) * axis.inverse - (centred ? A(0.5) : A(0));
  int32_t i = guess < A(0) ? 0 : guess > A(axis.out) ? axis.out : int32_t(guess);
  if (i > axis.out) i = axis.out;  // float(out) may exceed out
  while (i > 0 && start_at<K>(axis, i - 1) >= start) --i;
  while (i < axis.out && start_at<K>(axis, i) < start) ++i;
  return i;
}

// Outputs [first, last) read input j.
template <int K, class A>
SK_HD int32_t first_reader(const Axis<A>& axis, int32_t j) {
  return j <= 0 ? 0 : first_output<K>(axis, copies(axis) ? j : j - tap_count<K>(axis) + 1);
}

template <int K, class A>
SK_HD int32_t last_reader(const Axis<A>& axis, int32_t j) {
  return j >= axis.in - 1 ? axis.out : first_output<K>(axis, j + 1);
}

// As first_reader of input `begin` and last_reader of input `end` - 1.
struct Readers {
  int32_t first, last;
};

template <int K, class A>
SK_HD Readers readers_of(const Axis<A>& axis, int32_t begin, int32_t end) {
  Readers readers{0, 0};
  const int32_t before = copies(axis) ? 0 : tap_count<K>(axis) - 1;
  // A loop of two, because the search is long, and inlined.
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const bool edge = side == 0 ? begin <= 0 : end >= axis.in;
    const int32_t start = side == 0 ? begin - before : end;
    readers.first = readers.last;
    readers.last = edge ? side * axis.out : first_output<K>(axis, start);
  }
  return readers;
}

// The sum of the taps' values times their weights: value(k) is called once a tap.
template <int K, class A, class Value>
SK_HD A sum_taps(const Axis<A>& axis, const Taps<A, K>& taps, const Value& value) {
  const int count = tap_count<K>(axis);
  A sum = value(0);
  if (count > 1) sum = taps.weight[0] * sum;
#pragma unroll
  for (int k = 1; k < kMostTaps<K>; ++k) {
    if (k < count) sum = mul_add(taps.weight[k], value(k), sum);
  }
  return sum;
}

// The weight of input j in output i.
template <int K, class A>
SK_HD A weight_of(const Axis<A>& axis, int32_t i, int32_t j) {
  const Taps<A, K> taps = taps_at<K>(axis, i);
  A sum = A(0);
#pragma unroll
  for (int k = 0; k < kMostTaps<K>; ++k) {
    const bool read = k < tap_count<K>(axis) && tap_position(axis, taps.start, k) == j;
    if (read) sum += taps.weight[k];
  }
  return sum;
}

}  // namespace SK_NS
}  // namespace segkernels
