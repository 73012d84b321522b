// Mean field on CUDA, two kernels an iteration. The first has a tile a block and G neighbouring
// threads a point, each with up to B vectors of channels in registers: it slices all terms, adds
// the unary energy, stores the softmax Q in shared memory, and splats it into the tile's pairs. The
// second is a cooperative launch over all terms: it merges pairs into vertices, blurs along every
// axis with a grid barrier between axes, and applies the compatibility to the vertices. Rows that
// are too long for shared memory, and devices without cooperative launches, take a kernel a step
// instead. No atomics: every run gives the same bits. No allocation and no synchronisation: it can
// be captured in a graph.
#include <cooperative_groups.h>

#include "common/parallel_for.h"
#include "dense_crf/compat.h"
#include "dense_crf/mean_field.h"
#include "permutohedral/dispatch.h"
#include "permutohedral/row_threads.h"
#include "permutohedral/splat_cuda.h"

namespace segkernels {
namespace {

template <class T>
__device__ T group_max(T v, int group) {
#pragma unroll
  for (int step = group / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xFFFFFFFFu, v, step);
    v = other > v ? other : v;
  }
  return v;
}

template <class T>
__device__ T group_sum(T v, int group) {
#pragma unroll
  for (int step = group / 2; step > 0; step /= 2) v = v + __shfl_xor_sync(0xFFFFFFFFu, v, step);
  return v;
}

// A thread's channels: B vectors in registers, or (B = 0, very many classes) in the point's row in
// memory.
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

// Adds a term's message to the channels. False if the term's lattice skips the point.
template <class T, class V, int B>
__device__ bool add_term(const MeanFieldTerm& term, int64_t position, int32_t tile, int lane,
                         int group, int blocks, Channels<V, B>& z) {
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
    const int count = B > 0 ? B : (blocks - lane + group - 1) / group;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (B == 0 || lane + i * group < blocks)
        z.at(i, group) = mul_add(w, row[lane + i * group], z.at(i, group));
    }
  }
  return true;
}

// Writes Q of point p to `row`, with `group` threads: softmax of minus the energy plus the terms'
// messages; `first`: of minus the energy alone.
template <class T, class V, int B>
__device__ void update_point(const MeanField& m, bool first, bool last, int64_t p, int32_t tile,
                             int group, V* row) {
  constexpr int W = sizeof(V) / sizeof(T);
  [[maybe_unused]] constexpr int kUnroll = B > 0 ? B : 1;
  const int blocks = m.width / W;
  const int lane = threadIdx.x % group;
  const int count = B > 0 ? B : (blocks - lane + group - 1) / group;
  const V* energy = static_cast<const V*>(m.energy);
  Channels<V, B> z(row, lane);
#pragma unroll(kUnroll)
  for (int i = 0; i < count; ++i) {
    V v{};
    if (B == 0 || lane + i * group < blocks) {
      v = energy[p * blocks + lane + i * group];
    } else {
      for (int c = 0; c < W; ++c) set_lane<T>(v, c, T(-INFINITY));
    }
    z.at(i, group) = v;
  }
  bool taken = true;
  for (int k = 0; k < m.term_count; ++k) {
    if (first) {
      const Lattice& l = m.terms[k].lattice;
      taken = taken && l.local_ids[p * (l.dims + 1)] != kSkipped;
    } else {
      taken = add_term<T, V, B>(m.terms[k], p, tile, lane, group, blocks, z) && taken;
    }
  }

  T top = T(-INFINITY);
#pragma unroll(kUnroll)
  for (int i = 0; i < count; ++i) {
    for (int c = 0; c < W; ++c) {
      const T v = lane_value<T>(z.at(i, group), c);
      top = v > top ? v : top;
    }
  }
  top = group_max(top, group);
  const bool log_scores = last && m.log;
  T sum = 0;
#pragma unroll(kUnroll)
  for (int i = 0; i < count; ++i) {
    for (int c = 0; c < W; ++c) {
      const T v = lane_value<T>(z.at(i, group), c) - top;
      const T e = exp(v);
      sum += e;
      set_lane<T>(z.at(i, group), c, log_scores ? v : e);
    }
  }
  sum = group_sum(sum, group);
  // A point with scores that are not finite is NaN, and contributes nothing.
  const bool good = taken && sum - sum == T(0);
  const T faulty = last ? T(NAN) : T(0);
  const T change = log_scores ? log(sum) : T(1) / sum;
#pragma unroll(kUnroll)
  for (int i = 0; i < count; ++i) {
    if (B > 0 && lane + i * group >= blocks) continue;
    V out{};
    for (int c = 0; c < W; ++c) {
      const T v = lane_value<T>(z.at(i, group), c);
      set_lane<T>(out, c, !good ? faulty : log_scores ? v - change : v * change);
    }
    row[lane + i * group] = out;
  }
}

