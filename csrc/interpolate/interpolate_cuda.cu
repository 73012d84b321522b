// interpolate on CUDA: launches the functors of kernels.h. Forward: parallel over planes, blocks of
// rows, and elements of a row, V of them a thread. Backward: a block a tile, partial sums in shared
// memory.
#include <type_traits>

#include "interpolate/interpolate.h"
#include "interpolate/launch.h"

namespace segkernels {
namespace {

// Enough to fill the largest devices a few times over; with fewer, a thread gets fewer rows.
constexpr int64_t kEnoughThreads = SK_LIMIT(1 << 19, 64);

int rows_per_thread(int64_t threads_at_one, int64_t height) {
  int rows = 1;
  while (rows < 16 && rows < height && threads_at_one / (2 * rows) >= kEnoughThreads) rows *= 2;
  return rows;
}

}  // namespace

void interpolate_cuda(const Where& where, const Resampling& r, ScalarType type, const void* input,
                      void* output) {
  const DeviceGuard guard(where.device);
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    with_taps_of<T>(r, [&](auto taps) {
      const auto g = r.geometry<Acc<T>>();
      const int32_t threads = threads_per_row<taps.value>(g);
      const int rows = rows_per_thread(g.planes * g.y.out * threads, g.y.out);
      const Forward<T, taps.value> f{g,    static_cast<const T*>(input), static_cast<T*>(output),
                                     rows, (g.y.out + rows - 1) / rows,  threads};
      parallel_for_many_registers(where, f.count(), f, "interpolate");
    });
  });
}

void interpolate_backward_cuda(const Where& where, const Resampling& r, ScalarType type,
                               const void* grad_output, void* grad_input) {
  const DeviceGuard guard(where.device);
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    with_taps_of<T>(r, [&](auto taps) {
      const auto g = r.geometry<Acc<T>>();
      const Backward<T, taps.value> f{g, tiling_of(g, r.taps()), static_cast<const T*>(grad_output),
                                      static_cast<T*>(grad_input)};
      const int64_t bytes = f.tiling.rows * f.tiling.pitch() * int64_t(sizeof(Acc<T>));
      if (bytes > kTileBytes) {
        using Any = std::conditional_t<sizeof(T) == 2, Any16, T>;
        const BackwardDirect<Any> direct{g, format_of<Any>(type),
                                         static_cast<const Any*>(grad_output),
                                         static_cast<Any*>(grad_input)};
        return parallel_for_many_registers(where, direct.count(), direct, "interpolate_backward");
      }
      launch_tiles(where, f, bytes, "interpolate_backward");
    });
  });
}

}  // namespace segkernels
