// The filter on CUDA: rows of channels, splat, slice, and the gradient of the weights. The splat is
// a kernel with a block a tile, which sums entries into pairs in a fixed order. The other steps are
// grid-stride launches of functors that the CPU shares, one thread a position, or a row's vector.
#include "common/parallel_for.h"
#include "permutohedral/dispatch.h"
#include "permutohedral/lattice_cuda.h"
#include "permutohedral/row_threads.h"
#include "permutohedral/splat_cuda.h"

namespace segkernels {
namespace {

// f(T{}, V{}): the scalar type, and the vector type of rows: 16 bytes, or one scalar.
template <class F>
void with_vector(int width, bool is_double, const F& f) {
  with_scalar(is_double, [&](auto scalar) {
    using T = decltype(scalar);
    if (width % 4 == 0) {
      f(T{}, Vec<T, 16 / sizeof(T)>{});
    } else {
      f(T{}, T{});
    }
  });
}

void pack(const Where& where, const Grid& grid, const Strided& source, void* rows, int channels,
          int width, RowKind kind, int32_t* status, bool is_double) {
  const DeviceGuard guard(where.device);
  with_vector(width, is_double, [&](auto scalar, auto vector) {
    using T = decltype(scalar);
    constexpr int W = sizeof(vector) / sizeof(T);
    const PackBlock<T, W> f{grid, source, static_cast<T*>(rows), channels, width, kind, status};
    parallel_for(where, position_count(grid), PackRow<T, W>{f}, "rows pack");
  });
}

void unpack(const Where& where, const Grid& grid, const void* rows, const Strided& target,
            int channels, int width, bool is_double) {
  const DeviceGuard guard(where.device);
  with_vector(width, is_double, [&](auto scalar, auto vector) {
    using T = decltype(scalar);
    constexpr int W = sizeof(vector) / sizeof(T);
    const UnpackRow<T, W> f{grid, static_cast<const T*>(rows), target, channels, width};
    parallel_for(where, position_count(grid), f, "rows unpack");
  });
}

// One tile a block.
template <class T, class V, int G, int B>
__global__ void __launch_bounds__(kTile)
    splat_kernel(Lattice l, const V* rows, const T* scale, V* pairs, int blocks) {
  const int32_t tile = blockIdx.x;
  const int64_t point = int64_t(tile) * kTile;
  const T* weights = static_cast<const T*>(l.order_weights) + point * (l.dims + 1);
  splat_tile<T, G, B>(l, tile, rows + point * blocks, weights,
                      scale != nullptr ? scale + point : nullptr, pairs, blocks);
}

void splat(const Where& where, const Lattice& l, const FilterBuffers& b, bool is_double) {
  const DeviceGuard guard(where.device);
  splat_pairs(where, l, b.rows, b.scale_in, b.pairs, b.width, is_double);
  with_vector(b.width, is_double, [&](auto scalar, auto vector) {
    using T = decltype(scalar);
    using V = decltype(vector);
    merge_and_blur<T, V>(where, l, static_cast<const V*>(b.pairs), static_cast<V*>(b.vertices),
                         static_cast<V*>(b.scratch), int(b.width * sizeof(T) / sizeof(V)),
                         b.reverse);
  });
}

void slice(const Where& where, const Lattice& l, const void* vertices, const void* scale,
           double skipped, void* rows, int width, bool is_double) {
  const DeviceGuard guard(where.device);
  with_vector(width, is_double, [&](auto scalar, auto vector) {
    slice_rows<decltype(scalar), decltype(vector)>(where, l, vertices, scale, skipped, rows, width);
  });
}

void weights_grad(const Where& where, const Lattice& l, const void* x, const void* g,
                  const void* vertices, const void* grad_vertices, void* grad_weights, int width,
                  bool is_double) {
  const DeviceGuard guard(where.device);
  with_scalar(is_double, [&](auto scalar) {
    weights_grad_rows<decltype(scalar)>(where, l, x, g, vertices, grad_vertices, grad_weights,
                                        width);
  });
}

void invert_norm(const Where& where, int64_t positions, const void* norm, void* out, bool root,
                 bool is_double) {
  const DeviceGuard guard(where.device);
  with_scalar(is_double, [&](auto scalar) {
    invert_norm_rows<decltype(scalar)>(where, positions, norm, out, root);
  });
}

}  // namespace

void splat_pairs(const Where& where, const Lattice& l, const void* rows, const void* scale,
                 void* pairs, int width, bool is_double) {
  with_vector(width, is_double, [&](auto scalar, auto vector) {
    using T = decltype(scalar);
    using V = decltype(vector);
    const int blocks = int(width * sizeof(T) / sizeof(V));
    with_row_threads<T, V>(blocks, [&](auto lanes, auto vectors) {
      constexpr int G = decltype(lanes)::value, B = decltype(vectors)::value;
      splat_kernel<T, V, G, B><<<tile_count(l.grid), kTile, 0, stream_of(where)>>>(
          l, static_cast<const V*>(rows), static_cast<const T*>(scale), static_cast<V*>(pairs),
          blocks);
      check_launch("permutohedral splat");
    });
  });
}

void set_cuda_filter(PermutohedralApi& api) {
  api.pack = pack;
  api.unpack = unpack;
  api.splat = splat;
  api.slice = slice;
  api.weights_grad = weights_grad;
  api.invert_norm = invert_norm;
}

}  // namespace segkernels
