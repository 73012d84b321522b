// Functors that resample [planes, height, width, inner] (contiguous: a plane a channel, inner = 1;
// channels_last: a plane an image, inner = C), forward and backward.
//
// Forward: a thread has V elements of a row, strided so that accesses coalesce, and loops over a
// few output rows. It interpolates each input row along the width once.
//
// Backward: a block has a tile of the input. Its threads first sum a column of the gradient down
// the height each, loading every element once, then a cell of the tile along the width. No atomics;
// the order of summation is fixed.
#pragma once

#include "common/any16.h"
#include "interpolate/axis.h"

namespace segkernels {

template <class A>
struct Geometry {
  int64_t planes;
  int32_t inner;
  Axis<A> y, x;
};

inline namespace SK_NS {

// i = quotient * n + remainder. 64-bit division is a function call on the GPU, and seldom needed.
SK_HD int64_t divide(int64_t i, int32_t n, int32_t& remainder) {
  if (i <= int64_t(UINT32_MAX)) {
    const uint32_t quotient = uint32_t(i) / uint32_t(n);
    remainder = int32_t(uint32_t(i) - quotient * uint32_t(n));
    return quotient;
  }
  remainder = int32_t(i % n);
  return i / n;
}

// The K values of the rows that the last output read.
template <class A, int K, int V>
struct RowWindow {
  A value[V][kMostTaps<K>] = {};
  int32_t start = 0;
  bool filled = false;

  // load(k) fills value[.][k]. `slides`: a start that is one larger shifts the taps by one.
  template <class Load>
  SK_HD void move_to(int32_t wanted, bool slides, const Load& load) {
    if (filled && wanted == start) return;
    if (K != kAnyTaps && filled && slides && wanted == start + 1) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int k = 0; k + 1 < K; ++k) value[v][k] = value[v][k + 1];
      }
      load(K - 1);
    } else {
#pragma unroll
      for (int k = 0; k < kMostTaps<K>; ++k) load(k);
    }
    start = wanted;
    filled = true;
  }
};

// Elements a thread: fewer where their taps would take too many registers.
template <int K>
constexpr int kElements = K == kAnyTaps ? 1
                          : K == 4      ? 2
                                        : 4;

template <class T, int K>
struct Forward {
  using A = Acc<T>;
  static constexpr int V = kElements<K>;
  Geometry<A> g;
  const T* input;
  T* output;
  int32_t rows;        // output rows a thread
  int32_t row_blocks;  // ceil(out height / rows)
  int32_t threads;     // a row: ceil(out width * inner / V)

  SK_HD int64_t count() const { return g.planes * row_blocks * threads; }

  SK_HD void operator()(int64_t i) const {
    int32_t thread, row_block;
    const int64_t plane = divide(divide(i, threads, thread), row_blocks, row_block);
    const int32_t first = row_block * rows;
    const int32_t last = first + rows < g.y.out ? first + rows : g.y.out;
    const int64_t in_row = int64_t(g.x.in) * g.inner, out_row = int64_t(g.x.out) * g.inner;
    Taps<A, K> tx[V];
    int32_t channel[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t e =
          thread + int64_t(v) * threads < out_row ? thread + int64_t(v) * threads : out_row - 1;
      const int32_t x = g.inner == 1 ? int32_t(e) : int32_t(e / g.inner);
      channel[v] = int32_t(e - int64_t(x) * g.inner);
      tx[v] = taps_at<K>(g.x, x);
    }
    const T* in = input + plane * g.y.in * in_row;
    T* out = output + (plane * g.y.out + first) * out_row + thread;
    RowWindow<A, K, V> window;
    for (int32_t y = first; y < last; ++y) {
      const Taps<A, K> ty = taps_at<K>(g.y, y);
      window.move_to(ty.start, !copies(g.y), [&](int k) {
        if (k >= tap_count<K>(g.y)) return;
        const T* row = in + tap_position(g.y, ty.start, k) * in_row;
#pragma unroll
        for (int v = 0; v < V; ++v) window.value[v][k] = along(row, tx[v], channel[v]);
      });
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (thread + int64_t(v) * threads < out_row) {
          const A* values = window.value[v];
          narrow(sum_taps(g.y, ty, [&](int k) { return values[k]; }), out[int64_t(v) * threads]);
        }
      }
      out += out_row;
    }
  }

  SK_HD A along(const T* row, const Taps<A, K>& taps, int32_t c) const {
    return sum_taps(g.x, taps, [&](int k) {
      return A(widen(row[int64_t(tap_position(g.x, taps.start, k)) * g.inner + c]));
    });
  }
};