// G threads a point (0: `threads`) with B vectors each (0: any number). For float64 the launch
// bounds ask for one block, for ptxas not to spill.
template <class T, class V, int G, int B>
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(double))
    update_kernel(MeanField m, bool first, bool last, int threads) {
  const int group = G > 0 ? G : threads;
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  const int64_t positions = position_count(m.grid);
  V* rows = static_cast<V*>(m.rows);
  // A block has whole groups of threads, and positions come in tiles of 256, so all threads of a
  // warp leave the loop together.
  const int64_t step = int64_t(gridDim.x) * (kThreads / group);
  for (int64_t p = int64_t(blockIdx.x) * (kThreads / group) + threadIdx.x / group; p < positions;
       p += step) {
    update_point<T, V, B>(m, first, last, p, tile_of(m.grid, p), group, rows + p * blocks);
  }
}

constexpr int kSharedBytes = 48 * 1024;  // the default limit a block

// Few classes have their last step in update_kernel: the logarithm would take registers, and so
// room for other blocks.
template <int G, int B>
constexpr bool kLastApart = G * B == 1;

// One tile a block: Q of its points stays in shared memory, and is splatted into the pairs of all
// terms; `last`: is copied to the result.
template <class T, class V, int G, int B>
__global__ void __launch_bounds__(kThreads)
    update_and_splat_kernel(MeanField m, bool first, bool last, int threads) {
  if (kLastApart<G, B>) last = false;
  extern __shared__ __align__(16) unsigned char memory[];
  V* rows = reinterpret_cast<V*>(memory);  // [points of a tile, blocks]
  const int group = G > 0 ? G : threads;
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  const int32_t tile = blockIdx.x;
  const int64_t base = int64_t(tile) * kThreads;
  for (int i = threadIdx.x / group; i < kThreads; i += kThreads / group) {
    update_point<T, V, B>(m, first, last, base + i, tile, group, rows + i * blocks);
  }
  __syncthreads();
  if (last) {
    V* to = static_cast<V*>(m.rows) + base * blocks;
    for (int i = threadIdx.x; i < kThreads * blocks; i += kThreads) to[i] = rows[i];
    return;
  }
  for (int k = 0; k < m.term_count; ++k) {
    const MeanFieldTerm& term = m.terms[k];
    const Lattice& l = term.lattice;
    const T* weights = static_cast<const T*>(term.splat_weights) + base * (l.dims + 1);
    splat_tile<T, (G > 0 ? G : 4), (B > 0 ? B : 1)>(l, tile, rows, weights,
                                                    static_cast<const T*>(nullptr),
                                                    static_cast<V*>(term.pairs), blocks);
  }
}

// One entry in sorted order: its weight times scale_in of its point.
template <class T>
struct ScaleWeights {
  Lattice lattice;
  const T* scale;
  T* out;

  SK_HD void operator()(int64_t i) const {
    const int32_t points = tile_points(lattice.grid);
    const int64_t tile = i / (points * (lattice.dims + 1));
    out[i] =
        static_cast<const T*>(lattice.order_weights)[i] * scale[tile * points + lattice.order[i]];
  }
};

// The first of the blur's two buffers, chosen so that the last axis ends in `vertices`, or in
// `scratch` if a compatibility matrix is still to be applied.
template <class V>
__device__ V* merged_rows(const MeanFieldTerm& term) {
  const bool even = (term.lattice.dims + 1) % 2 == 0;
  return static_cast<V*>(even != term.compat_is_matrix ? term.vertices : term.scratch);
}

template <class V>
__device__ V* other_rows(const MeanFieldTerm& term) {
  const bool even = (term.lattice.dims + 1) % 2 == 0;
  return static_cast<V*>(even != term.compat_is_matrix ? term.scratch : term.vertices);
}

// Merges pairs into vertices: `lanes` * `groups` neighbouring threads (a warp if groups > 1) share
// a row. A group sums every groups-th pair in order, and the groups' sums are added as a tree.
template <class T, class V>
__device__ void merge_rows(const MeanFieldTerm& term, int blocks, int lanes, int groups) {
  const Lattice& l = term.lattice;
  const V* pairs = static_cast<const V*>(term.pairs);
  V* out = merged_rows<V>(term);
  const int team = lanes * groups;
  const int64_t teams = int64_t(gridDim.x) * (blockDim.x / team);
  const int lane = threadIdx.x % lanes, group = threadIdx.x % team / lanes;
  const int64_t rows = row_count(l.vertex_bound, l.counts);
  for (int64_t row = int64_t(blockIdx.x) * (blockDim.x / team) + threadIdx.x / team; row < rows;
       row += teams) {
    const int32_t begin = l.vertex_start[row] + group, end = l.vertex_start[row + 1];
    for (int b = lane; b < blocks || (b == lane && groups > 1); b += lanes) {
      const int block = b < blocks ? b : blocks - 1;  // of a thread that only joins the shuffles
      V sum{};
#pragma unroll 4
      for (int32_t i = begin; i < end; i += groups) {
        sum = sum + pairs[int64_t(l.vertex_pairs[i]) * blocks + block];
      }
      for (int step = lanes; step < team; step *= 2) {
        if constexpr (sizeof(V) == sizeof(T)) {
          sum = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        } else {
#pragma unroll
          for (int c = 0; c < int(sizeof(V) / sizeof(T)); ++c)
            sum[c] = sum[c] + __shfl_xor_sync(0xFFFFFFFFu, T(sum[c]), step);
        }
      }
      if (group == 0 && b < blocks) out[row * blocks + b] = sum;
    }
  }
}

