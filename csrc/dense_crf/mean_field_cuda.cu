// Mean field on CUDA. A step is: for every term, splat Q into pairs, merge and blur the pairs' sums
// (shared with the filter), apply the compatibility to the vertices; then one kernel slices all
// terms, adds the unary energy and takes the softmax. There a group of G neighbouring threads owns
// a point, each with up to B vectors of its channels in registers. Nothing is atomic, so that the
// bits are the same in every run; nothing allocates or synchronises, so that it can be captured in
// a graph.
#include "common/parallel_for.h"
#include "dense_crf/compat.h"
#include "dense_crf/mean_field.h"
#include "permutohedral/lanes.h"

namespace segkernels {
namespace {

template <class T, int G>
__device__ T group_max(T v) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xFFFFFFFFu, v, step);
    v = other > v ? other : v;
  }
  return v;
}

template <class T, int G>
__device__ T group_sum(T v) {
#pragma unroll
  for (int step = G / 2; step > 0; step /= 2) v = v + __shfl_xor_sync(0xFFFFFFFFu, v, step);
  return v;
}

// The channels of one thread: B vectors in registers, or (B = 0, very many classes) in the point's
// row of the result.
template <class V, int B>
struct Channels {
  V kept[B];
  __device__ Channels(V*, int) {}
  __device__ V& at(int i, int) { return kept[i]; }
};
template <class V>
struct Channels<V, 0> {
  V* row;
  int lane;
  __device__ Channels(V* row, int lane) : row(row), lane(lane) {}
  __device__ V& at(int i, int lanes) { return row[lane + i * lanes]; }
};

template <class T, class V>
__device__ T lane_value(const V& v, int i) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return v;
  } else {
    return v[i];
  }
}

template <class T, class V>
__device__ void set_lane(V& v, int i, T value) {
  if constexpr (sizeof(V) == sizeof(T)) {
    v = value;
  } else {
    v[i] = value;
  }
}

// Adds a term's message to the channels; false for a point that the term's lattice skips.
template <class T, class V, int G, int B>
__device__ bool add_term(const MeanFieldTerm& term, int64_t position, int32_t tile, int lane,
                         int blocks, Channels<V, B>& z) {
  const Lattice& l = term.lattice;
  const int n = l.dims + 1;
  const uint16_t* ids = l.local_ids + position * n;
  if (ids[0] == kSkipped) return false;
  const T* weights = static_cast<const T*>(l.weights) + position * n;
  const T* scale = static_cast<const T*>(term.scale_out);
  const T s = scale != nullptr ? scale[position] : T(1);
  const int32_t* vertices = tile_vertices(l, tile);
  const V* rows = static_cast<const V*>(term.vertices);
  for (int k = 0; k < n; ++k) {
    const V* row = rows + int64_t(vertices[ids[k]]) * blocks;
    const T w = weights[k] * s;
    const int count = B > 0 ? B : (blocks - lane + G - 1) / G;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (B == 0 || lane + i * G < blocks) z.at(i, G) = mul_add(w, row[lane + i * G], z.at(i, G));
    }
  }
  return true;
}

