// The steps of the build that have an instance for each number of dimensions: simplices and weights
// of the points, the table of keys, and the neighbours of vertices; and the gradient of the
// weights. Grid-stride launches of functors that the CPU shares, one thread a position, or a vertex
// and axis.
#include "common/parallel_for.h"
#include "permutohedral/lattice_cuda.h"

namespace segkernels {
namespace {

void embed(const Where& where, const Lattice& l, const BuildBuffers& b, bool is_double) {
  const DeviceGuard guard(where.device);
  embed_points(l, b, is_double, [&](const auto& f) {
    parallel_for(where, position_count(l.grid), f, "permutohedral embed");
  });
}

void embed_grad(const Where& where, const Lattice& l, const void* features,
                const void* grad_weights, void* grad_features, bool is_double) {
  const DeviceGuard guard(where.device);
  embed_grad_points(l, features, grad_weights, grad_features, is_double, [&](const auto& f) {
    parallel_for(where, position_count(l.grid), f, "permutohedral embed_grad");
  });
}

}  // namespace

void insert_keys(const Where& where, const Lattice& l, const BuildBuffers& b) {
  with_dims(l.dims, [&](auto n) {
    const Insert<decltype(n)::kFixed> f{n, key_table(l, b), b.slot_of};
    parallel_for(where, position_count(l.grid), f, "permutohedral insert");
  });
}

void link_vertices(const Where& where, const Lattice& l, const BuildBuffers& b) {
  with_dims(l.dims, [&](auto n) {
    const Link<decltype(n)::kFixed> f{n, l, key_table(l, b), b.first_entry, b.vertex_of_slot};
    parallel_rows(where, l.vertex_bound, l.counts, n + 1, f, "permutohedral link");
  });
}

void set_cuda_embed(PermutohedralApi& api) {
  api.embed = embed;
  api.embed_grad = embed_grad;
}

}  // namespace segkernels
