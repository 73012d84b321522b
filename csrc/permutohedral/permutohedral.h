// The native interface of the lattice. Functions run on where.device and use only the memory that
// they are given.
#pragma once

#include "common/simd.h"
#include "common/where.h"
#include "permutohedral/build.h"
#include "permutohedral/filter.h"
#include "permutohedral/lattice.h"

namespace segkernels {

struct FilterBuffers {
  const void* rows;      // [positions, width] values; null: 1, if width is 1, on the CPU
  const void* scale_in;  // [positions] or null
  void* pairs;           // [pair_bound, width]
  void* vertices;        // [vertex_bound, width]: output
  void* scratch;         // [vertex_bound, width]
  int32_t width;
  bool reverse;  // blur axes in reverse order: the transpose
};

// One table of functions for the CPU, and one for CUDA.
struct PermutohedralApi {
  // Computes records and weights. The CPU also finds the pairs of every tile and sets counts[1],
  // from which Python sizes the table.
  void (*embed)(const Where&, const Lattice&, const BuildBuffers&, bool is_double);
  // Inserts the keys and numbers vertices and pairs; sets counts and image_start.
  void (*tiles)(const Where&, const Lattice&, const BuildBuffers&, bool is_double);
  // Finds neighbours and the pairs of every vertex, once Python knows the bounds.
  void (*link)(const Where&, const Lattice&, const BuildBuffers&);
  void (*embed_grad)(const Where&, const Lattice&, const void* features, const void* grad_weights,
                     void* grad_features, bool is_double);
  void (*pack)(const Where&, const Grid&, const Strided& source, void* rows, int channels,
               int width, RowKind kind, int32_t* status, bool is_double);
  void (*unpack)(const Where&, const Grid&, const void* rows, const Strided& target, int channels,
                 int width, bool is_double);
  // Splat and blur.
  void (*splat)(const Where&, const Lattice&, const FilterBuffers&, bool is_double);
  // `skipped` is the value of skipped points.
  void (*slice)(const Where&, const Lattice&, const void* vertices, const void* scale,
                double skipped, void* rows, int width, bool is_double);
  void (*weights_grad)(const Where&, const Lattice&, const void* x, const void* g,
                       const void* vertices, const void* grad_vertices, void* grad_weights,
                       int width, bool is_double);
  void (*invert_norm)(const Where&, int64_t positions, const void* norm, void* out, bool root,
                      bool is_double);
};

// Sets the functions that filter.simd.cpp defines.
template <Isa kIsa>
void set_cpu_loops(PermutohedralApi&);

const PermutohedralApi& permutohedral_cpu();
const PermutohedralApi& permutohedral_cuda();
// Bytes of CUB's workspace for a build of this size.
int64_t permutohedral_workspace(int device, int64_t entries, int64_t tiles, int64_t pairs);

}  // namespace segkernels
