// Builds the lattice on the CPU, parallel over tiles and vertices. Keys are deduplicated within a
// tile first, and only distinct keys go into the global table. Vertices are numbered by first
// appearance, so the result does not depend on the number of threads.
#include <math.h>
#include <string.h>

#include <stdexcept>

#include "common/parallel_for.h"
#include "permutohedral/dispatch.h"
#include "permutohedral/permutohedral.h"

namespace segkernels {

namespace {

// The distinct keys of one tile, in order of first appearance, in a hash table that fits the cache.
template <int D>
class TileKeys {
 public:
  // `slots` is all zero, and is so again after clear().
  TileKeys(Dims<D> n, uint32_t* slots, uint32_t capacity, int32_t* known)
      : n_(n), mask_(capacity - 1), slots_(slots), known_(known) {}

  // The number of a key, which is the old count() if the key is new.
  int32_t number(const Key<D>& key) {
    for (uint32_t slot = uint32_t(hash_of(n_, key, 0)) & mask_;; slot = (slot + 1) & mask_) {
      const uint32_t seen = slots_[slot];
      if (seen == 0) {
        memcpy(known(count_), key.coordinate, sizeof(int32_t) * n_);
        known(count_)[n_] = int32_t(slot);
        slots_[slot] = uint32_t(++count_);
        return count_ - 1;
      }
      if (memcmp(known(int32_t(seen - 1)), key.coordinate, sizeof(int32_t) * n_) == 0)
        return int32_t(seen - 1);
    }
  }

  int32_t count() const { return count_; }

  void clear() const {
    for (int32_t i = 0; i < count_; ++i) slots_[known(i)[n_]] = 0;
  }

 private:
  // A known key, and its slot.
  int32_t* known(int32_t number) const { return known_ + int64_t(number) * (n_ + 1); }

