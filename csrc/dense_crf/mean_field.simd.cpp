// Mean field on the CPU, compiled once per instruction set (SK_ISA). A thread takes a tile of
// points through one iteration: slice all terms, softmax, and splat into the tile's own pairs, so
// that Q is never stored. Then pairs are merged and blurred, parallel over vertices. Sums have a
// fixed order, which does not depend on the number of threads.
#include <math.h>
#include <string.h>

#include "common/math.h"
#include "common/parallel_for.h"
#include "dense_crf/compat.h"
#include "dense_crf/mean_field.h"
#include "permutohedral/dispatch.h"
#include "permutohedral/splat_cpu.h"

namespace segkernels {
inline namespace SK_ISA {

// Points a batch. Each stage of the arithmetic runs over the batch, to hide the latency of a
// point's chain of sums, exponentials and division.
constexpr int kBatch = 16;

// In-place softmax (or log-softmax) of `count` points. `finite`: whether each point's scores are.
template <class T, class V>
SK_HD void softmax(V* z, int count, int blocks, bool log, bool* finite) {
  T top[kBatch], change[kBatch];
  V total[kBatch];
  for (int i = 0; i < count; ++i) {
    V high = z[i * blocks];
    for (int b = 1; b < blocks; ++b) high = z[i * blocks + b] > high ? z[i * blocks + b] : high;
    top[i] = max_of<T>(high);
  }
  for (int i = 0; i < count; ++i) {
    V sum{};
    for (int b = 0; b < blocks; ++b) {
      V& v = z[i * blocks + b];
      const V e = exp_of<V>(v - top[i]);
      sum = sum + e;
      if (!log) v = e;
    }
    total[i] = sum;
  }
  for (int i = 0; i < count; ++i) {
    const T sum = sum_of<T>(total[i]);
    finite[i] = sum - sum == T(0);
    change[i] = log ? log_of<T>(sum) : T(1) / sum;
  }
  for (int i = 0; i < count; ++i) {
    for (int b = 0; b < blocks; ++b) {
      V& v = z[i * blocks + b];
      v = log ? v - top[i] - change[i] : change[i] * v;
    }
  }
}

// The asm keeps g++ from dropping the function as one without side effects.
SK_HD void prefetch_bytes(const void* begin, int64_t bytes) {
  const char* p = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(p + i);
    asm volatile("");
  }
}

template <class T, class V, int NB>
class Step {
 public:
  Step(const MeanField& m, bool first, bool last)
      : m_(m),
        first_(first),
        last_(last),
        blocks_(NB > 0 ? NB : m.width * int(sizeof(T)) / int(sizeof(V))) {}

  void operator()(int worker, int64_t tile) const {
    const int64_t points = tile_points(m_.grid);
    if (!last_) {
      for (int k = 0; k < m_.term_count; ++k) pairs_of(k, int32_t(tile)).clear();
    }
    V local[NB > 0 ? NB * kBatch : 1];
    V* z = NB > 0 ? local : static_cast<V*>(m_.scratch) + int64_t(worker) * kBatch * blocks_;
    const int64_t end = (tile + 1) * points;
    for (int64_t p = tile * points; p < end; p += kBatch) {
      batch(p, int(end - p < kBatch ? end - p : kBatch), int32_t(tile), z);
    }
  }

 private:
  int blocks() const { return NB > 0 ? NB : blocks_; }

  TilePairs<T, V> pairs_of(int k, int32_t tile) const {
    return TilePairs<T, V>(m_.terms[k].lattice, static_cast<V*>(m_.terms[k].pairs), tile, blocks());
  }

  // Prefetches what the next batch streams from memory.
  void prefetch(int64_t p) const {
    prefetch_bytes(static_cast<const V*>(m_.energy) + p * blocks(), sizeof(V) * blocks() * kBatch);
    for (int k = 0; k < m_.term_count; ++k) {
      const Lattice& l = m_.terms[k].lattice;
      const int n = l.dims + 1;
      prefetch_bytes(static_cast<const T*>(l.weights) + p * n, sizeof(T) * n * kBatch);
      prefetch_bytes(l.local_ids + p * n, sizeof(uint16_t) * n * kBatch);
    }
  }

