// Builds the lattice on CUDA: numbers the vertices, and sorts the pairs by vertex. CUB does the
// scans and the sort; the other steps are grid-stride launches, one thread an entry, pair or
// vertex. No allocation, no synchronisation.
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

#include "common/parallel_for.h"
#include "permutohedral/build_cuda.h"
#include "permutohedral/lattice_cuda.h"

namespace segkernels {
namespace {

void number_vertices(const Where& where, const Lattice& l, const BuildBuffers& b) {
  const int64_t positions = position_count(l.grid);
  const int64_t entries = positions * (l.dims + 1);
  const cudaStream_t stream = stream_of(where);
  check_cuda(cudaMemsetAsync(b.slots, 0xFF, sizeof(*b.slots) * b.capacity, stream),
             "permutohedral clear");
  insert_keys(where, l, b);
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

void tiles(const Where& where, const Lattice& l, const BuildBuffers& b, bool is_double) {
  const DeviceGuard guard(where.device);
  number_vertices(where, l, b);
  number_pairs(where, l, b);
  with_scalar(is_double, [&](auto scalar) {
    parallel_for(where, position_count(l.grid) * (l.dims + 1), GatherWeights<decltype(scalar)>{l},
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
  link_vertices(where, l, b);
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

PermutohedralApi make_api() {
  PermutohedralApi api{};
  api.tiles = tiles;
  api.link = link;
  set_cuda_embed(api);
  set_cuda_filter(api);
  return api;
}

}  // namespace

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
  static const PermutohedralApi api = make_api();
  return api;
}

}  // namespace segkernels