  Dims<D> n_;
  uint32_t mask_;
  uint32_t* slots_;
  int32_t* known_;
  int32_t count_ = 0;
};

// One tile: records and weights of its points, and its pairs, each as an entry that has its key.
template <class T, int D>
void embed_tile(const Lattice& l, const BuildBuffers& b, const Embed<T, D>& embed, int worker,
                int32_t tile) {
  const Dims<D> n = embed.n;
  const int words = record_size(n);
  const int64_t points = tile_points(l.grid);
  const int64_t begin = tile * points;
  int32_t* entries = l.pair_vertex + begin * (n + 1);
  TileKeys<D> keys(n, b.tile_slots + int64_t(worker) * b.tile_capacity, b.tile_capacity,
                   b.tile_keys + worker * points * (n + 1) * (n + 1));
  const ImagePoint corner = point_of(l.grid, begin);
  const int64_t left = l.grid.width - corner.point % l.grid.width;
  const int64_t below = l.grid.height - corner.point / l.grid.width;
  int64_t x = -1, y = 0;
  for (int64_t p = begin; p < begin + points; ++p) {
    if (++x == l.grid.tile_width) x = 0, ++y;
    const bool there = y < below && x < left;
    embed.at(p, {corner.image, there ? corner.point + y * l.grid.width + x : -1});
    const int32_t* record = b.records + p * words;
    uint16_t* ids = l.local_ids + p * (n + 1);
    if (p > begin && memcmp(record, record - words, sizeof(int32_t) * words) == 0) {
      // Neighbouring points often share their simplex.
      memcpy(ids, ids - (n + 1), sizeof(uint16_t) * (n + 1));
      continue;
    }
    for (int k = 0; k <= n; ++k) {
      if (!record_valid(n, record)) {
        ids[k] = kSkipped;
        continue;
      }
      const int32_t before = keys.count();
      const int32_t id = keys.number(key_of(n, record, k));
      if (id == before) entries[id] = int32_t(p * (n + 1) + k);
      ids[k] = uint16_t(id);
    }
  }
  keys.clear();
  l.tile_start[tile + 1] = keys.count();
}

void embed(const Where& where, const Lattice& l, const BuildBuffers& b, bool is_double) {
  const int32_t tiles = tile_count(l.grid);
  embed_points(l, b, is_double, [&](const auto& f) {
    const bool is_long = has_large_tiles(l.grid);
    parallel_pieces(where, tiles, tiles, is_long, [&](int worker, Pieces& pieces) {
      if (!pieces.next()) return;
      memset(b.tile_slots + int64_t(worker) * b.tile_capacity, 0,
             sizeof(*b.tile_slots) * b.tile_capacity);
      do {
        for (int64_t tile = pieces.begin; tile < pieces.end; ++tile)
          embed_tile(l, b, f, worker, int32_t(tile));
      } while (pieces.next());
    });
  });
  l.tile_start[0] = 0;
  for (int32_t t = 0; t < tiles; ++t) l.tile_start[t + 1] += l.tile_start[t];
  l.counts[1] = l.tile_start[tiles];
}

// Numbers the vertices by first pair, which is by first entry. A pair beyond the bound gets -1.
void number_vertices(const Lattice& l, const BuildBuffers& b) {
  int32_t id = 0;
  for (int32_t tile = 0; tile < tile_count(l.grid); ++tile) {
    if (tile % tiles_per_image(l.grid) == 0) b.image_start[tile / tiles_per_image(l.grid)] = id;
    const int32_t* entries = tile_vertices(l, tile);
    for (int32_t i = l.tile_start[tile]; i < l.tile_start[tile + 1]; ++i) {
      const uint32_t entry = uint32_t(entries[i - l.tile_start[tile]]);
      const uint32_t slot = b.slot_of[i];
      if (uint32_t(b.slots[slot]) != entry) continue;
      b.vertex_of_slot[slot] = id < l.vertex_bound ? id : -1;
      if (id < l.vertex_bound) b.first_entry[id] = entry;
      ++id;
    }
  }
  b.image_start[l.grid.batch] = id;
  if (id > l.vertex_bound) report(b.status, kTooManyVertices);
  l.counts[0] = int32_t(id < l.vertex_bound ? id : l.vertex_bound);
}

void tiles(const Where& where, const Lattice& l, const BuildBuffers& b, bool) {
  memset(b.slots, 0xFF, sizeof(*b.slots) * b.capacity);
  const int32_t count = tile_count(l.grid);
  const auto pairs_of = [&](int64_t tile) { return l.tile_start[tile + 1] - l.tile_start[tile]; };
  const KeyTable table = key_table(l, b);
  with_dims(l.dims, [&](auto n) {
    parallel_tiles(where, count, has_large_tiles(l.grid), [&](int, int64_t tile) {
      const int32_t* entries = tile_vertices(l, int32_t(tile));
      const int32_t image = int32_t(tile / tiles_per_image(l.grid));
      for (int32_t i = 0; i < pairs_of(tile); ++i) {
        const uint32_t entry = uint32_t(entries[i]);
        const int32_t* record = b.records + int64_t(entry / (n + 1)) * record_size(n);
        b.slot_of[l.tile_start[tile] + i] =
            insert_key(n, table, entry, key_of(n, record, int(entry % (n + 1))), image);
      }
    });
  });
  number_vertices(l, b);
  parallel_tiles(where, count, has_large_tiles(l.grid), [&](int, int64_t tile) {
    int32_t* vertices = l.pair_vertex + tile * tile_points(l.grid) * (l.dims + 1);
    for (int32_t i = 0; i < pairs_of(tile); ++i)
      vertices[i] = b.vertex_of_slot[b.slot_of[l.tile_start[tile] + i]];
  });
}

// Counting sort of the pairs by vertex, tiles ascending.
void sort_pairs(const Lattice& l) {
  const int64_t vertices = l.counts[0];
  int32_t* start = l.vertex_start;
  memset(start, 0, sizeof(int32_t) * (vertices + 1));
  const int32_t tiles = tile_count(l.grid);
  for (int32_t t = 0; t < tiles; ++t) {
    const int32_t* vertex_of = tile_vertices(l, t);
    for (int32_t i = 0; i < l.tile_start[t + 1] - l.tile_start[t]; ++i) ++start[vertex_of[i] + 1];
  }
  for (int64_t v = 0; v < vertices; ++v) start[v + 1] += start[v];
  for (int32_t t = 0; t < tiles; ++t) {
    const int32_t* vertex_of = tile_vertices(l, t);
    for (int32_t i = l.tile_start[t]; i < l.tile_start[t + 1]; ++i) {
      l.vertex_pairs[start[vertex_of[i - l.tile_start[t]]]++] = i;
    }
  }
  // Each start has advanced to the start of the next vertex: shift back.
  for (int64_t v = vertices; v > 0; --v) start[v] = start[v - 1];
  start[0] = 0;
}

void link(const Where& where, const Lattice& l, const BuildBuffers& b) {
  memset(l.neighbours, 0xFF, sizeof(int32_t) * 2 * (l.dims + 1) * l.vertex_bound);
  with_dims(l.dims, [&](auto n) {
    const Link<decltype(n)::kFixed> f{n, l, key_table(l, b), b.first_entry, b.vertex_of_slot};
    parallel_rows(where, l.vertex_bound, l.counts, n + 1, f, "link");
  });
  sort_pairs(l);
}

void embed_grad(const Where& where, const Lattice& l, const void* features,
                const void* grad_weights, void* grad_features, bool is_double) {
  embed_grad_points(l, features, grad_weights, grad_features, is_double, [&](const auto& f) {
    parallel_for(where, position_count(l.grid), f, "permutohedral embed_grad");
  });
}

PermutohedralApi make_api() {
  PermutohedralApi api{};
  api.embed = embed;
  api.tiles = tiles;
  api.link = link;
  api.embed_grad = embed_grad;
  with_best_isa([&](auto isa) { set_cpu_loops<isa.value>(api); });
  return api;
}

}  // namespace

const PermutohedralApi& permutohedral_cpu() {
  static const PermutohedralApi api = make_api();
  return api;
}

}  // namespace segkernels
