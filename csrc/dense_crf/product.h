// The product of two matrices on the CPU, with the same bits for any number of threads.
#pragma once

#include <stdint.h>

#include "common/simd.h"
#include "common/where.h"

namespace segkernels {

// out = a b. `a` is [rows, inner] with any strides (in elements); `b` [inner, cols] and `out`
// [rows, cols] are contiguous.
struct Product {
  const void* a;
  int64_t a_row, a_inner;
  const void* b;
  void* out;
  int64_t rows, inner, cols;
};

// Defined in product.simd.cpp.
template <Isa kIsa>
void product(const Where&, const Product&, bool is_double);

void product_cpu(const Where&, const Product&, bool is_double);

}  // namespace segkernels
