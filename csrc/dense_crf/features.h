// The features of a grid of points: coordinates and an image's channels, divided by their sigmas.
#pragma once

#include <stdint.h>

#include "common/where.h"

namespace segkernels {

// The numbers of ScalarType, and:
constexpr int kUint8 = 4;

struct GridFeatures {
  int64_t batch;
  int32_t axes;     // 1 to 3; the last is x
  int64_t size[3];  // of each axis
  const void* sxy;  // [axes], of x, y, z
  const void* image;
  int image_type;
  int32_t channels;   // of the image
  int64_t stride[5];  // of the image, in elements: batch, channel, then each axis
  const void* srgb;   // [channels]
  void* out;          // [batch, axes + channels, points]; also the type of the sigmas
};

void grid_features_cpu(const Where&, const GridFeatures&, bool is_double);

}  // namespace segkernels
