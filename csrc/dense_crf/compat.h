// The compatibility transform of vertex rows.
#pragma once

#include "common/vec.h"

namespace segkernels {
inline namespace SK_NS {

// rows[vertex] *= compat, a factor a channel.
template <class V>
struct ScaleChannels {
  V* rows;
  const V* compat;
  int blocks;

  SK_HD void operator()(int64_t vertex, int block) const {
    rows[vertex * blocks + block] = rows[vertex * blocks + block] * compat[block];
  }
};

// out[vertex] = compat * in[vertex]. `transposed` is compat by columns: [width of in][blocks of
// out].
template <class T, class V>
struct MixChannels {
  const T* in;
  V* out;
  const V* transposed;
  int width, blocks;

  SK_HD void operator()(int64_t vertex, int block) const {
    const T* row = in + vertex * width;
    V sum = row[0] * transposed[block];
    for (int c = 1; c < width; ++c) sum = mul_add(row[c], transposed[c * blocks + block], sum);
    out[vertex * blocks + block] = sum;
  }
};

}  // namespace SK_NS
}  // namespace segkernels
