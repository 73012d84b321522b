// Values of points in the order of a plan, and back, on the CPU.
#pragma once

#include <stdint.h>

#include "common/where.h"

namespace segkernels {

// Values of points that are not valid, and channels with values that are not finite, become 0 in
// the plan's order, and NaN in the original order.
struct OrderedValues {
  int64_t batch, channels, points;
  int64_t padded;                        // number of points in the plan's order
  int64_t point_stride, channel_stride;  // in the plan's order, within an image
  const int64_t* index;  // [batch, points]: to sort, the point at each place; else its place
  const bool* invalid;   // [batch, points]
  bool* not_finite;      // [batch, channels]
  const void* from;      // to sort: [batch, channels, points]; else in the plan's order
  void* to;              // the other of these
  // One more channel in the plan's order. To sort: ones. Else: what the others are divided by in
  // float64, except where it is below `least`: the result is 0 there.
  bool sums;
  double least;
};

// Also sets not_finite.
void sort_values_cpu(const Where&, const OrderedValues&, bool is_double);

void unsort_values_cpu(const Where&, const OrderedValues&, bool is_double);

}  // namespace segkernels
