// The CUDA build and splat, step by step, on the CPU: the same functors in the same order, with
// plain loops where CUB scans and sorts and where a block of threads works on a tile. Not a way to
// compute anything, only to test on a machine without a GPU what the GPU runs.
#include <string.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/parallel_for.h"
#include "permutohedral/dispatch.h"
#include "permutohedral/global_build.h"
#include "permutohedral/permutohedral.h"

namespace segkernels {
namespace {

void embed(const Where& where, const Lattice& l, const BuildBuffers& b, bool is_double) {
  with_dims(l.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    with_scalar(is_double, [&](auto scalar) {
      using T = decltype(scalar);
      const Embed<T, D> f{l.grid,    static_cast<const T*>(b.features), make_scale<T, D>(),
                          b.records, static_cast<T*>(l.weights),        b.status};
      parallel_for(where, position_count(l.grid), f, "embed");
    });
  });
}

template <class F>
void exclusive_sum(int64_t n, const F& value, int32_t* out) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t v = value(i);
    out[i] = sum;
    sum += v;
  }
}

void number_pairs(const Lattice& l, const uint32_t* vertex_of_entry, int32_t tile) {
  const int entries = tile_points(l.grid) * (l.dims + 1);
  const int64_t base = int64_t(tile) * entries;
  const uint32_t* vertex = vertex_of_entry + base;
  std::vector<uint16_t> order(entries);
  std::iota(order.begin(), order.end(), uint16_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](uint16_t a, uint16_t b) { return vertex[a] < vertex[b]; });
  struct Pair {
    int begin, length;
  };
  std::vector<Pair> pairs;
  for (int i = 0; i < entries; ++i) {
    const uint32_t v = vertex[order[i]];
    l.order[base + i] = order[i];
    if (v == kNoSlot) {
      l.local_ids[base + order[i]] = kSkipped;
    } else if (i == 0 || vertex[order[i - 1]] != v || pairs.back().length == kLongestPair) {
      pairs.push_back({i, 1});
    } else {
      ++pairs.back().length;
    }
  }
  std::stable_sort(pairs.begin(), pairs.end(),
                   [](const Pair& a, const Pair& b) { return a.length > b.length; });
  for (size_t k = 0; k < pairs.size(); ++k) {
    const auto [begin, length] = pairs[k];
    l.pair_range[base + k] = uint32_t(begin) | uint32_t(length) << 16;
    l.pair_vertex[base + k] = int32_t(vertex[order[begin]]);
    for (int i = begin; i < begin + length; ++i) l.local_ids[base + order[i]] = uint16_t(k);
  }
  l.tile_start[tile] = int32_t(pairs.size());
}

void tiles(const Where& where, const Lattice& l, const BuildBuffers& b, bool is_double) {
  const int64_t positions = position_count(l.grid);
  const int64_t entries = positions * (l.dims + 1);
  memset(b.slots, 0xFF, sizeof(*b.slots) * b.capacity);
  with_dims(l.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    parallel_for(where, positions, Insert<D>{l.grid, key_table<D>(l, b), b.slot_of}, "insert");
  });
  const IsFirst is_first{b.slots, b.slot_of};
  exclusive_sum(entries + 1, FirstBefore{is_first, entries}, b.rank_of);
  parallel_for(
      where, entries,
      NumberVertex{is_first, b.rank_of, b.vertex_of_slot, b.first_entry, l.vertex_bound, b.status},
      "number");
  const CountVertices count{b.rank_of,    entries / l.grid.batch, l.vertex_bound,
                            l.grid.batch, b.image_start,          l.counts};
  parallel_for(where, l.grid.batch + 1, count, "count");
  parallel_for(where, positions, ResolveVertices{b.slot_of, b.vertex_of_slot, l.dims + 1},
               "resolve");
  parallel_for(
      where, tile_count(l.grid), [&](int64_t tile) { number_pairs(l, b.slot_of, int32_t(tile)); },
      "pairs");
  with_scalar(is_double, [&](auto scalar) {
    parallel_for(where, entries, GatherWeights<decltype(scalar)>{l}, "order");
  });
  const int32_t count_tiles = tile_count(l.grid);
  l.tile_start[count_tiles] = 0;
  exclusive_sum(count_tiles + 1, [&](int64_t t) { return l.tile_start[t]; }, l.tile_start);
  CountPairs{l}(0);
}

