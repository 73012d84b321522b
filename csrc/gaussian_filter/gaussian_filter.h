// The exact Gaussian filter on the CPU: every query with every key tile within reach.
#pragma once

#include <stdint.h>

#include "common/simd.h"
#include "common/where.h"

namespace segkernels {

constexpr int kGaussianTile = 64;  // points a tile; TILE in ops/gaussian_filter/points.py

// The points of each image, padded to whole tiles: features (B, d, points), and the minimum and
// maximum of each tile (B, d, points / 64).
struct GaussianPoints {
  const void* features;
  const void* low;
  const void* high;
  int64_t points;
};

// Rows are (B, points, channels). With `a` null: out (B, channels, query points) = K b. Else: out
// (B, d, query points) = sum_j k_ij <a_i, b_j> (y_j - x_i), with `a` (B, channels, query points).
// Squared distances above `reach` have weight zero.
struct GaussianFilter {
  GaussianPoints queries;
  GaussianPoints keys;
  int64_t batch;
  int dims;
  int channels;
  double reach;
  const void* a;
  const void* b;
  void* out;
};

// Defined in gaussian_filter.simd.cpp.
template <Isa kIsa>
void gaussian_filter(const Where&, const GaussianFilter&, bool is_double);

void gaussian_filter_cpu(const Where& where, const GaussianFilter& f, bool is_double);

}  // namespace segkernels
