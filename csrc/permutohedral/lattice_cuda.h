// What the CUDA sources of the lattice call of each other.
#pragma once

#include "permutohedral/permutohedral.h"

namespace segkernels {

constexpr int kTile = 256;  // points of a tile, and threads of a block

// embed_cuda.cu
void insert_keys(const Where&, const Lattice&, const BuildBuffers&);
void link_vertices(const Where&, const Lattice&, const BuildBuffers&);
void set_cuda_embed(PermutohedralApi&);
// pairs_cuda.cu: pairs of each tile, and their counts in tile_start.
void number_pairs(const Where&, const Lattice&, const BuildBuffers&);
// filter_cuda.cu
void set_cuda_filter(PermutohedralApi&);

}  // namespace segkernels
