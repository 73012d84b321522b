// Mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun 2011, algorithm 1):
//   Q <- softmax(-U - sum_k mu_k K_k Q),   K_k the normalised lattice filter of term k.
// mu acts on channels and K on points, so the compatibility mu is applied to vertices, which are
// fewer than points.
#pragma once

#include "common/simd.h"
#include "common/where.h"
#include "permutohedral/filter.h"
#include "permutohedral/lattice.h"

namespace segkernels {

struct MeanFieldTerm {
  Lattice lattice;
  const void* scale_in;   // [positions] or null
  const void* scale_out;  // [positions] or null
  const void*
      compat;  // -mu * alpha: [width] (diagonal) or [width, width] (row: the channel that receives)
  bool compat_is_matrix;
  void* splat_weights;  // CUDA: [positions, dims + 1], for order_weights * scale_in
  void* pairs;          // [pair_bound, width]
  void* vertices;       // [vertex_bound, width]
  void* scratch;        // [vertex_bound, width]
};

constexpr int kMaxTerms = 8;

struct MeanField {
  Grid grid;  // of every term's lattice
  MeanFieldTerm terms[kMaxTerms];
  int32_t term_count;
  int32_t channels, width;
  int32_t iterations;
  bool log;       // return log-probabilities
  void* energy;   // [positions, width]: minus the energy; padding is -infinity
  void* rows;     // [positions, width]: the result; may be `energy` on the CPU
  void* scratch;  // CPU: [workers, 16, width]
  int32_t* status;
};

// Defined in mean_field.simd.cpp.
template <Isa kIsa>
void mean_field(const Where&, const MeanField&, bool is_double);

void mean_field_cpu(const Where&, const MeanField&, bool is_double);
void mean_field_cuda(const Where&, const MeanField&, bool is_double);

}  // namespace segkernels
