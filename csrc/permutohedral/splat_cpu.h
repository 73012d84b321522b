// The splat of one tile on the CPU: one thread sums its points into its pairs, in order. Then
// merge_and_blur, which filter.simd.cpp compiles for the mean field too.
#pragma once

#include <string.h>

#include "common/parallel_for.h"
#include "permutohedral/filter.h"

namespace segkernels {
inline namespace SK_NS {

template <class T, class V>
class TilePairs {
 public:
  TilePairs(const Lattice& l, V* pairs, int32_t tile, int blocks)
      : dims1_(l.dims + 1),
        blocks_(blocks),
        count_(l.tile_start[tile + 1] - l.tile_start[tile]),
        ids_(l.local_ids),
        weights_(static_cast<const T*>(l.weights)),
        rows_(pairs + int64_t(l.tile_start[tile]) * blocks) {}

  void clear() const { memset(static_cast<void*>(rows_), 0, sizeof(V) * blocks_ * count_); }

  // NB: blocks a row if known at compile time, else 0.
  template <int NB>
  void add(int64_t position, const V* row, T scale) const {
    const int blocks = NB > 0 ? NB : blocks_;
    const uint16_t* ids = ids_ + position * dims1_;
    const T* weights = weights_ + position * dims1_;
    if (ids[0] == kSkipped) return;
    V local[NB > 0 ? NB : 1];  // stays in registers across the stores below
    for (int b = 0; b < NB; ++b) local[b] = row[b];
    const V* from = NB > 0 ? local : row;
    for (int k = 0; k < dims1_; ++k) {
      V* to = rows_ + int64_t(ids[k]) * blocks;
      const T w = weights[k] * scale;
      for (int b = 0; b < blocks; ++b) to[b] = mul_add(w, from[b], to[b]);
    }
  }

 private:
  int dims1_, blocks_, count_;
  const uint16_t* ids_;
  const T* weights_;
  V* rows_;
};

template <class T, class V>
using MergeAndBlur = void(const Where&, const Lattice&, const V* pairs, V* vertices, V* scratch,
                          int blocks, bool reverse, const V* factor);
extern template MergeAndBlur<float, float> merge_and_blur<float, float>;
extern template MergeAndBlur<float, Vec<float, 4>> merge_and_blur<float, Vec<float, 4>>;
extern template MergeAndBlur<float, Vec<float, 8>> merge_and_blur<float, Vec<float, 8>>;
extern template MergeAndBlur<double, double> merge_and_blur<double, double>;
extern template MergeAndBlur<double, Vec<double, 4>> merge_and_blur<double, Vec<double, 4>>;
extern template MergeAndBlur<double, Vec<double, 8>> merge_and_blur<double, Vec<double, 8>>;

}  // namespace SK_NS
}  // namespace segkernels
