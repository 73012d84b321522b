// Functors of the build on CUDA: the keys of all entries go into one global table, a scan over
// entries numbers the vertices, a tile's entries are sorted by vertex, and pairs by vertex. (The
// CPU first deduplicates keys within a tile, which is a sequential loop.)
#pragma once

#include "permutohedral/build.h"

namespace segkernels {
inline namespace SK_NS {

constexpr int bits_for(int64_t values) {
  int bits = 1;
  while ((int64_t(1) << bits) < values) ++bits;
  return bits;
}

struct FirstBefore {
  IsFirst is_first;
  int64_t entries;
  SK_HD int32_t operator()(int64_t entry) const { return entry < entries ? is_first(entry) : 0; }
};

// One entry: numbers its vertex if it is the first with its key; -1 beyond the bound.
struct NumberVertex {
  IsFirst is_first;
  const int32_t* rank_of;
  int32_t* vertex_of_slot;
  uint32_t* first_entry;
  int64_t bound;
  int32_t* status;

  SK_HD void operator()(int64_t entry) const {
    if (!is_first(entry)) return;
    const int32_t id = rank_of[entry];
    const bool fits = id < bound;
    vertex_of_slot[is_first.slot_of[entry]] = fits ? id : -1;
    if (fits) {
      first_entry[id] = uint32_t(entry);
    } else {
      report(status, kTooManyVertices);
    }
  }
};

// The number of vertices before each image, and of all.
struct CountVertices {
  const int32_t* rank_of;
  int64_t image_entries, bound;
  int32_t batch;
  int32_t* image_start;
  int32_t* counts;

  SK_HD void operator()(int64_t image) const {
    const int32_t before = rank_of[image * image_entries];
    image_start[image] = before;
    if (image == batch) counts[0] = int32_t(before < bound ? before : bound);
  }
};

// One position: replaces its slots by vertices in place; by -1 if one of them has none.
struct ResolveVertices {
  uint32_t* slot_of;
  const int32_t* vertex_of_slot;
  int entries;

  SK_HD void operator()(int64_t position) const {
    uint32_t* slots = slot_of + position * entries;
    bool taken = true;
    for (int k = 0; k < entries; ++k)
      taken = taken && slots[k] != kNoSlot && vertex_of_slot[slots[k]] >= 0;
    for (int k = 0; k < entries; ++k)
      slots[k] = taken ? uint32_t(vertex_of_slot[slots[k]]) : kNoSlot;
  }
};

// One place of the sorted order: replaces the entry by its point, and stores its weight.
template <class T>
struct GatherWeights {
  Lattice lattice;

  SK_HD void operator()(int64_t i) const {
    const uint32_t entries = tile_points(lattice.grid) * (lattice.dims + 1);
    const int64_t base = i - uint32_t(i) % entries;
    const uint16_t entry = lattice.order[i];
    static_cast<T*>(lattice.order_weights)[i] =
        static_cast<const T*>(lattice.weights)[base + entry];
    lattice.order[i] = uint16_t(entry / (lattice.dims + 1));
  }
};

struct CountPairs {
  Lattice lattice;
  SK_HD void operator()(int64_t) const {
    lattice.counts[1] = lattice.tile_start[tile_count(lattice.grid)];
  }
};

struct ClearNeighbours {
  Lattice lattice;
  SK_HD void operator()(int64_t vertex, int row) const {
    lattice.neighbours[row * lattice.vertex_bound + vertex] = -1;
  }
};

// One pair: its vertex, as sort key.
struct PairKeys {
  Lattice lattice;
  int32_t* keys;
  int32_t* values;

  SK_HD void operator()(int64_t tile, int i) const {
    const int32_t begin = lattice.tile_start[tile];
    if (i >= lattice.tile_start[tile + 1] - begin) return;
    keys[begin + i] = tile_vertices(lattice, int32_t(tile))[i];
    values[begin + i] = begin + i;
  }
};

// Keys of unused pairs, which sort last.
struct UnusedKeys {
  const int32_t* counts;
  int32_t* keys;
  int32_t* values;
  int32_t key;
  SK_HD void operator()(int64_t i) const {
    if (i < counts[1]) return;
    keys[i] = key;
    values[i] = 0;
  }
};

// One vertex: the start of its pairs in sorted order, by binary search. One more call gives the end
// of the last.
struct VertexStart {
  Lattice lattice;
  const int32_t* keys;

  SK_HD void operator()(int64_t vertex) const {
    if (vertex > lattice.counts[0]) return;
    int32_t low = 0, high = lattice.counts[1];
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (keys[middle] < vertex) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    lattice.vertex_start[vertex] = low;
  }
};

}  // namespace SK_NS
}  // namespace segkernels
