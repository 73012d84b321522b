// The product of two matrices on the CPU: product.simd.cpp for this machine's instruction set.
#include "dense_crf/product.h"

namespace segkernels {

void product_cpu(const Where& where, const Product& p, bool is_double) {
  with_best_isa([&](auto isa) { product<isa.value>(where, p, is_double); });
}

}  // namespace segkernels
