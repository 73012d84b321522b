// Values of points in the order of a plan, and back, on the CPU. Parallel over channels, or over
// tiles of points.
#include "gaussian_filter/order.h"

#include <limits>

#include "common/parallel_for.h"
#include "gaussian_filter/gaussian_filter.h"
#include "permutohedral/dispatch.h"

namespace segkernels {
namespace {

template <class T>
struct MarkChannel {
  const OrderedValues& o;

  void operator()(int64_t plane) const {
    const T* from = static_cast<const T*>(o.from) + plane * o.points;
    const bool* invalid = o.invalid + plane / o.channels * o.points;
    bool finite = true;
    for (int64_t i = 0; i < o.points; ++i) finite &= invalid[i] | (from[i] - from[i] == T(0));
    o.not_finite[plane] = !finite;
  }
};

template <class T>
struct SortTile {
  const OrderedValues& o;

  int64_t tiles() const { return o.padded / kGaussianTile; }

  void operator()(int64_t item) const {
    const int64_t image = item / tiles(), begin = item % tiles() * kGaussianTile;
    const int64_t end = begin + kGaussianTile;
    const int64_t* index = o.index + image * o.points;
    const bool* invalid = o.invalid + image * o.points;
    const int64_t all = o.channels + o.sums;
    for (int64_t c = 0; c < all; ++c) {
      const int64_t plane = image * o.channels + c;
      const bool ones = c == o.channels;
      const bool finite = ones || !o.not_finite[plane];
      const T* from = static_cast<const T*>(o.from) + plane * o.points;
      T* to = static_cast<T*>(o.to) + image * all * o.padded + c * o.channel_stride;
      for (int64_t p = begin; p < end; ++p) {
        const bool there = p < o.points && finite && !invalid[index[p]];
        to[p * o.point_stride] = !there ? T(0) : ones ? T(1) : from[index[p]];
      }
    }
  }
};

template <class T>
struct UnsortChannel {
  const OrderedValues& o;

  void operator()(int64_t plane) const {
    const int64_t image = plane / o.channels, c = plane % o.channels;
    const int64_t* index = o.index + image * o.points;
    const bool* invalid = o.invalid + image * o.points;
    const T* from = static_cast<const T*>(o.from) + image * (o.channels + o.sums) * o.padded;
    T* to = static_cast<T*>(o.to) + plane * o.points;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (int64_t i = 0; i < o.points; ++i) {
      const T* at = from + index[i] * o.point_stride;
      const bool there = !o.not_finite[plane] && !invalid[i];
      to[i] = there ? at[c * o.channel_stride] : nan;
      if (!o.sums) continue;
      const double sum = double(at[o.channels * o.channel_stride]);
      const double by = sum < o.least ? std::numeric_limits<double>::infinity() : sum;
      to[i] = T(double(to[i]) / by);
    }
  }
};

}  // namespace

void sort_values_cpu(const Where& where, const OrderedValues& o, bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    using T = decltype(scalar);
    parallel_for(where, o.batch * o.channels, MarkChannel<T>{o}, "gaussian_filter mark");
    const SortTile<T> sort{o};
    parallel_for(where, o.batch * sort.tiles(), sort, "gaussian_filter sort");
  });
}

void unsort_values_cpu(const Where& where, const OrderedValues& o, bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    parallel_for(where, o.batch * o.channels, UnsortChannel<decltype(scalar)>{o},
                 "gaussian_filter unsort");
  });
}

}  // namespace segkernels
