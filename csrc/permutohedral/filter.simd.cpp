// The filter on rows of channels on the CPU: pack, unpack, splat, blur, slice. Compiled once per
// instruction set (SK_ISA). Parallel over tiles (pack, unpack, splat) or rows.
#include <math.h>
#include <string.h>

#include <limits>

#include "common/math.h"
#include "common/parallel_for.h"
#include "permutohedral/dispatch.h"
#include "permutohedral/permutohedral.h"
#include "permutohedral/splat_cpu.h"

namespace segkernels {
inline namespace SK_ISA {

// f(V{}) with the vector type of rows of this width.
template <class T, class F>
void with_vector(int width, const F& f) {
  if (width % 8 == 0) {
    f(Vec<T, 8>{});
  } else if (width % 4 == 0) {
    f(Vec<T, 4>{});
  } else {
    f(T{});
  }
}

// The points of a tile are neighbours: channels are read (and written) in strips of points, and
// transposed in cache.
constexpr int kStrip = 64;

// f(position, point, n) for strips of n <= kStrip neighbouring points of a tile.
template <class F>
SK_HD void for_strips(const Grid& g, int64_t tile, const F& f) {
  for (int32_t y = 0; y < g.tile_height; ++y) {
    const int64_t row = tile * tile_points(g) + int64_t(y) * g.tile_width;
    const ImagePoint first = point_of(g, row);
    if (first.point < 0) return;
    const int64_t left = g.width - first.point % g.width;
    const int64_t here = left < g.tile_width ? left : g.tile_width;
    for (int64_t x = 0; x < here; x += kStrip) {
      f(row + x, ImagePoint{first.image, first.point + x}, here - x < kStrip ? here - x : kStrip);
    }
  }
}

template <class T>
struct PackTile {
  PackBlock<T, 1> row;

  void operator()(int, int64_t tile) const {
    const int64_t points = tile_points(row.grid);
    if (tile_has_gaps(row.grid, tile)) {
      memset(row.rows + tile * points * row.width, 0, sizeof(T) * points * row.width);
    }
    for_strips(row.grid, tile, [&](int64_t position, const ImagePoint& at, int64_t n) {
      if (row.source.point == 1) return pack_strip(position, at, n);
      for (int64_t i = 0; i < n; ++i) {
        for (int c = 0; c < row.width; ++c) row(position + i, c);
        if (row.kind != kValues) row.finish(position + i, row.largest(position + i));
      }
    });
  }

  void pack_strip(int64_t position, const ImagePoint& at, int64_t n) const {
    using V = Vec<T, 8>;
    T* out = row.rows + position * row.width;
    const T* from = static_cast<const T*>(row.source.data) + at.image * row.source.batch + at.point;
    // `bad` becomes 1 where a value is NaN, or has an energy of -infinity. Values beyond the n are
    // repeats, not stored.
    V bad{}, low{}, high{};
    V top[kStrip / 8];
    for (V& t : top) t = V{} - T(INFINITY);
    const V most = V{} + std::numeric_limits<T>::max();
    T buffer[kStrip];
    for (int c = 0; c < row.width; ++c) {
      if (c >= row.channels) {
        for (int64_t i = 0; i < n; ++i)
          out[i * row.width + c] = row.kind == kValues ? T(0) : -T(INFINITY);
        continue;
      }
      const T* x = from + c * row.source.channel;
      for (int64_t i = 0; i < kStrip; ++i) buffer[i] = x[i < n ? i : 0];
      for (int64_t i = 0; i < kStrip; i += 8) {
        V v;
        memcpy(&v, buffer + i, sizeof v);
        if (row.kind == kUnary) v = -v;
        bad = v <= most ? bad : V{} + T(1);
        top[i / 8] = v > top[i / 8] ? v : top[i / 8];
        if (row.kind == kProbs) {
          low = v < low ? v : low;
          high = v > high ? v : high;
          const V least = V{} + T(1e-5), one = V{} + T(1);
          v = log_of<V>(v < least ? least : v > one ? one : v);
        }
        memcpy(buffer + i, &v, sizeof v);
      }
      for (int64_t i = 0; i < n; ++i) out[i * row.width + c] = buffer[i];
    }
    if (row.kind == kValues) return;
    if (sum_of<T>(bad) != T(0)) report(row.status, kScoresNotFinite);
    if (row.kind == kProbs) {
      check_probs<T>(-max_of<T>(-low), max_of<T>(high), row.status);
    } else {
      for (int64_t i = 0; i < n; ++i) row.finish(position + i, top[i / 8][i % 8]);
    }
  }
};

template <class T>
struct UnpackTile {
  UnpackRow<T, 1> row;

  void operator()(int, int64_t tile) const {
    const Strided& t = row.target;
    for_strips(row.grid, tile, [&](int64_t position, const ImagePoint& at, int64_t n) {
      const T* rows = row.rows + position * row.width;
      T* to = static_cast<T*>(const_cast<void*>(t.data)) + at.image * t.batch + at.point * t.point;
      for (int c = 0; c < row.channels; ++c) {
        for (int64_t i = 0; i < n; ++i) to[c * t.channel + i * t.point] = rows[i * row.width + c];
      }
    });
  }
};

void pack(const Where& where, const Grid& grid, const Strided& source, void* rows, int channels,
          int width, RowKind kind, int32_t* status, bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    using T = decltype(scalar);
    const PackTile<T> f{{grid, source, static_cast<T*>(rows), channels, width, kind, status}};
    parallel_tiles(where, tile_count(grid), has_large_tiles(grid), f);
  });
}

