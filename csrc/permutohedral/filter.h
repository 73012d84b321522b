// The filter on rows of channels ([row][width], as `blocks` = width / W vectors Vec<T, W>): pack,
// merge, blur, slice, unpack, and gradients. Functors, parallel over positions or vertices.
#pragma once

#include "common/parallel_for.h"
#include "common/status.h"
#include "common/vec.h"
#include "permutohedral/lattice.h"

namespace segkernels {

// The kind of scores in a row. All but kValues are stored as minus the energy, which is -infinity
// for an impossible class.
enum RowKind : int { kValues = 0, kUnary = 1, kLogits = 2, kProbs = 3 };

struct Strided {
  const void* data;
  int64_t batch, channel, point;  // strides in elements
};

inline namespace SK_NS {

// One vertex: the sum of its pairs' rows, tiles ascending.
template <class V>
struct MergePairs {
  Lattice lattice;
  const V* pairs;
  V* vertices;
  int blocks;

  SK_HD void operator()(int64_t vertex, int block) const {
    const int32_t end = lattice.vertex_start[vertex + 1];
    V sum{};
#pragma unroll 8
    for (int32_t i = lattice.vertex_start[vertex]; i < end; ++i) {
      sum = sum + pairs[int64_t(lattice.vertex_pairs[i]) * blocks + block];
    }
    vertices[vertex * blocks + block] = sum;
  }
};

// out = in + (in[up] + in[down]) / 2 along one axis, times a factor a channel if given. A missing
// neighbour counts as zero.
template <class T, class V>
struct Blur {
  const int32_t* up;
  const int32_t* down;
  const V* in;
  V* out;
  const V* factor;  // [blocks] or null
  int blocks;

  SK_HD void operator()(int64_t vertex, int block) const {
    const int32_t u = up[vertex], d = down[vertex];
    V v = in[vertex * blocks + block];
    if (u >= 0) v = mul_add(T(0.5), in[int64_t(u) * blocks + block], v);
    if (d >= 0) v = mul_add(T(0.5), in[int64_t(d) * blocks + block], v);
    out[vertex * blocks + block] = factor != nullptr ? v * factor[block] : v;
  }
};

// Interpolates a position's row from the vertices of its simplex. False for a skipped point.
template <class T, class V>
SK_HD bool slice_block(const Lattice& l, const int32_t* vertices, int64_t position, const V* rows,
                       int blocks, int block, V& out) {
  const int n = l.dims + 1;
  const uint16_t* ids = l.local_ids + position * n;
  const T* weights = static_cast<const T*>(l.weights) + position * n;
  if (ids[0] == kSkipped) return false;
  V sum = weights[0] * rows[int64_t(vertices[ids[0]]) * blocks + block];
  for (int k = 1; k < n; ++k) {
    sum = mul_add(weights[k], rows[int64_t(vertices[ids[k]]) * blocks + block], sum);
  }
  out = sum;
  return true;
}

// One position: out = scale * slice, or `skipped` for a skipped point.
template <class T, class V>
struct Slice {
  Lattice lattice;
  const V* vertices;
  V* out;
  const T* scale;  // [positions], or null: 1
  T alpha, skipped;
  int blocks;

  SK_HD void operator()(int64_t position, int block) const {
    const int32_t tile = tile_of(lattice.grid, position);
    V v{};
    const bool taken = slice_block<T, V>(lattice, tile_vertices(lattice, tile), position, vertices,
                                         blocks, block, v);
    const T s = taken ? alpha * (scale != nullptr ? scale[position] : T(1)) : T(0);
    out[position * blocks + block] = taken ? s * v : V{} + skipped;
  }
};

// One position: the gradient of its weights, <x, grad_vertices> + <g, vertices>. x: the rows that
// were splatted, into `vertices`; g: the gradient rows, splatted into `grad_vertices`.
template <class T>
struct WeightsGrad {
  Lattice lattice;
  const T* x;
  const T* g;
  const T* vertices;
  const T* grad_vertices;
  T* grad_weights;
  T alpha;
  int width;

  SK_HD void operator()(int64_t position) const {
    const int n = lattice.dims + 1;
    const uint16_t* ids = lattice.local_ids + position * n;
    const int32_t* tile = tile_vertices(lattice, tile_of(lattice.grid, position));
    T* out = grad_weights + position * n;
    for (int k = 0; k < n; ++k) {
      T sum = 0;
      if (ids[0] != kSkipped) {
        const int64_t row = int64_t(tile[ids[k]]) * width;
        for (int c = 0; c < width; ++c) {
          sum = mul_add(x[position * width + c], grad_vertices[row + c], sum);
          sum = mul_add(g[position * width + c], vertices[row + c], sum);
        }
      }
      out[k] = alpha * sum;
    }
  }
};

// 1 / (n + eps) or 1 / sqrt(n + eps) of the norm n.
template <class T>
struct InvertNorm {
  const T* norm;
  T* out;
  bool root;

  SK_HD void operator()(int64_t position) const {
    const T n = norm[position] + T(1e-20);
    out[position] = T(1) / (root ? sqrt(n) : n);
  }
};

SK_HD float natural_log(float x) { return logf(x); }
SK_HD double natural_log(double x) { return log(x); }

// Probabilities are clipped to [0, 1]: without a warning down to -kQuiet and up to 1 + kQuiet.
// Beyond kAllowed they are an error.
constexpr double kQuiet = 1e-2;
constexpr double kAllowed = 0.5;

// Reports probabilities with a minimum of `low` and a maximum of `high`. False if one is an error.
template <class T>
SK_HD bool check_probs(T low, T high, int32_t* status) {
  const bool allowed = low >= T(-kAllowed) && high <= T(1 + kAllowed);
  const bool quiet = low >= T(-kQuiet) && high <= T(1 + kQuiet);
  if (!allowed) report(status, kProbsOutOfRange);
  if (!quiet) report(status, kProbsClipped);
  return allowed;
}

// Copies W channels of one position from a strided tensor to its row. Padding channels are zero, or
// have an energy that makes their probability zero.
template <class T, int W>
struct PackBlock {
  Grid grid;
  Strided source;
  T* rows;
  int channels, width;
  RowKind kind;
  int32_t* status;

  SK_HD void operator()(int64_t position, int block) const {
    const ImagePoint at = point_of(grid, position);
    const T* from =
        static_cast<const T*>(source.data) + at.image * source.batch + at.point * source.point;
    Vec<T, W> v{};
    for (int i = 0; i < W; ++i) {
      const int c = block * W + i;
      T value = 0;
      if (at.point >= 0) value = c < channels ? score(from[c * source.channel]) : padding();
      set_lane(v, i, value);
    }
    reinterpret_cast<Vec<T, W>*>(rows + position * width)[block] = v;
  }

  // Finishes a point's row of scores, of which `top` is the largest. Reports a point where every
  // class is impossible. Subtracts a large `top`, because the messages that are added to the scores
  // would be rounded to its last place; softmax does not change.
  SK_HD void finish(int64_t position, T top) const {
    if (top >= T(-64) && top <= T(64)) return;
    T* row = rows + position * width;
    if (top == -T(INFINITY)) report(status, kScoresNotFinite);
    for (int c = 0; c < channels; ++c) row[c] -= top;
  }

  SK_HD T largest(int64_t position) const {
    T top = -T(INFINITY);
    for (int c = 0; c < channels; ++c) {
      const T v = rows[position * width + c];
      top = v > top ? v : top;
    }
    return top;
  }

 private:
  static SK_HD void set_lane(T& v, int, T value) { v = value; }
  template <class V>
  static SK_HD void set_lane(V& v, int i, T value) {
    v[i] = value;
  }

  SK_HD T padding() const { return kind == kValues ? T(0) : -T(INFINITY); }

  SK_HD T score(T v) const {
    if (kind == kValues) return v;
    if (kind == kUnary) v = -v;
    if (!(v < T(INFINITY))) {
      report(status, kScoresNotFinite);
      return T(NAN);  // softmax then discards the whole point
    }
    if (kind != kProbs) return v;
    if (!check_probs(v, v, status)) return T(NAN);
    return natural_log(v < T(1e-5) ? T(1e-5) : v > T(1) ? T(1) : v);
  }
};

// One position, all channels: neighbouring threads read neighbouring points.
template <class T, int W>
struct PackRow {
  PackBlock<T, W> pack;

  SK_HD void operator()(int64_t position) const {
    for (int b = 0; b < pack.width / W; ++b) pack(position, b);
    if (pack.kind != kValues && point_of(pack.grid, position).point >= 0)
      pack.finish(position, pack.largest(position));
  }
};

// One position, from its row to a strided tensor.
template <class T, int W>
struct UnpackRow {
  Grid grid;
  const T* rows;
  Strided target;
  int channels, width;

  SK_HD void operator()(int64_t position) const {
    const ImagePoint at = point_of(grid, position);
    if (at.point < 0) return;
    T* to = static_cast<T*>(const_cast<void*>(target.data)) + at.image * target.batch +
            at.point * target.point;
    const Vec<T, W>* row = reinterpret_cast<const Vec<T, W>*>(rows + position * width);
    for (int b = 0; b < width / W; ++b) {
      const Vec<T, W> v = row[b];
      for (int i = 0; i < W && b * W + i < channels; ++i)
        to[(b * W + i) * target.channel] = lane(v, i);
    }
  }

 private:
  static SK_HD T lane(const T& v, int) { return v; }
  template <class V>
  static SK_HD T lane(const V& v, int i) {
    return v[i];
  }
};

// The rest of splat and the blur, for both compilers: merges pairs into vertices, then blurs along
// every axis. The result is in `vertices`, times `factor` a channel if given.
template <class T, class V>
void merge_and_blur(const Where& where, const Lattice& l, const V* pairs, V* vertices, V* scratch,
                    int blocks, bool reverse, const V* factor = nullptr) {
  const int axes = l.dims + 1;
  V* from = axes % 2 == 0 ? vertices : scratch;
  V* to = axes % 2 == 0 ? scratch : vertices;
  parallel_rows(where, l.vertex_bound, l.counts, blocks, MergePairs<V>{l, pairs, from, blocks},
                "merge");
  for (int i = 0; i < axes; ++i) {
    const int axis = reverse ? axes - 1 - i : i;
    const int32_t* up = l.neighbours + int64_t(axis) * 2 * l.vertex_bound;
    parallel_rows(
        where, l.vertex_bound, l.counts, blocks,
        Blur<T, V>{up, up + l.vertex_bound, from, to, i + 1 == axes ? factor : nullptr, blocks},
        "blur");
    V* t = from;
    from = to;
    to = t;
  }
}

// Inverse of the gain of splat, blur with the kernel 1/2, 1, 1/2, and slice.
SK_HD double slice_alpha(int dims) {
  double p = 1;
  for (int i = 0; i < dims; ++i) p *= 0.5;
  return 1.0 / (1.0 + p);
}

template <class T, class V>
void slice_rows(const Where& where, const Lattice& l, const void* vertices, const void* scale,
                double skipped, void* rows, int width) {
  const int blocks = width * int(sizeof(T)) / int(sizeof(V));
  const Slice<T, V> f{l,
                      static_cast<const V*>(vertices),
                      static_cast<V*>(rows),
                      static_cast<const T*>(scale),
                      T(slice_alpha(l.dims)),
                      T(skipped),
                      blocks};
  parallel_rows(where, position_count(l.grid), nullptr, blocks, f, "permutohedral slice");
}

template <class T>
void weights_grad_rows(const Where& where, const Lattice& l, const void* x, const void* g,
                       const void* vertices, const void* grad_vertices, void* grad_weights,
                       int width) {
  const WeightsGrad<T> f{l,
                         static_cast<const T*>(x),
                         static_cast<const T*>(g),
                         static_cast<const T*>(vertices),
                         static_cast<const T*>(grad_vertices),
                         static_cast<T*>(grad_weights),
                         T(slice_alpha(l.dims)),
                         width};
  parallel_for(where, position_count(l.grid), f, "permutohedral weights_grad");
}

template <class T>
void invert_norm_rows(const Where& where, int64_t positions, const void* norm, void* out,
                      bool root) {
  const InvertNorm<T> f{static_cast<const T*>(norm), static_cast<T*>(out), root};
  parallel_for(where, positions, f, "permutohedral norm");
}

}  // namespace SK_NS
}  // namespace segkernels
