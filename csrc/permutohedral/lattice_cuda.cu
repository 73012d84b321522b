// The lattice on CUDA. Most steps are grid-stride launches of functors that the CPU shares. Two are
// kernels with a block a tile: one sorts the tile's entries by vertex and numbers its pairs, the
// other is the splat, which sums entries into pairs in that fixed order. CUB does the scans and the
// sort of the pairs. No allocation, no synchronisation.
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/block/block_discontinuity.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "common/parallel_for.h"
#include "permutohedral/build_cuda.h"
#include "permutohedral/dispatch.h"
#include "permutohedral/permutohedral.h"
#include "permutohedral/row_threads.h"
#include "permutohedral/splat_cuda.h"

namespace segkernels {
namespace {

constexpr int kTile = 256;  // points of a tile, and threads of a block

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

void embed(const Where& where, const Lattice& l, const BuildBuffers& b, bool is_double) {
  const DeviceGuard guard(where.device);
  with_dims(l.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    with_scalar(is_double, [&](auto scalar) {
      using T = decltype(scalar);
      const Embed<T, D> f{l.grid,    static_cast<const T*>(b.features), make_scale<T, D>(),
                          b.records, static_cast<T*>(l.weights),        b.status};
      parallel_for(where, position_count(l.grid), f, "permutohedral embed");
    });
  });
}

void number_vertices(const Where& where, const Lattice& l, const BuildBuffers& b) {
  const int64_t positions = position_count(l.grid);
  const int64_t entries = positions * (l.dims + 1);
  const cudaStream_t stream = stream_of(where);
  check_cuda(cudaMemsetAsync(b.slots, 0xFF, sizeof(*b.slots) * b.capacity, stream),
             "permutohedral clear");
  with_dims(l.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    parallel_for(where, positions, Insert<D>{l.grid, key_table<D>(l, b), b.slot_of},
                 "permutohedral insert");
  });
  const IsFirst is_first{b.slots, b.slot_of};
  const auto flags = thrust::make_transform_iterator(thrust::counting_iterator<int64_t>(0),
                                                     FirstBefore{is_first, entries});
  size_t bytes = size_t(b.temporary_bytes);
  check_cuda(
      cub::DeviceScan::ExclusiveSum(b.temporary, bytes, flags, b.rank_of, entries + 1, stream),
      "permutohedral scan");
  parallel_for(
      where, entries,
      NumberVertex{is_first, b.rank_of, b.vertex_of_slot, b.first_entry, l.vertex_bound, b.status},
      "permutohedral number");
  const CountVertices count{b.rank_of,    entries / l.grid.batch, l.vertex_bound,
                            l.grid.batch, b.image_start,          l.counts};
  parallel_for(where, l.grid.batch + 1, count, "permutohedral count");
  parallel_for(where, positions, ResolveVertices{b.slot_of, b.vertex_of_slot, l.dims + 1},
               "permutohedral resolve");
}

template <int I>
void number_pairs(const Where& where, const Lattice& l, const BuildBuffers& b, int bits) {
  number_pairs_kernel<I><<<tile_count(l.grid), kTile, 0, stream_of(where)>>>(l, b.slot_of, bits);
  check_launch("permutohedral pairs");
}

void tiles(const Where& where, const Lattice& l, const BuildBuffers& b, bool is_double) {
  const DeviceGuard guard(where.device);
  number_vertices(where, l, b);
  // Vertices are below the bound; one value more sorts last.
  const int bits = bits_for(l.vertex_bound + 2);
  const int n = l.dims + 1;
  if (n <= 3) {
    number_pairs<3>(where, l, b, bits);
  } else if (n <= 4) {
    number_pairs<4>(where, l, b, bits);
  } else if (n <= 6) {
    number_pairs<6>(where, l, b, bits);
  } else if (n <= 9) {
    number_pairs<9>(where, l, b, bits);
  } else {
    number_pairs<17>(where, l, b, bits);
  }
  with_scalar(is_double, [&](auto scalar) {
    parallel_for(where, position_count(l.grid) * n, GatherWeights<decltype(scalar)>{l},
                 "permutohedral order");
  });
  const int32_t count = tile_count(l.grid);
  size_t bytes = size_t(b.temporary_bytes);
  check_cuda(cub::DeviceScan::ExclusiveSum(b.temporary, bytes, l.tile_start, l.tile_start,
                                           int64_t(count) + 1, stream_of(where)),
             "permutohedral scan");
  parallel_for(where, 1, CountPairs{l}, "permutohedral count");
}

