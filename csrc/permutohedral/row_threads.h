// Splits rows over threads on CUDA: how many neighbouring threads share a row, and how many vectors
// each has. Few threads with several vectors each, because a thread reads and computes what belongs
// to the row (ids, weights) once.
#pragma once

#include <type_traits>

namespace segkernels {

template <int N>
using Int = std::integral_constant<int, N>;

// f(Int<threads>, Int<vectors>), with threads * vectors >= blocks, or 128 for longer rows.
template <class T, class V, class F>
void with_row_threads(int blocks, const F& f) {
  if constexpr (sizeof(T) == sizeof(V)) {  // rows of one channel
    f(Int<1>{}, Int<1>{});
  } else {
    // Rows are padded to four channels: one vector of floats, or two of doubles.
    if constexpr (sizeof(V) == 4 * sizeof(T)) {
      if (blocks <= 1) return f(Int<1>{}, Int<1>{});
    }
    if (blocks <= 2) return f(Int<2>{}, Int<1>{});
    if (blocks <= 4) return f(Int<2>{}, Int<2>{});
    if (blocks <= 6) return f(Int<2>{}, Int<3>{});
    if (blocks <= 8) return f(Int<2>{}, Int<4>{});
    if (blocks <= 12) return f(Int<4>{}, Int<3>{});
    if (blocks <= 16) return f(Int<4>{}, Int<4>{});
    if (blocks <= 32) return f(Int<8>{}, Int<4>{});
    if (blocks <= 64) return f(Int<16>{}, Int<4>{});
    f(Int<32>{}, Int<4>{});
  }
}

}  // namespace segkernels
