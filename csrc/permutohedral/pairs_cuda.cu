// The pairs of every tile: a block a tile sorts the tile's entries by vertex and numbers the runs,
// with CUB's collectives. The splat then sums entries into pairs in this fixed order.
#include <cub/block/block_discontinuity.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

#include "permutohedral/build_cuda.h"
#include "permutohedral/lattice_cuda.h"

namespace segkernels {
namespace {

struct Differs {
  SK_HD bool operator()(uint32_t a, uint32_t b) const { return a != b; }
};

struct Larger {
  SK_HD int operator()(int a, int b) const { return a < b ? b : a; }
};

// One tile a block: a stable sort of the entries by vertex, so that a pair's entries are in the
// order of the points. A run of one vertex is cut into pairs of at most kLongestPair entries, and
// pairs are numbered by length, longest first, so that the threads of a warp sum about as many.
template <int I>
__global__ void __launch_bounds__(kTile)
    number_pairs_kernel(Lattice l, const uint32_t* vertex_of_entry, int bits) {
  using Sort = cub::BlockRadixSort<uint32_t, kTile, I, uint16_t>;
  using Heads = cub::BlockDiscontinuity<uint32_t, kTile>;
  using Scan = cub::BlockScan<int, kTile>;
  __shared__ union {
    typename Sort::TempStorage sort;
    typename Heads::TempStorage heads;
    typename Scan::TempStorage scan;
  } shared;
  __shared__ uint16_t of_pair[kTile * I + 1];  // start of each pair; later its number
  __shared__ int rest;

  const int32_t tile = blockIdx.x;
  const int entries = kTile * (l.dims + 1);
  const int64_t base = int64_t(tile) * entries;
  const uint32_t none = (1u << bits) - 1;  // sorts last
  uint32_t vertex[I];
  uint16_t entry[I];
#pragma unroll
  for (int k = 0; k < I; ++k) {
    const int i = threadIdx.x * I + k;
    const uint32_t v = i < entries ? vertex_of_entry[base + i] : kNoSlot;
    vertex[k] = v == kNoSlot ? none : v;
    entry[k] = uint16_t(i);
  }
  Sort(shared.sort).Sort(vertex, entry, 0, bits);
  __syncthreads();
  int head[I];
  Heads(shared.heads).FlagHeads(head, vertex, Differs{});
  __syncthreads();
  int run[I];  // start of the entry's run
#pragma unroll
  for (int k = 0; k < I; ++k) run[k] = head[k] ? threadIdx.x * I + k : 0;
  Scan(shared.scan).InclusiveScan(run, run, Larger{});
  __syncthreads();
#pragma unroll
  for (int k = 0; k < I; ++k) {
    const int inside = threadIdx.x * I + k - run[k];
    if (vertex[k] != none && inside % kLongestPair == 0) head[k] = 1;
  }
  int rank[I];
  int pairs;
  Scan(shared.scan).InclusiveSum(head, rank, pairs);

  int32_t* pair_vertex = l.pair_vertex + base;
#pragma unroll
  for (int k = 0; k < I; ++k) {
    const int i = threadIdx.x * I + k;
    // The last pair ends where the run of entries without a vertex starts.
    if (head[k]) of_pair[rank[k] - 1] = uint16_t(i);
    if (head[k] && vertex[k] != none) pair_vertex[rank[k] - 1] = int32_t(vertex[k]);
    if (i < entries) l.order[base + i] = entry[k];
  }
  if (threadIdx.x == kTile - 1) {
    // Entries without a vertex are one run, and no pair.
    rest = vertex[I - 1] == none ? 1 : 0;
    if (!rest) of_pair[pairs] = uint16_t(entries);
  }
  __syncthreads();
  pairs -= rest;

  uint32_t shorter[I];
  uint16_t pair[I];
#pragma unroll
  for (int k = 0; k < I; ++k) {
    const int i = threadIdx.x * I + k;
    shorter[k] = i < pairs ? kLongestPair - (of_pair[i + 1] - of_pair[i]) : kLongestPair;
    pair[k] = uint16_t(i);
  }
  __syncthreads();
  constexpr int length_bits = bits_for(kLongestPair + 1);
  Sort(shared.sort).Sort(shorter, pair, 0, length_bits);
  uint32_t begin[I];
  int32_t to[I];
#pragma unroll
  for (int k = 0; k < I; ++k) {
    if (int(threadIdx.x * I + k) >= pairs) break;
    begin[k] = of_pair[pair[k]];
    to[k] = pair_vertex[pair[k]];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < I; ++k) {
    const int i = threadIdx.x * I + k;
    if (i >= pairs) break;
    l.pair_range[base + i] = begin[k] | (kLongestPair - shorter[k]) << 16;
    pair_vertex[i] = to[k];
    of_pair[pair[k]] = uint16_t(i);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < I; ++k) {
    if (entry[k] < entries)
      l.local_ids[base + entry[k]] = vertex[k] == none ? kSkipped : of_pair[rank[k] - 1];
  }
  if (threadIdx.x == 0) {
    l.tile_start[tile] = pairs;
    if (tile + 1 == int32_t(gridDim.x)) l.tile_start[tile + 1] = 0;  // the scan reads it
  }
}

template <int I>
void launch(const Where& where, const Lattice& l, const BuildBuffers& b, int bits) {
  number_pairs_kernel<I><<<tile_count(l.grid), kTile, 0, stream_of(where)>>>(l, b.slot_of, bits);
  check_launch("permutohedral pairs");
}

}  // namespace

void number_pairs(const Where& where, const Lattice& l, const BuildBuffers& b) {
  // Vertices are below the bound; one value more sorts last.
  const int bits = bits_for(l.vertex_bound + 2);
  const int n = l.dims + 1;
  if (n <= 3) {
    launch<3>(where, l, b, bits);
  } else if (n <= 4) {
    launch<4>(where, l, b, bits);
  } else if (n <= 6) {
    launch<6>(where, l, b, bits);
  } else if (n <= 9) {
    launch<9>(where, l, b, bits);
  } else {
    launch<17>(where, l, b, bits);
  }
}

}  // namespace segkernels