template <class T, class V, int G, int B>
__global__ void __launch_bounds__(kThreads) update_kernel(MeanField m, bool first, bool last) {
  constexpr int W = sizeof(V) / sizeof(T);
  const int blocks = m.width / W;
  const int lane = threadIdx.x % G;
  const int count = B > 0 ? B : (blocks - lane + G - 1) / G;
  const int64_t positions = position_count(m.grid);
  const V* energy = static_cast<const V*>(m.energy);
  V* rows = static_cast<V*>(m.rows);
  // A block's threads hold whole groups, and positions come in whole tiles of 256, so that no
  // thread of a warp leaves the loop before the others.
  const int64_t step = int64_t(gridDim.x) * (kThreads / G);
  for (int64_t p = int64_t(blockIdx.x) * (kThreads / G) + threadIdx.x / G; p < positions;
       p += step) {
    const int32_t tile = tile_of(m.grid, p);
    Channels<V, B> z(rows + p * blocks, lane);
    for (int i = 0; i < count; ++i) {
      V v{};
      if (B == 0 || lane + i * G < blocks) {
        v = energy[p * blocks + lane + i * G];
      } else {
        for (int c = 0; c < W; ++c) set_lane<T>(v, c, T(-3e38));
      }
      z.at(i, G) = v;
    }
    bool taken = true;
    for (int k = 0; k < m.term_count; ++k) {
      if (first) {
        const Lattice& l = m.terms[k].lattice;
        taken = taken && l.local_ids[p * (l.dims + 1)] != kSkipped;
      } else {
        taken = add_term<T, V, G, B>(m.terms[k], p, tile, lane, blocks, z) && taken;
      }
    }

    T top = T(-3e38);
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < W; ++c) {
        const T v = lane_value<T>(z.at(i, G), c);
        top = v > top ? v : top;
      }
    }
    top = group_max<T, G>(top);
    const bool log_scores = last && m.log;
    T sum = 0;
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < W; ++c) {
        const T v = lane_value<T>(z.at(i, G), c) - top;
        const T e = exp(v);
        sum += e;
        set_lane<T>(z.at(i, G), c, log_scores ? v : e);
      }
    }
    sum = group_sum<T, G>(sum);
    // A point whose scores are not finite gives NaN, and nothing to the others.
    const bool good = taken && sum - sum == T(0);
    const T faulty = last ? T(NAN) : T(0);
    const T change = log_scores ? log(sum) : T(1) / sum;
    for (int i = 0; i < count; ++i) {
      if (B > 0 && lane + i * G >= blocks) continue;
      V out{};
      for (int c = 0; c < W; ++c) {
        const T v = lane_value<T>(z.at(i, G), c);
        set_lane<T>(out, c, !good ? faulty : log_scores ? v - change : v * change);
      }
      rows[p * blocks + lane + i * G] = out;
    }
  }
}

template <class T, class V, int G, int B>
void launch_update(const Where& where, const MeanField& m, bool first, bool last) {
  update_kernel<T, V, G, B>
      <<<grid_for(position_count(m.grid), kThreads / G), kThreads, 0, stream_of(where)>>>(m, first,
                                                                                          last);
  check_launch("dense_crf update");
}

template <class T, class V>
void update(const Where& where, const MeanField& m, bool first, bool last) {
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  with_lanes<T, V>(blocks, [&](auto lanes, auto vectors) {
    constexpr int G = decltype(lanes)::value;
    // Rows that are too long for the registers stay in memory.
    constexpr int B = G == 32 ? 0 : decltype(vectors)::value;
    launch_update<T, V, G, B>(where, m, first, last);
  });
}

// Sums of a term, blurred, with its compatibility applied, in term.vertices.
template <class T, class V>
void message(const Where& where, const MeanField& m, const MeanFieldTerm& term) {
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  const Lattice& l = term.lattice;
  V* vertices = static_cast<V*>(term.vertices);
  V* scratch = static_cast<V*>(term.scratch);
  const V* compat = static_cast<const V*>(term.compat);
  const V* pairs = static_cast<const V*>(term.pairs);
  splat_pairs(where, l, m.rows, term.scale_in, term.pairs, m.width, sizeof(T) == sizeof(double));
  if (term.compat_is_matrix) {
    merge_and_blur<T, V>(where, l, pairs, scratch, vertices, blocks, false);
    parallel_rows(
        where, l.vertex_bound, l.counts, blocks,
        MixChannels<T, V>{reinterpret_cast<const T*>(scratch), vertices, compat, m.width, blocks},
        "dense_crf compatibility");
  } else {
    merge_and_blur<T, V>(where, l, pairs, vertices, scratch, blocks, false, compat);
  }
}

template <class T, class V>
void run(const Where& where, const MeanField& m) {
  update<T, V>(where, m, true, m.iterations == 0);
  for (int i = 1; i <= m.iterations; ++i) {
    for (int k = 0; k < m.term_count; ++k) message<T, V>(where, m, m.terms[k]);
    update<T, V>(where, m, false, i == m.iterations);
  }
}

template <class T>
void run_width(const Where& where, const MeanField& m) {
  if (m.width % 4 == 0) return run<T, Vec<T, 16 / sizeof(T)>>(where, m);
  run<T, T>(where, m);
}

}  // namespace

void mean_field_cuda(const Where& where, const MeanField& m, bool is_double) {
  const DeviceGuard guard(where.device);
  if (is_double) {
    run_width<double>(where, m);
  } else {
    run_width<float>(where, m);
  }
}

}  // namespace segkernels