void link(const Where& where, const Lattice& l, const BuildBuffers& b) {
  parallel_rows(where, l.vertex_bound, l.counts, 2 * (l.dims + 1), ClearNeighbours{l},
                "neighbours");
  with_dims(l.dims, [&](auto dims) {
    constexpr int D = decltype(dims)::value;
    const Link<D> f{l, key_table<D>(l, b), b.first_entry, b.vertex_of_slot};
    parallel_rows(where, l.vertex_bound, l.counts, D + 1, f, "link");
  });
  int32_t* sorted = b.sort_keys + l.pair_bound;
  parallel_rows(where, tile_count(l.grid), nullptr, tile_points(l.grid) * (l.dims + 1),
                PairKeys{l, b.sort_keys, b.sort_values}, "pair keys");
  parallel_for(where, l.pair_bound,
               UnusedKeys{l.counts, b.sort_keys, b.sort_values, int32_t(l.vertex_bound)},
               "unused keys");
  std::vector<int32_t> order(l.pair_bound);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t i, int32_t j) { return b.sort_keys[i] < b.sort_keys[j]; });
  for (int64_t i = 0; i < l.pair_bound; ++i) {
    sorted[i] = b.sort_keys[order[i]];
    l.vertex_pairs[i] = b.sort_values[order[i]];
  }
  parallel_for(where, l.vertex_bound + 1, VertexStart{l, sorted}, "starts");
}

template <class T>
void splat_rows(const Where& where, const Lattice& l, const FilterBuffers& b) {
  const T* rows = static_cast<const T*>(b.rows);
  const T* scale = static_cast<const T*>(b.scale_in);
  T* pairs = static_cast<T*>(b.pairs);
  const int64_t entries = int64_t(tile_points(l.grid)) * (l.dims + 1);
  parallel_for(
      where, tile_count(l.grid),
      [&](int64_t tile) {
        const uint32_t* range = l.pair_range + tile * entries;
        for (int32_t pair = 0; pair < l.tile_start[tile + 1] - l.tile_start[tile]; ++pair) {
          for (int c = 0; c < b.width; ++c) {
            T sum = 0;
            const int begin = range[pair] & 0xFFFF, end = begin + (range[pair] >> 16);
            for (int i = begin; i < end; ++i) {
              const int64_t p = tile * tile_points(l.grid) + l.order[tile * entries + i];
              const T w = static_cast<const T*>(l.order_weights)[tile * entries + i];
              sum = mul_add(scale != nullptr ? w * scale[p] : w, rows[p * b.width + c], sum);
            }
            pairs[int64_t(l.tile_start[tile] + pair) * b.width + c] = sum;
          }
        }
      },
      "splat");
  merge_and_blur<T, T>(where, l, pairs, static_cast<T*>(b.vertices), static_cast<T*>(b.scratch),
                       b.width, b.reverse);
}

void splat(const Where& where, const Lattice& l, const FilterBuffers& b, bool is_double) {
  with_scalar(is_double, [&](auto scalar) { splat_rows<decltype(scalar)>(where, l, b); });
}

}  // namespace

const PermutohedralApi& permutohedral_emulated() {
  static const PermutohedralApi api = [] {
    PermutohedralApi a = permutohedral_cpu();
    a.embed = embed;
    a.tiles = tiles;
    a.link = link;
    a.splat = splat;
    return a;
  }();
  return api;
}

}  // namespace segkernels