  void batch(int64_t p, int count, int32_t tile, V* z) const {
    prefetch(p + kBatch);
    const V* energy = static_cast<const V*>(m_.energy) + p * blocks();
    for (int i = 0; i < count * blocks(); ++i) z[i] = energy[i];
    if (!first_) {
      for (int k = 0; k < m_.term_count; ++k) add_term(m_.terms[k], p, count, tile, z);
    }
    bool finite[kBatch];
    softmax<T, V>(z, count, blocks(), last_ && m_.log, finite);
    if (last_) return store(p, count, z);
    for (int k = 0; k < m_.term_count; ++k) {
      const T* scale = static_cast<const T*>(m_.terms[k].scale_in);
      const TilePairs<T, V> pairs = pairs_of(k, tile);
      for (int i = 0; i < count; ++i) {
        // A point with scores that are not finite contributes nothing.
        if (finite[i])
          pairs.template add<NB>(p + i, z + i * blocks(), scale != nullptr ? scale[p + i] : T(1));
      }
    }
  }

  void add_term(const MeanFieldTerm& term, int64_t p, int count, int32_t tile, V* z) const {
    const Lattice& l = term.lattice;
    const int n = l.dims + 1;
    const uint16_t* ids = l.local_ids + p * n;
    const T* weights = static_cast<const T*>(l.weights) + p * n;
    const T* scale = static_cast<const T*>(term.scale_out);
    const int32_t* vertices = tile_vertices(l, tile);
    const V* rows = static_cast<const V*>(term.vertices);
    for (int i = 0; i < count; ++i, ids += n, weights += n, z += blocks()) {
      if (ids[0] == kSkipped) continue;
      const T s = scale != nullptr ? scale[p + i] : T(1);
      V local[NB > 0 ? NB : 1];
      V* sum = NB > 0 ? local : z;  // an array of known size stays in registers
      for (int b = 0; b < NB; ++b) local[b] = z[b];
      for (int j = 0; j < n; ++j) {
        const V* row = rows + int64_t(vertices[ids[j]]) * blocks();
        const T w = weights[j] * s;
        for (int b = 0; b < blocks(); ++b) sum[b] = mul_add(w, row[b], sum[b]);
      }
      for (int b = 0; b < NB; ++b) z[b] = local[b];
    }
  }

  void store(int64_t p, int count, const V* z) const {
    V* out = static_cast<V*>(m_.rows) + p * blocks();
    for (int i = 0; i < count; ++i) {
      bool taken = true;
      for (int k = 0; k < m_.term_count; ++k) {
        taken = taken &&
                m_.terms[k].lattice.local_ids[(p + i) * (m_.terms[k].lattice.dims + 1)] != kSkipped;
      }
      for (int b = 0; b < blocks(); ++b) {
        const V v = z[i * blocks() + b];
        out[i * blocks() + b] = taken ? v : v - v + T(NAN);
      }
    }
  }

  const MeanField& m_;
  bool first_, last_;
  int blocks_;
};

template <class T, class V, int NB>
void iterate(const Where& where, const MeanField& m) {
  const int32_t tiles = tile_count(m.grid);
  for (int i = 0; i <= m.iterations; ++i) {
    parallel_tiles(where, tiles, has_large_tiles(m.grid),
                   Step<T, V, NB>(m, i == 0, i == m.iterations));
    if (i == m.iterations) break;
    for (int k = 0; k < m.term_count; ++k) finish_term<T, V>(where, m, m.terms[k]);
  }
}

template <class T>
void iterate_width(const Where& where, const MeanField& m) {
  if (m.width == 1) return iterate<T, T, 1>(where, m);
  if (m.width == 4) return iterate<T, Vec<T, 4>, 1>(where, m);
  // A known number of vectors stays in registers. For float64 that does not pay.
  if constexpr (std::is_same_v<T, float>) {
    if (m.width == 8) return iterate<T, Vec<T, 8>, 1>(where, m);
    if (m.width == 16) return iterate<T, Vec<T, 8>, 2>(where, m);
    if (m.width == 24) return iterate<T, Vec<T, 8>, 3>(where, m);
    if (m.width == 32) return iterate<T, Vec<T, 8>, 4>(where, m);
  }
  iterate<T, Vec<T, 8>, 0>(where, m);
}

}  // namespace SK_ISA

template <Isa kIsa>
void mean_field(const Where& where, const MeanField& m, bool is_double) {
  with_scalar(is_double, [&](auto scalar) { iterate_width<decltype(scalar)>(where, m); });
}

template void mean_field<Isa::SK_ISA>(const Where&, const MeanField&, bool);
}  // namespace segkernels