// Sums over the `readers` of inputs [begin, end), in ascending order: load(i) gives V values of
// output i, store(j, sums) takes the sums of input j. Loads each output once.
template <class A, int K, int V, class Load, class Store>
SK_HD void sum_readers(const Axis<A>& axis, const Readers& readers, int32_t begin, int32_t end,
                       const Load& load, const Store& store) {
  constexpr int kMost = kMostTaps<K>;
  const int count = tap_count<K>(axis);
  const int32_t last = readers.last;
  int32_t i = readers.first;
  // sum[.][k] belongs to input base + k. Inputs before 0 are clamped to 0, those behind the axis to
  // the last.
  A sum[V][kMost] = {};
  int32_t base = i < last ? start_at<K>(axis, i) : begin;
  if (base > begin) base = begin;
  const auto advance = [&](int32_t wanted) {
    for (; base < wanted; ++base) {
      const bool fold = base == axis.in - 1;
      if (base >= begin && base < end) {
        A total[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          total[v] = sum[v][0];
#pragma unroll
          for (int k = 1; k < kMost; ++k)
            total[v] = fold && k < count ? total[v] + sum[v][k] : total[v];
        }
        store(base, total);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A carried = base < 0 ? sum[v][0] : A(0);
#pragma unroll
        for (int k = 0; k + 1 < kMost; ++k) sum[v][k] = sum[v][k + 1];
        sum[v][kMost - 1] = A(0);
        if (count > 1) sum[v][0] += carried;
      }
    }
  };
  for (; i < last; ++i) {
    const Taps<A, K> taps = taps_at<K>(axis, i);
    if (taps.start > base) advance(taps.start < axis.in - 1 ? taps.start : axis.in - 1);
    A values[V];
    load(i, taps, values);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sum[v][0] =
          count == 1 ? sum[v][0] + values[v] : mul_add(taps.weight[0], values[v], sum[v][0]);
      if (!copies(axis)) {
#pragma unroll
        for (int k = 1; k < kMost; ++k) {
          if (k < count) sum[v][k] = mul_add(taps.weight[k], values[v], sum[v][k]);
        }
      }
    }
  }
  advance(end);
}

// Tiles of the input: `rows` x `columns` elements times `channels` of `inner`, which at most `span`
// columns of the output read.
struct Tiling {
  int32_t rows, columns, channels, span;
  int32_t row_tiles, column_tiles, channel_tiles;

  SK_HD int64_t pitch() const { return int64_t(span) * channels; }
};

struct Tile {
  int64_t plane;
  int32_t channel, row, row_end, column, column_end;
  Readers y, x;
};

template <int K, class A>
SK_HD Tile tile_at(const Geometry<A>& g, const Tiling& t, int64_t i) {
  Tile tile;
  i = divide(i, t.column_tiles, tile.column);
  i = divide(i, t.row_tiles, tile.row);
  tile.plane = divide(i, t.channel_tiles, tile.channel);
  tile.column *= t.columns;
  tile.row *= t.rows;
  tile.channel *= t.channels;
  tile.row_end = tile.row + t.rows < g.y.in ? tile.row + t.rows : g.y.in;
  tile.column_end = tile.column + t.columns < g.x.in ? tile.column + t.columns : g.x.in;
  tile.y = readers_of<K>(g.y, tile.row, tile.row_end);
  tile.x = readers_of<K>(g.x, tile.column, tile.column_end);
  return tile;
}

// Rows of a tile, at most: a thread keeps their sums in registers.
constexpr int kTileRows = 8;

template <class T, int K>
struct Backward {
  using A = Acc<T>;
  Geometry<A> g;
  Tiling tiling;
  const T* grad_output;
  T* grad_input;

  SK_HD int64_t tiles() const {
    return g.planes * tiling.channel_tiles * tiling.row_tiles * tiling.column_tiles;
  }
  SK_HD Tile tile(int64_t i) const { return tile_at<K>(g, tiling, i); }
  SK_HD int columns() const { return int(tiling.pitch()); }
  SK_HD int cells() const { return tiling.columns * tiling.channels; }

  // First step: sums column i of the tile's readers down the height into `sums` [rows, pitch].
  SK_HD void column(const Tile& tile, int i, A* sums) const {
    const int32_t c = tile.channel + i % tiling.channels;
    const int32_t x = tile.x.first + i / tiling.channels;
    if (c >= g.inner || x >= tile.x.last) return;
    const int64_t out_row = int64_t(g.x.out) * g.inner;
    const T* from = grad_output + tile.plane * g.y.out * out_row + int64_t(x) * g.inner + c;
    sum_readers<A, K, 1>(
        g.y, tile.y, tile.row, tile.row_end,
        [&](int32_t y, const Taps<A, K>&, A* value) { *value = widen(from[y * out_row]); },
        [&](int32_t j, const A* sum) { sums[(j - tile.row) * tiling.pitch() + i] = *sum; });
  }

