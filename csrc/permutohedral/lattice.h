// The permutohedral lattice (Adams, Baek, Davis 2010) as plain data: pointers into memory that
// Python owns.
//
// Points are visited tile by tile. A tile is a rectangle of the grid the points lie on; a position
// is a place in that order (the last tiles of a row or column may hold positions without a point).
// Within a tile every distinct vertex is one "pair" (tile, vertex), or on CUDA several: values are
// summed into pairs first, pairs into vertices next, both in a fixed order, so that a splat needs
// no atomics and gives the same bits in every run.
#pragma once

#include "common/hd.h"

namespace segkernels {

constexpr int kMaxDims = 16;
constexpr uint16_t kSkipped = 0xFFFF;  // local id of a point that takes no part
constexpr uint32_t kNoSlot = 0xFFFFFFFFu;
constexpr int kLongestPair = 32;  // entries of a pair on CUDA

struct Grid {
  int32_t batch, height, width;  // points of an image: height * width
  int32_t tile_height, tile_width;
};

struct Lattice {
  Grid grid;
  int32_t dims;
  int64_t vertex_bound;   // rows allocated for vertices
  int64_t pair_bound;     // rows allocated for pairs
  void* weights;          // [positions, dims + 1] T: barycentric weights
  uint16_t* local_ids;    // [positions, dims + 1]: pair of the entry, counted within its tile
  int32_t* pair_vertex;   // [tiles, tile_entries]: vertex of each pair of the tile
  int32_t* tile_start;    // [tiles + 1]: pairs before each tile
  int32_t* vertex_start;  // [vertex_bound + 1]: pairs before each vertex, in vertex_pairs
  int32_t* vertex_pairs;  // [pair_bound]: pairs by vertex, tiles ascending
  int32_t* neighbours;    // [dims + 1, 2, vertex_bound]: vertex one step along an axis, or -1
  int32_t* counts;        // [2]: vertices, pairs
  // CUDA only: the entries of each tile by vertex, in order: the point of each within the tile, its
  // weight; and which of them are each pair's.
  uint16_t* order;       // [tiles, tile_entries]
  void* order_weights;   // [tiles, tile_entries] T
  uint32_t* pair_range;  // [tiles, tile_entries]: the first entry, and 65536 times their number
};

inline namespace SK_NS {

SK_HD int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

SK_HD int32_t tile_points(const Grid& g) { return g.tile_height * g.tile_width; }
SK_HD int32_t tiles_per_image(const Grid& g) {
  return ceil_div(g.height, g.tile_height) * ceil_div(g.width, g.tile_width);
}
SK_HD int32_t tile_count(const Grid& g) { return g.batch * tiles_per_image(g); }
SK_HD int64_t position_count(const Grid& g) { return int64_t(tile_count(g)) * tile_points(g); }

struct ImagePoint {
  int32_t image;
  int64_t point;  // within the image; -1: no point at this position
};

SK_HD ImagePoint point_of(const Grid& g, int64_t position) {
  const int32_t tile = int32_t(position / tile_points(g));
  const int32_t inside = int32_t(position - int64_t(tile) * tile_points(g));
  const int32_t image = tile / tiles_per_image(g);
  const int32_t t = tile - image * tiles_per_image(g);
  const int32_t tiles_x = ceil_div(g.width, g.tile_width);
  const int32_t y = t / tiles_x * g.tile_height + inside / g.tile_width;
  const int32_t x = t % tiles_x * g.tile_width + inside % g.tile_width;
  return {image, y < g.height && x < g.width ? int64_t(y) * g.width + x : -1};
}

// Positions stay below 2^31: 32-bit division is several times quicker on the GPU.
SK_HD int32_t tile_of(const Grid& g, int64_t position) {
  return int32_t(uint32_t(position) / uint32_t(tile_points(g)));
}

// Whether some of a tile's positions have no point.
SK_HD bool tile_has_gaps(const Grid& g, int64_t tile) {
  return point_of(g, (tile + 1) * tile_points(g) - 1).point < 0;
}

// The first pair of a tile among the vertices of the whole lattice.
SK_HD const int32_t* tile_vertices(const Lattice& l, int32_t tile) {
  return l.pair_vertex + int64_t(tile) * tile_points(l.grid) * (l.dims + 1);
}

}  // namespace SK_NS
}  // namespace segkernels
