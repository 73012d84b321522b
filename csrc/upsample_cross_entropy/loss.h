// The losses of one pixel: softmax cross entropy, and binary cross entropy of one logit. Each reads
// the pixel's logits class by class and returns the loss and the weight by which a mean divides.
// Backward: the gradient of the pixel's logits, from what forward kept (softmax: the largest logit
// and the sum of exponentials relative to it. Their log-sum-exp would lose the sum where the logits
// are large).
#pragma once

#include "common/status.h"
#include "interpolate/pixels.h"

namespace segkernels {

enum class TargetType : int {
  kUint8 = 0,
  kInt16 = 1,
  kInt32 = 2,
  kInt64 = 3,
  kFloat = 4,
  kDouble = 5
};

inline namespace SK_NS {

SK_HD float log_fast(float x) { return logf(x); }
SK_HD double log_fast(double x) { return log(x); }

// log(1 + x) for 0 <= x <= 1.
SK_HD float log1p_fast(float x) {
#if defined(__CUDA_ARCH__)
  return log1pf(x);
#else
  // Corrects the rounding of 1 + x (Kahan).
  const float u = 1.0f + x;
  const float d = u - 1.0f;
  const float l = log_of(u) * (x / (d == 0.0f ? 1.0f : d));
  return d == 0.0f ? x : l;
#endif
}
SK_HD double log1p_fast(double x) { return log1p(x); }

SK_HD int64_t label_at(const void* target, TargetType type, int64_t i) {
  switch (type) {
    case TargetType::kUint8:
      return static_cast<const uint8_t*>(target)[i];
    case TargetType::kInt16:
      return static_cast<const int16_t*>(target)[i];
    case TargetType::kInt32:
      return static_cast<const int32_t*>(target)[i];
    default:
      return static_cast<const int64_t*>(target)[i];
  }
}

// Softmax cross entropy, with class weights and label smoothing:
//   (1 - s) w_t (lse - v_t) + s / C sum_c w_c (lse - v_c)
//   lse = log sum_c exp(v_c), computed as max + log sum_c exp(v_c - max)
template <class A>
struct SoftmaxLoss {
  static constexpr int kKept = 2;      // values kept for each pixel: max, sum of exponentials
  static constexpr int kChannels = 4;  // classes a thread of the backward pass, at most
  const void* target;
  TargetType target_type;
  int64_t ignore_index;
  const A* weight;  // [classes], or null
  A smoothing;
  int32_t classes;
  int32_t* status;

  // The pixel's label; -1 if ignored.
  SK_HD int32_t label(int64_t pixel) const {
    const int64_t label = label_at(target, target_type, pixel);
    if (label == ignore_index) return -1;
    if (label >= 0 && label < classes) return int32_t(label);
    report(status, kLabelOutOfRange);
    return -1;
  }

  SK_HD A weight_of_class(int32_t c) const { return weight != nullptr ? weight[c] : A(1); }

  // Sums over a pixel's classes, in order: of exp(v_c - best), w_c (best - v_c) and w_c.
  struct Sums {
    A best, sum, below, weights, picked;
  };

  SK_HD Sums start() const { return {A(0), A(0), A(0), A(0), A(0)}; }

  SK_HD void add(Sums& s, A value, int32_t c, int32_t label) const {
    const bool wins = c == 0 || value > s.best;
    const A d = c == 0 || value == s.best ? A(0) : wins ? s.best - value : value - s.best;
    const A e = exp_fast(d);
    s.sum = c == 0 ? A(1) : wins ? s.sum * e + A(1) : s.sum + e;
    s.best = wins ? value : s.best;
    s.picked = c == label ? value : s.picked;
    if (smoothing != A(0)) {
      // A new maximum raises the distance of the classes before; else this class adds its own.
      s.below = mul_add(wins ? s.weights : weight_of_class(c), -d, s.below);
      s.weights += weight_of_class(c);
    }
  }

  // The loss and the weight of pixel i. Stores what the backward pass reads.
  SK_HD A finish(const Sums& s, int64_t i, int32_t label, A* kept, A& pixel_weight) const {
    // The softmax of an infinite maximum is NaN.
    const A sum = s.best - s.best == A(0) ? s.sum : A(NAN);
    keep(kept, i, s.best, sum);
    return value(log_fast(sum), s.best - s.picked, s.below, s.weights, label, pixel_weight);
  }

  SK_HD static void keep(A* kept, int64_t i, A best, A sum) {
    kept[kKept * i] = best;
    kept[kKept * i + 1] = sum;
  }

  // From log sum_c exp(v_c - max), max - v_t, sum_c w_c (max - v_c) and sum_c w_c.
  SK_HD A value(A log_sum, A below_max, A below, A weights, int32_t label, A& pixel_weight) const {
    pixel_weight = A(0);
    if (label < 0) return A(0);
    pixel_weight = weight_of_class(label);
    A loss = pixel_weight * (log_sum + below_max);
    if (smoothing != A(0)) {
      loss = (A(1) - smoothing) * loss + smoothing / A(classes) * (weights * log_sum + below);
    }
    return loss;
  }

  // Factors that the gradients of all classes of a pixel share, times `scale`.
  struct Pixel {
    A best, softmax, picked, smooth;  // softmax: the factor of exp(v_c - best)
    int32_t label;
  };

  SK_HD Pixel pixel(const A* kept, int64_t i, A scale, A weights) const {
    Pixel p{A(0), A(0), A(0), A(0), label(i)};
    if (p.label < 0) return p;
    p.best = kept[kKept * i];
    p.picked = scale * (A(1) - smoothing) * weight_of_class(p.label);
    p.softmax = p.picked;
    if (smoothing != A(0)) {  // or else 0 times the infinite weight of an absent class
      p.smooth = scale * smoothing / A(classes);
      p.softmax += p.smooth * weights;
    }
    p.softmax /= kept[kKept * i + 1];
    return p;
  }

  SK_HD A gradient(const Pixel& p, A value, int32_t c) const {
    if (p.label < 0) return A(0);
    A g = p.softmax * exp_fast(value - p.best);
    if (c == p.label) g -= p.picked;
    if (smoothing != A(0)) g -= p.smooth * weight_of_class(c);
    return g;
  }
};

// Binary cross entropy with logits: w ((1 - y) v + (1 + (p - 1) y) log(1 + exp(-v))).
template <class A>
struct BinaryLoss {
  static constexpr int kChannels = 1;
  const void* target;
  TargetType target_type;
  int64_t ignore_index;  // for integer targets
  const A* weight;       // per pixel, or null
  const A* pos_weight;   // one value, or null
  int32_t* status;

  // 0, or -1 for an ignored pixel.
  SK_HD int32_t label(int64_t i) const {
    if (target_type == TargetType::kFloat || target_type == TargetType::kDouble) return 0;
    const int64_t label = label_at(target, target_type, i);
    if (label == ignore_index) return -1;
    if (label == 0 || label == 1) return 0;
    report(status, kLabelOutOfRange);
    return -1;
  }

  SK_HD A truth(int64_t i) const {
    if (target_type == TargetType::kFloat) return A(static_cast<const float*>(target)[i]);
    if (target_type == TargetType::kDouble) return A(static_cast<const double*>(target)[i]);
    return A(label_at(target, target_type, i));
  }

  struct Pixel {
    A falls, rises;  // loss = falls * v + rises * log(1 + exp(-v)); both 0 for an ignored pixel
  };

  SK_HD Pixel pixel(const A*, int64_t i, A scale, A) const {
    if (label(i) < 0) return {A(0), A(0)};
    const A y = truth(i), p = pos_weight != nullptr ? *pos_weight : A(1);
    const A w = weight != nullptr ? scale * weight[i] : scale;
    return {w * (A(1) - y), w * (A(1) + (p - A(1)) * y)};
  }

  struct Sums {
    A value;
  };

  SK_HD Sums start() const { return {A(0)}; }
  SK_HD void add(Sums& s, A value, int32_t, int32_t) const { s.value = value; }

  SK_HD A finish(const Sums& s, int64_t i, int32_t label, A*, A& pixel_weight) const {
    pixel_weight = A(0);
    if (label < 0) return A(0);
    pixel_weight = A(1);
    const Pixel p = pixel(nullptr, i, A(1), A(0));
    return value(p, s.value);
  }

  SK_HD static A value(const Pixel& p, A v) {
    // log(1 + exp(-v)) without overflow or cancellation.
    const A softplus = log1p_fast(exp_fast(v < A(0) ? v : -v)) + (v < A(0) ? -v : A(0));
    return p.falls * v + p.rises * softplus;
  }

  SK_HD A gradient(const Pixel& p, A v, int32_t) const { return gradient_of(p, v); }

  SK_HD static A gradient_of(const Pixel& p, A v) {
    const A e = exp_fast(v < A(0) ? v : -v);
    const A g = p.falls - p.rises * ((v < A(0) ? A(1) : e) / (A(1) + e));
    return p.falls == A(0) && p.rises == A(0) ? A(0) : g;
  }
};

}  // namespace SK_NS
}  // namespace segkernels
