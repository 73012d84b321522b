// The splat of one tile on CUDA, by one thread block.
#pragma once

#include "common/vec.h"
#include "common/where.h"
#include "permutohedral/lattice.h"

namespace segkernels {

// The first step of the splat, from rows to pairs. Defined in filter_cuda.cu.
void splat_pairs(const Where&, const Lattice&, const void* rows, const void* scale, void* pairs,
                 int width, bool is_double);

inline namespace SK_NS {

#if defined(__CUDACC__)

// Sums the tile's entries into its pairs, in the order of the entries. G neighbouring threads share
// a pair, with B vectors of its row each. `rows` [points of the tile, blocks], `scale` [points of
// the tile] or null, and `weights` [entries of the tile, sorted] are the tile's; `pairs` is the
// whole lattice's.
template <class T, int G, int B, class V>
__device__ void splat_tile(const Lattice& l, int32_t tile, const V* rows, const T* weights,
                           const T* scale, V* pairs, int blocks) {
  const int64_t base = int64_t(tile) * tile_points(l.grid) * (l.dims + 1);
  const uint32_t* range = l.pair_range + base;
  const uint16_t* order = l.order + base;
  const int32_t first = l.tile_start[tile];
  const int32_t count = l.tile_start[tile + 1] - first;
  for (int32_t pair = threadIdx.x / G; pair < count; pair += blockDim.x / G) {
    const int begin = range[pair] & 0xFFFF, end = begin + (range[pair] >> 16);
    for (int b = threadIdx.x % G; b < blocks; b += G * B) {
      V sum[B] = {};
#pragma unroll(B < 4 && sizeof(T) == 4 ? 4 : 2)
      for (int i = begin; i < end; ++i) {
        const int p = order[i];
        const T w = scale != nullptr ? weights[i] * scale[p] : weights[i];
        const V* row = rows + p * blocks + b;
#pragma unroll
        for (int k = 0; k < B; ++k) {
          if (b + k * G < blocks) sum[k] = mul_add(w, row[k * G], sum[k]);
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