constexpr int kCooperativeThreads = 512;  // threads a block; two blocks fit a multiprocessor

// Merges and blurs the pairs of all terms, and applies the compatibility.
template <class T, class V>
__global__ void __launch_bounds__(kCooperativeThreads, 2)
    merge_and_blur_kernel(MeanField m, int lanes) {
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  int axes = 0;
  bool matrices = false;
  for (int k = 0; k < m.term_count; ++k) {
    const MeanFieldTerm& term = m.terms[k];
    // With few features a vertex has few pairs.
    merge_rows<T, V>(term, blocks, lanes, term.lattice.dims > 2 ? 32 / lanes : 1);
    axes = term.lattice.dims + 1 > axes ? term.lattice.dims + 1 : axes;
    matrices = matrices || term.compat_is_matrix;
  }
  for (int axis = 0; axis < axes; ++axis) {
    grid.sync();
    for (int k = 0; k < m.term_count; ++k) {
      const MeanFieldTerm& term = m.terms[k];
      const Lattice& l = term.lattice;
      if (axis > l.dims) continue;
      V* merged = merged_rows<V>(term);
      V* other = other_rows<V>(term);
      const int32_t* up = l.neighbours + int64_t(axis) * 2 * l.vertex_bound;
      const bool scaled = axis == l.dims && !term.compat_is_matrix;
      const Blur<T, V> blur{up,
                            up + l.vertex_bound,
                            axis % 2 == 0 ? merged : other,
                            axis % 2 == 0 ? other : merged,
                            scaled ? static_cast<const V*>(term.compat) : nullptr,
                            blocks};
      const int64_t items = row_count(l.vertex_bound, l.counts) * blocks;
      for (int64_t i = thread; i < items; i += threads) {
        // Rows are below 2^31; 32-bit division is faster, if the number of items allows it.
        const int64_t row = items >> 32 == 0 ? int64_t(uint32_t(i) / uint32_t(blocks)) : i / blocks;
        blur(row, int(i - row * blocks));
      }
    }
  }
  if (!matrices) return;
  grid.sync();
  for (int k = 0; k < m.term_count; ++k) {
    const MeanFieldTerm& term = m.terms[k];
    if (!term.compat_is_matrix) continue;
    const MixChannels<T, V> mix{static_cast<const T*>(term.scratch), static_cast<V*>(term.vertices),
                                static_cast<const V*>(term.compat), m.width, blocks};
    const int64_t items = row_count(term.lattice.vertex_bound, term.lattice.counts) * blocks;
    for (int64_t i = thread; i < items; i += threads) mix(i / blocks, int(i % blocks));
  }
}

// f(Int<G>, Int<B>, threads) for the kernels of rows of `blocks` vectors. Rows that are too long
// for registers stay in memory, and so do those of float64, for which one instance is enough.
template <class T, class V, class F>
void with_group(int blocks, const F& f) {
  with_row_threads<T, V>(blocks, [&](auto lanes, auto vectors) {
    constexpr int G = decltype(lanes)::value, B = decltype(vectors)::value;
    constexpr bool kGeneral = sizeof(T) == sizeof(double) && G > 1;
    f(Int<kGeneral ? 0 : G>{}, Int<(kGeneral || G == 32 ? 0 : B)>{}, G);
  });
}

template <class V>
constexpr bool fits_shared(int blocks) {
  return blocks * int(sizeof(V)) * kThreads <= kSharedBytes;
}

// For rows that do not fit shared memory, and last steps that stand apart.
template <class T, class V>
void update(const Where& where, const MeanField& m, bool first, bool last) {
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  with_group<T, V>(blocks, [&](auto lanes, auto vectors, int threads) {
    constexpr int G = decltype(lanes)::value, B = decltype(vectors)::value;
    if constexpr (B == 0 || kLastApart<G, B> || !fits_shared<V>(G * B)) {
      update_kernel<T, V, G, B>
          <<<grid_for(position_count(m.grid), kThreads / threads), kThreads, 0, stream_of(where)>>>(
              m, first, last, threads);
      check_launch("dense_crf update");
    }
  });
}