void unpack(const Where& where, const Grid& grid, const void* rows, const Strided& target,
            int channels, int width, bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    using T = decltype(scalar);
    const UnpackTile<T> f{{grid, static_cast<const T*>(rows), target, channels, width}};
    parallel_tiles(where, tile_count(grid), has_large_tiles(grid), f);
  });
}

template MergeAndBlur<float, float> merge_and_blur<float, float>;
template MergeAndBlur<float, Vec<float, 4>> merge_and_blur<float, Vec<float, 4>>;
template MergeAndBlur<float, Vec<float, 8>> merge_and_blur<float, Vec<float, 8>>;
template MergeAndBlur<double, double> merge_and_blur<double, double>;
template MergeAndBlur<double, Vec<double, 4>> merge_and_blur<double, Vec<double, 4>>;
template MergeAndBlur<double, Vec<double, 8>> merge_and_blur<double, Vec<double, 8>>;

template <class T, class V>
void splat_rows(const Where& where, const Lattice& l, const FilterBuffers& b) {
  const int blocks = b.width * int(sizeof(T)) / int(sizeof(V));
  const int64_t points = tile_points(l.grid);
  const V* rows = static_cast<const V*>(b.rows);
  const V one = V{} + T(1);
  const T* scale = static_cast<const T*>(b.scale_in);
  parallel_tiles(where, tile_count(l.grid), has_large_tiles(l.grid), [&](int, int64_t tile) {
    TilePairs<T, V> pairs(l, static_cast<V*>(b.pairs), int32_t(tile), blocks);
    pairs.clear();
    for (int64_t p = tile * points; p < (tile + 1) * points; ++p) {
      const V* row = rows != nullptr ? rows + p * blocks : &one;
      pairs.template add<0>(p, row, scale != nullptr ? scale[p] : T(1));
    }
  });
  merge_and_blur<T, V>(where, l, static_cast<const V*>(b.pairs), static_cast<V*>(b.vertices),
                       static_cast<V*>(b.scratch), blocks, b.reverse);
}

void splat(const Where& where, const Lattice& l, const FilterBuffers& b, bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    using T = decltype(scalar);
    with_vector<T>(b.width, [&](auto v) { splat_rows<T, decltype(v)>(where, l, b); });
  });
}

void slice(const Where& where, const Lattice& l, const void* vertices, const void* scale,
           double skipped, void* rows, int width, bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    using T = decltype(scalar);
    with_vector<T>(width, [&](auto v) {
      slice_rows<T, decltype(v)>(where, l, vertices, scale, skipped, rows, width);
    });
  });
}

void weights_grad(const Where& where, const Lattice& l, const void* x, const void* g,
                  const void* vertices, const void* grad_vertices, void* grad_weights, int width,
                  bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    weights_grad_rows<decltype(scalar)>(where, l, x, g, vertices, grad_vertices, grad_weights,
                                        width);
  });
}

void invert_norm(const Where& where, int64_t positions, const void* norm, void* out, bool root,
                 bool is_double) {
  with_scalar(is_double, [&](auto scalar) {
    invert_norm_rows<decltype(scalar)>(where, positions, norm, out, root);
  });
}

}  // namespace SK_ISA

template <Isa kIsa>
void set_cpu_loops(PermutohedralApi& api) {
  api.pack = pack;
  api.unpack = unpack;
  api.splat = splat;
  api.slice = slice;
  api.weights_grad = weights_grad;
  api.invert_norm = invert_norm;
}

template void set_cpu_loops<Isa::SK_ISA>(PermutohedralApi&);
}  // namespace segkernels