  // Second step: sums cell i of every row of the tile along the width.
  SK_HD void cell(const Tile& tile, int i, const A* sums) const {
    const int32_t offset = i % tiling.channels, c = tile.channel + offset;
    const int32_t j = tile.column + i / tiling.channels;
    if (c >= g.inner || j >= tile.column_end) return;
    const Readers readers = readers_of<K>(g.x, j, j + 1);
    A sum[kTileRows] = {};
    for (int32_t x = readers.first; x < readers.last; ++x) {
      const A w = weight_of<K>(g.x, x, j);
      const A* at = sums + int64_t(x - tile.x.first) * tiling.channels + offset;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if (r < tile.row_end - tile.row) sum[r] = mul_add(w, at[r * tiling.pitch()], sum[r]);
      }
    }
    const int64_t in_row = int64_t(g.x.in) * g.inner;
    T* to = grad_input + (tile.plane * g.y.in + tile.row) * in_row + int64_t(j) * g.inner + c;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (r < tile.row_end - tile.row) narrow(sum[r], to[r * in_row]);
    }
  }
};

// Fallback where a tile does not fit (more than ten thousand columns read one input): an input
// element a thread.
template <class T>
struct BackwardDirect {
  using A = Acc<T>;
  static constexpr int K = kAnyTaps;
  Geometry<A> g;
  Format<T> format;
  const T* grad_output;
  T* grad_input;

  SK_HD int64_t count() const { return g.planes * g.y.in * g.x.in * g.inner; }

  SK_HD void operator()(int64_t i) const {
    const int64_t out_row = int64_t(g.x.out) * g.inner;
    int32_t j, c, r;
    const int64_t row = divide(divide(i, g.inner, c), g.x.in, j);
    const int64_t plane = divide(row, g.y.in, r);
    const Readers xs = readers_of<K>(g.x, j, j + 1), ys = readers_of<K>(g.y, r, r + 1);
    A sum = A(0);
    for (int32_t y = ys.first; y < ys.last; ++y) {
      const T* from = grad_output + (plane * g.y.out + y) * out_row + c;
      A along = A(0);
      for (int32_t x = xs.first; x < xs.last; ++x) {
        along = mul_add(weight_of<K>(g.x, x, j), format.wide(from[int64_t(x) * g.inner]), along);
      }
      sum = mul_add(weight_of<K>(g.y, y, r), along, sum);
    }
    grad_input[i] = format.narrow(sum);
  }
};

}  // namespace SK_NS

template <int K, class A>
int32_t threads_per_row(const Geometry<A>& g) {
  return int32_t((int64_t(g.x.out) * g.inner + kElements<K> - 1) / kElements<K>);
}

// Shared memory a tile may use: the default limit of a block.
constexpr int64_t kTileBytes = 48 * 1024;

// The widest tiles whose sums, `values` a column, fit in `bytes`.
template <class A>
Tiling tiling_of(const Geometry<A>& g, int taps, int values = 1, int max_rows = kTileRows,
                 int64_t bytes = kTileBytes) {
  Tiling t{};
  t.channels = g.inner < 32 ? g.inner : 32;
  const auto span_of = [&](int64_t columns) {
    // Margins of one: the start of a range is rounded.
    const double ratio = g.x.scale > A(0) ? double(g.x.inverse) : double(g.x.out);
    const double span = (double(columns) + taps - 1) * ratio + 4;
    return span < double(g.x.out) && columns < g.x.in ? int64_t(span) : int64_t(g.x.out);
  };
  // Half of the memory, so that several blocks fit a multiprocessor; all of it if one column needs
  // it.
  for (t.rows = max_rows < g.y.in ? max_rows : g.y.in;;) {
    const int64_t fit = bytes / 2 / int64_t(sizeof(A)) / values / t.rows;
    int64_t columns = g.x.in < 512 ? g.x.in : 512;
    while (columns > 1 && span_of(columns) * t.channels > fit) columns = (columns + 1) / 2;
    t.columns = int32_t(columns);
    t.span = int32_t(span_of(columns));
    if (int64_t(t.span) * t.channels <= fit) break;
    if (t.rows > 1) {
      t.rows = (t.rows + 1) / 2;
    } else if (t.channels > 1) {
      t.channels = (t.channels + 1) / 2;
    } else {
      break;
    }
  }
  t.row_tiles = (g.y.in + t.rows - 1) / t.rows;
  t.column_tiles = (g.x.in + t.columns - 1) / t.columns;
  t.channel_tiles = (g.inner + t.channels - 1) / t.channels;
  return t;
}

}  // namespace segkernels
