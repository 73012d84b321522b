// Rows cut into equal runs, one a thread, each with a thread's own memory.
#pragma once

#include "common/parallel_for.h"

namespace segkernels {
inline namespace SK_NS {

// f(thread, begin, end) for equal chunks of [0, n).
template <class F>
void parallel_chunks(const Where& where, int64_t n, const F& f) {
  const int64_t chunks = where.threads < n ? (where.threads > 0 ? where.threads : 1) : n;
  const auto chunk = [&](int64_t i) { f(i, n * i / chunks, n * (i + 1) / chunks); };
  parallel_for(where, chunks, chunk, "parallel_chunks");
}

}  // namespace SK_NS
}  // namespace segkernels
