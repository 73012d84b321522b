// Run-time dimension and scalar type as template arguments.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "permutohedral/lattice.h"

namespace segkernels {

template <int D, class F>
void with_dims_from(int dims, const F& f) {
  if constexpr (D > kMaxDims) {
    throw std::runtime_error("segkernels: the lattice has 1 to 16 dimensions");
  } else {
    if (dims == D) {
      f(std::integral_constant<int, D>{});
    } else {
      with_dims_from<D + 1>(dims, f);
    }
  }
}

// f(std::integral_constant<int, dims>)
template <class F>
void with_dims(int dims, const F& f) {
  with_dims_from<1>(dims, f);
}

// f(T{}): float or double
template <class F>
void with_scalar(bool is_double, const F& f) {
  if (is_double) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace segkernels