// Blocks of merge_and_blur_kernel that the device can run at once; 0: no cooperative launches.
template <class T, class V>
int cooperative_blocks(int device) {
  int can = 0, processors = 0, each = 0;
  check_cuda(cudaDeviceGetAttribute(&can, cudaDevAttrCooperativeLaunch, device), "device");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
  if (can == 0) return 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, merge_and_blur_kernel<T, V>,
                                                           kCooperativeThreads, 0),
             "device");
  return processors * each;
}

template <class T, class V>
void merge_and_blur_cooperative(const Where& where, MeanField& m, int grid) {
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  int lanes = lanes_for(blocks);
  int64_t items = 0;
  for (int k = 0; k < m.term_count; ++k) items += m.terms[k].lattice.vertex_bound * blocks;
  const int64_t most = (items + kCooperativeThreads - 1) / kCooperativeThreads;
  if (most < grid) grid = most > 0 ? int(most) : 1;
  void* arguments[] = {&m, &lanes};
  check_cuda(cudaLaunchCooperativeKernel(merge_and_blur_kernel<T, V>, dim3(unsigned(grid)),
                                         dim3(kCooperativeThreads), arguments, 0, stream_of(where)),
             "dense_crf merge and blur");
}

template <class T, class V>
void update_and_splat(const Where& where, const MeanField& m, bool first, bool last) {
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  with_group<T, V>(blocks, [&](auto lanes, auto vectors, int threads) {
    constexpr int G = decltype(lanes)::value, B = decltype(vectors)::value;
    if (kLastApart<G, B> && last) return update<T, V>(where, m, first, last);
    if constexpr (G < 32 && fits_shared<V>(G * B)) {
      update_and_splat_kernel<T, V, G, B>
          <<<tile_count(m.grid), kThreads, size_t(kThreads) * m.width * sizeof(T),
             stream_of(where)>>>(m, first, last, threads);
      check_launch("dense_crf update and splat");
    }
  });
}

// The kernels of finish_term compute every channel alone, so that float64, which needs no speed,
// shares those of single channels.
template <class T, class V>
void finish(const Where& where, const MeanField& m, const MeanFieldTerm& term) {
  finish_term<T, std::conditional_t<sizeof(T) == sizeof(double), T, V>>(where, m, term);
}

// Two kernels an iteration.
template <class T, class V>
void iterate_fused(const Where& where, MeanField m) {
  const int grid = m.iterations > 0 ? cooperative_blocks<T, V>(where.device) : 0;
  for (int k = 0; k < m.term_count && m.iterations > 0; ++k) {
    MeanFieldTerm& term = m.terms[k];
    const Lattice& l = term.lattice;
    if (term.scale_in == nullptr) {
      term.splat_weights = l.order_weights;
    } else {
      parallel_for(where, position_count(m.grid) * (l.dims + 1),
                   ScaleWeights<T>{l, static_cast<const T*>(term.scale_in),
                                   static_cast<T*>(term.splat_weights)},
                   "dense_crf weights");
    }
  }
  for (int i = 0; i < m.iterations; ++i) {
    update_and_splat<T, V>(where, m, i == 0, false);
    if (grid > 0) {
      merge_and_blur_cooperative<T, V>(where, m, grid);
    } else {
      for (int k = 0; k < m.term_count; ++k) finish<T, V>(where, m, m.terms[k]);
    }
  }
  update_and_splat<T, V>(where, m, m.iterations == 0, true);
}

template <class T, class V>
void iterate(const Where& where, const MeanField& m) {
  if (fits_shared<T>(m.width)) return iterate_fused<T, V>(where, m);
  update<T, V>(where, m, true, m.iterations == 0);
  for (int i = 1; i <= m.iterations; ++i) {
    for (int k = 0; k < m.term_count; ++k) {
      const MeanFieldTerm& term = m.terms[k];
      splat_pairs(where, term.lattice, m.rows, term.scale_in, term.pairs, m.width,
                  sizeof(T) == sizeof(double));
      finish<T, V>(where, m, term);
    }
    update<T, V>(where, m, false, i == m.iterations);
  }
}

template <class T>
void iterate_width(const Where& where, const MeanField& m) {
  if (m.width % 4 == 0) return iterate<T, Vec<T, 16 / sizeof(T)>>(where, m);
  iterate<T, T>(where, m);
}

}  // namespace

void mean_field_cuda(const Where& where, const MeanField& m, bool is_double) {
  const DeviceGuard guard(where.device);
  with_scalar(is_double, [&](auto scalar) { iterate_width<decltype(scalar)>(where, m); });
}

}  // namespace segkernels
