// The permutohedral lattice (Adams, Baek, Davis 2010): a struct of pointers into memory that Python
// owns.
//
// Points are ordered by tiles, which are rectangles of the grid of points. A position is an index
// in that order; the last tiles of a row or column may have positions without a point. A point has
// d+1 entries, one a vertex of its simplex. A "pair" (tile, vertex) is a distinct vertex of a tile;
// on CUDA a vertex of many entries has several. A splat first sums values into pairs, then pairs
// into vertices, both in a fixed order: no atomics, and the same bits in every run.
#pragma once

#include "common/hd.h"

namespace segkernels {

constexpr int kMaxDims = 16;
constexpr uint16_t kSkipped = 0xFFFF;  // local id of a skipped point
constexpr uint32_t kNoSlot = 0xFFFFFFFFu;
constexpr int kLongestPair = 32;  // entries of a pair, at most, on CUDA

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
  uint16_t* local_ids;    // [positions, dims + 1]: pair of each entry, numbered in its tile
  int32_t* pair_vertex;   // [tiles, tile_entries]: vertex of each pair
  int32_t* tile_start;    // [tiles + 1]: pairs before each tile
  int32_t* vertex_start;  // [vertex_bound + 1]: start of each vertex in vertex_pairs
  int32_t* vertex_pairs;  // [pair_bound]: pairs by vertex, tiles ascending
  int32_t* neighbours;    // [dims + 1, 2, vertex_bound]: upper and lower neighbour, or -1
  int32_t* counts;        // [2]: vertices, pairs
  // CUDA only: the entries of each tile sorted by vertex.
  uint16_t* order;       // [tiles, tile_entries]: point in the tile
  void* order_weights;   // [tiles, tile_entries] T
  uint32_t* pair_range;  // [tiles, tile_entries]: of each pair: first entry | count << 16
};

inline namespace SK_NS {

SK_HD int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

SK_HD int32_t tile_points(const Grid& g) { return g.tile_height * g.tile_width; }
SK_HD int32_t tiles_per_image(const Grid& g) {
  return ceil_div(g.height, g.tile_height) * ceil_div(g.width, g.tile_width);
}
SK_HD int32_t tile_count(const Grid& g) { return g.batch * tiles_per_image(g); }
// Whether work on a tile takes longer than waking a thread.
SK_HD bool has_large_tiles(const Grid& g) { return tile_points(g) >= 1024; }

SK_HD int64_t position_count(const Grid& g) { return int64_t(tile_count(g)) * tile_points(g); }

struct ImagePoint {
  int32_t image;
  int64_t point;  // in the image; -1: no point at this position
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

// Positions are below 2^31; 32-bit division is several times faster on the GPU.
SK_HD int32_t tile_of(const Grid& g, int64_t position) {
  return int32_t(uint32_t(position) / uint32_t(tile_points(g)));
}

// Whether some positions of a tile have no point.
SK_HD bool tile_has_gaps(const Grid& g, int64_t tile) {
  return point_of(g, (tile + 1) * tile_points(g) - 1).point < 0;
}

// The vertices of a tile's pairs.
SK_HD const int32_t* tile_vertices(const Lattice& l, int32_t tile) {
  return l.pair_vertex + int64_t(tile) * tile_points(l.grid) * (l.dims + 1);
}

}  // namespace SK_NS
}  // namespace segkernels