void link(const Where& where, const Lattice& l, const BuildBuffers& b) {
  const DeviceGuard guard(where.device);
  parallel_rows(where, l.vertex_bound, l.counts, 2 * (l.dims + 1), ClearNeighbours{l},
                "permutohedral neighbours");
  with_dims(l.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    const Link<D> f{l, key_table<D>(l, b), b.first_entry, b.vertex_of_slot};
    parallel_rows(where, l.vertex_bound, l.counts, D + 1, f, "permutohedral link");
  });
  if (l.pair_bound == 0) return;
  int32_t* sorted = b.sort_keys + l.pair_bound;
  parallel_rows(where, tile_count(l.grid), nullptr, kTile * (l.dims + 1),
                PairKeys{l, b.sort_keys, b.sort_values}, "permutohedral pair keys");
  parallel_for(where, l.pair_bound,
               UnusedKeys{l.counts, b.sort_keys, b.sort_values, int32_t(l.vertex_bound)},
               "permutohedral unused keys");
  size_t bytes = size_t(b.temporary_bytes);
  check_cuda(cub::DeviceRadixSort::SortPairs(b.temporary, bytes, b.sort_keys, sorted, b.sort_values,
                                             l.vertex_pairs, l.pair_bound, 0,
                                             bits_for(l.vertex_bound + 1), stream_of(where)),
             "permutohedral sort");
  parallel_for(where, l.vertex_bound + 1, VertexStart{l, sorted}, "permutohedral starts");
}

void embed_grad(const Where& where, const Lattice& l, const void* features,
                const void* grad_weights, void* grad_features, bool is_double) {
  const DeviceGuard guard(where.device);
  embed_grad_points(where, l, features, grad_weights, grad_features, is_double);
}

// f(T{}, V{}): the scalar type, and the vector type of rows: 16 bytes, or one scalar.
template <class F>
void with_vector(int width, bool is_double, const F& f) {
  with_scalar(is_double, [&](auto scalar) {
    using T = decltype(scalar);
    if (width % 4 == 0) {
      f(T{}, Vec<T, 16 / sizeof(T)>{});
    } else {
      f(T{}, T{});
    }
  });
}

void pack(const Where& where, const Grid& grid, const Strided& source, void* rows, int channels,
          int width, RowKind kind, int32_t* status, bool is_double) {
  const DeviceGuard guard(where.device);
  with_vector(width, is_double, [&](auto scalar, auto vector) {
    using T = decltype(scalar);
    constexpr int W = sizeof(vector) / sizeof(T);
    const PackBlock<T, W> f{grid, source, static_cast<T*>(rows), channels, width, kind, status};
    parallel_for(where, position_count(grid), PackRow<T, W>{f}, "rows pack");
  });
}

void unpack(const Where& where, const Grid& grid, const void* rows, const Strided& target,
            int channels, int width, bool is_double) {
  const DeviceGuard guard(where.device);
  with_vector(width, is_double, [&](auto scalar, auto vector) {
    using T = decltype(scalar);
    constexpr int W = sizeof(vector) / sizeof(T);
    const UnpackRow<T, W> f{grid, static_cast<const T*>(rows), target, channels, width};
    parallel_for(where, position_count(grid), f, "rows unpack");
  });
}

// One tile a block.
template <class T, class V, int G, int B>
__global__ void __launch_bounds__(kTile)
    splat_kernel(Lattice l, const V* rows, const T* scale, V* pairs, int blocks) {
  const int32_t tile = blockIdx.x;
  const int64_t point = int64_t(tile) * kTile;
  const T* weights = static_cast<const T*>(l.order_weights) + point * (l.dims + 1);
  splat_tile<T, G, B>(l, tile, rows + point * blocks, weights,
                      scale != nullptr ? scale + point : nullptr, pairs, blocks);
}

