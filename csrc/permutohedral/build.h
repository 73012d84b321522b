// The steps that build a lattice, as functors for parallel_for: one position, entry or vertex a
// call.
#pragma once

#include "permutohedral/dispatch.h"
#include "permutohedral/keys.h"
#include "permutohedral/simplex.h"

namespace segkernels {

// Inputs and workspaces of the build, all in memory that Python owns.
struct BuildBuffers {
  const void* features;       // [batch, dims, points] T
  int32_t* records;           // [positions, record_size]
  unsigned long long* slots;  // [capacity]
  uint32_t capacity;
  uint32_t* slot_of;        // CUDA: [entries]; CPU: [pairs]
  int32_t* vertex_of_slot;  // [capacity]
  int32_t* rank_of;         // CUDA: [entries]: vertices before each entry
  uint32_t* first_entry;    // [vertex_bound]
  uint32_t* tile_slots;     // CPU: [workers, tile_capacity]
  uint32_t tile_capacity;   // a power of two, at least twice a tile's entries
  int32_t* tile_keys;       // CPU: [threads, tile entries, dims + 1]
  int32_t* image_start;     // [batch + 1]: vertices before each image
  void* temporary;          // CUDA: CUB's workspace
  int64_t temporary_bytes;
  int32_t* sort_keys;    // CUDA: [2, pair_bound]
  int32_t* sort_values;  // CUDA: [pair_bound]
  int32_t* status;
};

inline namespace SK_NS {

template <class T, int D>
Scale<T, D> make_scale(Dims<D> n) {
  Scale<T, D> s;
  for (int i = 0; i < n; ++i) {
    s.value[i] = T(1.0 / sqrt(double(i + 2) * double(i + 1)) * (sqrt(2.0 / 3.0) * (n + 1)));
  }
  return s;
}

inline KeyTable key_table(const Lattice& l, const BuildBuffers& b) {
  return {b.slots, b.capacity, b.records, tiles_per_image(l.grid) * tile_points(l.grid)};
}

// `out` starts as zeros, because gcc does not see that n > 0 and warns.
template <class T, int D>
SK_HD void load_features(Dims<D> n, const T* features, int64_t points, const ImagePoint& p,
                         T* out) {
  const T* f = features + p.image * points * n + p.point;
#pragma unroll(Dims<D>::kUnroll)
  for (int i = 0; i < n; ++i) out[i] = f[i * points];
}

// One position: computes its simplex, stores it as a record, and its barycentric weights.
template <class T, int D>
struct Embed {
  Grid grid;
  Dims<D> n;
  const T* features;
  Scale<T, D> scale;
  int32_t* records;
  T* weights;
  int32_t* status;

  SK_HD void operator()(int64_t position) const { at(position, point_of(grid, position)); }

  SK_HD void at(int64_t position, const ImagePoint& p) const {
    const int words = record_size(n) - n;
    int32_t* record = records + position * record_size(n);
    T* w = weights + position * (n + 1);
    Simplex<T, D> s;
    bool finite = true;
    bool valid = false;
    if (p.point >= 0) {
      T f[Dims<D>::kMost] = {};
      load_features(n, features, int64_t(grid.height) * grid.width, p, f);
      valid = find_simplex(n, f, scale, s, finite);
      if (!valid) report(status, finite ? kFeaturesTooLarge : kFeaturesNotFinite);
    }
    if (!valid) {
#pragma unroll(Dims<D>::kUnroll)
      for (int i = 0; i < n; ++i) record[i] = 0;
#pragma unroll(Dims<D>::kUnroll)
      for (int i = 0; i < words; ++i) record[n + i] = -1;
#pragma unroll(Dims<D>::kUnroll)
      for (int k = 0; k <= n; ++k) w[k] = 0;
      return;
    }
    T b[Dims<D>::kMost + 1];
    barycentric(n, s, b);
#pragma unroll(Dims<D>::kUnroll)
    for (int k = 0; k <= n; ++k) w[k] = b[k];
#pragma unroll(Dims<D>::kUnroll)
    for (int i = 0; i < n; ++i) record[i] = s.rem[i];
#pragma unroll(Dims<D>::kUnroll)
    for (int word = 0; word < words; ++word) {
      int32_t packed = 0;
#pragma unroll(Dims<D>::kUnroll)
      for (int i = 0; i < kRanksPerWord; ++i) {
        if (word * kRanksPerWord + i < n) packed |= s.rank[word * kRanksPerWord + i] << (5 * i);
      }
      record[n + word] = packed;
    }
  }
};

// One position: inserts its d+1 keys into the table.
template <int D>
struct Insert {
  Dims<D> n;
  KeyTable table;
  uint32_t* slot_of;

  SK_HD void operator()(int64_t position) const {
    const int32_t* record = table.records + position * record_size(n);
    const int32_t image = int32_t(position / table.image_positions);
    uint32_t* slots = slot_of + position * (n + 1);
    const bool valid = record_valid(n, record);
    for (int k = 0; k <= n; ++k) {
      const uint32_t entry = uint32_t(position * (n + 1) + k);
      slots[k] = valid ? insert_key(n, table, entry, key_of(n, record, k), image) : kNoSlot;
    }
  }
};

// 1 if an entry is the first with its key. Vertices are numbered in the order of first entries.
struct IsFirst {
  const unsigned long long* slots;
  const uint32_t* slot_of;

  SK_HD int32_t operator()(int64_t entry) const {
    const uint32_t slot = slot_of[entry];
    return slot != kNoSlot && uint32_t(slots[slot]) == uint32_t(entry);
  }
};

// One vertex and axis: looks up the upper neighbour, whose lower neighbour the vertex is.
template <int D>
struct Link {
  Dims<D> n;
  Lattice lattice;
  KeyTable table;
  const uint32_t* first_entry;
  const int32_t* vertex_of_slot;

  SK_HD void operator()(int64_t vertex, int axis) const {
    const uint32_t entry = first_entry[vertex];
    const uint32_t position = entry / (n + 1);
    const int32_t image = int32_t(position / uint32_t(table.image_positions));
    Key<D> key = key_of(n, table.records + int64_t(position) * record_size(n),
                        int(entry - position * (n + 1)));
#pragma unroll(Dims<D>::kUnroll)
    for (int i = 0; i < n; ++i) key.coordinate[i] += i == axis ? -n : 1;
    const uint32_t slot = find_key(n, table, key, image);
    const int32_t up = slot == kNoSlot ? -1 : vertex_of_slot[slot];
    int32_t* row = lattice.neighbours + int64_t(axis) * 2 * lattice.vertex_bound;
    row[vertex] = up;
    if (up >= 0) row[lattice.vertex_bound + up] = int32_t(vertex);
  }
};

// One position: the gradient of its features from the gradient of its weights, for a fixed simplex.
template <class T, int D>
struct EmbedGrad {
  Grid grid;
  Dims<D> n;
  const T* features;
  Scale<T, D> scale;
  const T* grad_weights;
  T* grad_features;

  SK_HD void operator()(int64_t position) const {
    const ImagePoint at = point_of(grid, position);
    if (at.point < 0) return;
    const int64_t points = int64_t(grid.height) * grid.width;
    T f[Dims<D>::kMost] = {};
    T gw[Dims<D>::kMost + 1], gf[Dims<D>::kMost];
    load_features(n, features, points, at, f);
    Simplex<T, D> s;
    bool finite;
    const bool valid = find_simplex(n, f, scale, s, finite);
    if (valid) {
#pragma unroll(Dims<D>::kUnroll)
      for (int k = 0; k <= n; ++k) gw[k] = grad_weights[position * (n + 1) + k];
      simplex_grad(n, s, scale, gw, gf);
    }
    T* out = grad_features + at.image * points * n + at.point;
#pragma unroll(Dims<D>::kUnroll)
    for (int i = 0; i < n; ++i) out[i * points] = valid ? gf[i] : T(0);
  }
};

// launch(Embed) for the dims and the scalar type.
template <class F>
void embed_points(const Lattice& l, const BuildBuffers& b, bool is_double, const F& launch) {
  with_dims(l.dims, [&](auto n) {
    with_scalar(is_double, [&](auto scalar) {
      using T = decltype(scalar);
      launch(Embed<T, decltype(n)::kFixed>{l.grid, n, static_cast<const T*>(b.features),
                                           make_scale<T>(n), b.records, static_cast<T*>(l.weights),
                                           b.status});
    });
  });
}

// The same with EmbedGrad.
template <class F>
void embed_grad_points(const Lattice& l, const void* features, const void* grad_weights,
                       void* grad_features, bool is_double, const F& launch) {
  with_dims(l.dims, [&](auto n) {
    with_scalar(is_double, [&](auto scalar) {
      using T = decltype(scalar);
      launch(EmbedGrad<T, decltype(n)::kFixed>{
          l.grid, n, static_cast<const T*>(features), make_scale<T>(n),
          static_cast<const T*>(grad_weights), static_cast<T*>(grad_features)});
    });
  });
}

}  // namespace SK_NS
}  // namespace segkernels
