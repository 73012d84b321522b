// From the pairs of a term to its blurred vertices, with the compatibility transform applied.
#pragma once

#include "dense_crf/mean_field.h"

namespace segkernels {
inline namespace SK_NS {

// out[vertex] = compat * in[vertex]. `transposed` is compat by columns: [width of in][blocks of
// out].
template <class T, class V>
struct MixChannels {
  const T* in;
  V* out;
  const V* transposed;
  int width, blocks;

  SK_HD void operator()(int64_t vertex, int block) const {
    const T* row = in + vertex * width;
    V sum = row[0] * transposed[block];
    for (int c = 1; c < width; ++c) sum = mul_add(row[c], transposed[c * blocks + block], sum);
    out[vertex * blocks + block] = sum;
  }
};

// Merges and blurs a term's pairs and applies its compatibility; the result is in term.vertices.
template <class T, class V>
void finish_term(const Where& where, const MeanField& m, const MeanFieldTerm& term) {
  const int blocks = m.width * int(sizeof(T)) / int(sizeof(V));
  const Lattice& l = term.lattice;
  V* vertices = static_cast<V*>(term.vertices);
  V* scratch = static_cast<V*>(term.scratch);
  const V* compat = static_cast<const V*>(term.compat);
  const V* pairs = static_cast<const V*>(term.pairs);
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

}  // namespace SK_NS
}  // namespace segkernels