void splat(const Where& where, const Lattice& l, const FilterBuffers& b, bool is_double) {
  const DeviceGuard guard(where.device);
  splat_pairs(where, l, b.rows, b.scale_in, b.pairs, b.width, is_double);
  with_vector(b.width, is_double, [&](auto scalar, auto vector) {
    using T = decltype(scalar);
    using V = decltype(vector);
    merge_and_blur<T, V>(where, l, static_cast<const V*>(b.pairs), static_cast<V*>(b.vertices),
                         static_cast<V*>(b.scratch), int(b.width * sizeof(T) / sizeof(V)),
                         b.reverse);
  });
}

void slice(const Where& where, const Lattice& l, const void* vertices, const void* scale,
           double skipped, void* rows, int width, bool is_double) {
  const DeviceGuard guard(where.device);
  with_vector(width, is_double, [&](auto scalar, auto vector) {
    slice_rows<decltype(scalar), decltype(vector)>(where, l, vertices, scale, skipped, rows, width);
  });
}

void weights_grad(const Where& where, const Lattice& l, const void* x, const void* g,
                  const void* vertices, const void* grad_vertices, void* grad_weights, int width,
                  bool is_double) {
  const DeviceGuard guard(where.device);
  with_scalar(is_double, [&](auto scalar) {
    weights_grad_rows<decltype(scalar)>(where, l, x, g, vertices, grad_vertices, grad_weights,
                                        width);
  });
}

void invert_norm(const Where& where, int64_t positions, const void* norm, void* out, bool root,
                 bool is_double) {
  const DeviceGuard guard(where.device);
  with_scalar(is_double, [&](auto scalar) {
    invert_norm_rows<decltype(scalar)>(where, positions, norm, out, root);
  });
}

}  // namespace

void splat_pairs(const Where& where, const Lattice& l, const void* rows, const void* scale,
                 void* pairs, int width, bool is_double) {
  with_vector(width, is_double, [&](auto scalar, auto vector) {
    using T = decltype(scalar);
    using V = decltype(vector);
    const int blocks = int(width * sizeof(T) / sizeof(V));
    with_row_threads<T, V>(blocks, [&](auto lanes, auto vectors) {
      constexpr int G = decltype(lanes)::value, B = decltype(vectors)::value;
      splat_kernel<T, V, G, B><<<tile_count(l.grid), kTile, 0, stream_of(where)>>>(
          l, static_cast<const V*>(rows), static_cast<const T*>(scale), static_cast<V*>(pairs),
          blocks);
      check_launch("permutohedral splat");
    });
  });
}

int64_t permutohedral_workspace(int device, int64_t entries, int64_t tiles, int64_t pairs) {
  const DeviceGuard guard(device);  // CUB asks for the current device's architecture
  size_t scan = 0, scan_tiles = 0, sort = 0;
  const auto flags =
      thrust::make_transform_iterator(thrust::counting_iterator<int64_t>(0), FirstBefore{});
  int32_t* none = nullptr;
  check_cuda(cub::DeviceScan::ExclusiveSum(nullptr, scan, flags, none, entries + 1), "workspace");
  check_cuda(cub::DeviceScan::ExclusiveSum(nullptr, scan_tiles, none, none, tiles + 1),
             "workspace");
  check_cuda(cub::DeviceRadixSort::SortPairs(nullptr, sort, none, none, none, none, pairs),
             "workspace");
  const size_t most = scan > scan_tiles ? scan : scan_tiles;
  return int64_t(most > sort ? most : sort);
}

const PermutohedralApi& permutohedral_cuda() {
  static const PermutohedralApi api{embed,  tiles, link,  embed_grad,   pack,
                                    unpack, splat, slice, weights_grad, invert_norm};
  return api;
}

}  // namespace segkernels
