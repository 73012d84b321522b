// The splat of one tile on CUDA, by the threads of one block.
#pragma once

#include "common/vec.h"
#include "permutohedral/lattice.h"

namespace segkernels {
inline namespace SK_NS {

#if defined(__CUDACC__)

// Sums the tile's entries into its pairs: G neighbouring threads a pair, each B vectors of its row,
// in the order of the entries. entry(i) is the tile's i-th entry, `rows` [points, blocks] are the
// tile's, `pairs` those of the whole lattice.
template <class T, int G, int B, class V, class E>
__device__ void splat_tile(const Lattice& l, int32_t tile, const V* rows, const E& entry, V* pairs,
                           int blocks) {
  const uint32_t* range = l.pair_range + int64_t(tile) * tile_points(l.grid) * (l.dims + 1);
  const int32_t first = l.tile_start[tile];
  const int32_t count = l.tile_start[tile + 1] - first;
  for (int32_t pair = threadIdx.x / G; pair < count; pair += blockDim.x / G) {
    const int begin = range[pair] & 0xFFFF, end = begin + (range[pair] >> 16);
    for (int b = threadIdx.x % G; b < blocks; b += G * B) {
      V sum[B] = {};
#pragma unroll(B < 4 ? 4 : 2)
      for (int i = begin; i < end; ++i) {
        const Entry<T> e = entry(i);
        const V* row = rows + e.index * blocks + b;
#pragma unroll
        for (int k = 0; k < B; ++k) {
          if (b + k * G < blocks) sum[k] = mul_add(e.weight, row[k * G], sum[k]);
        }
      }
      V* to = pairs + int64_t(first + pair) * blocks + b;
#pragma unroll
      for (int k = 0; k < B; ++k) {
        if (b + k * G < blocks) to[k * G] = sum[k];
      }
    }
  }
}

#endif

}  // namespace SK_NS
}  // namespace segkernels
