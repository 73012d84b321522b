// Launches of functors that keep a window of rows in registers. __launch_bounds__ with one block a
// multiprocessor stops ptxas from spilling registers for a higher occupancy.
#pragma once

#include "common/parallel_for.h"
#include "interpolate/interpolate.h"

namespace segkernels {
inline namespace cuda {

// f(integral_constant<K>) for elements of type T: float64 has kAnyTaps.
template <class T, class F>
void with_taps_of(const Resampling& r, const F& f) {
  if constexpr (sizeof(T) == sizeof(double)) {
    f(std::integral_constant<int, kAnyTaps>{});
  } else {
    with_taps(r, f);
  }
}

// f(T{}, integral_constant<K>) for logits. Bilinear ones are common and have every type; others
// share an instance for the 16-bit types.
template <class F>
void with_logits(const Resampling& r, ScalarType type, const F& f) {
  with_scalar_type(type, [&](auto scalar) {
    with_taps_of<decltype(scalar)>(r, [&](auto taps) {
      if constexpr (sizeof(scalar) == 2 && decltype(taps)::value != 2) {
        f(Any16{}, taps);
      } else {
        f(scalar, taps);
      }
    });
  });
}

template <class F>
__global__ void __launch_bounds__(kThreads, 1) many_registers_kernel(int64_t n, F f) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) f(i);
}

// As parallel_for.
template <class F>
void parallel_for_many_registers(const Where& where, int64_t n, const F& f, const char* name) {
  if (n <= 0) return;
  many_registers_kernel<<<grid_for(n, kThreads), kThreads, 0, stream_of(where)>>>(n, f);
  check_launch(name);
}

// A tile a block: f.column for its columns, a barrier, then f.cell for its cells, with shared
// memory for the sums.
template <class F>
__global__ void __launch_bounds__(kThreads, 1) tiles_kernel(F f) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* sums = reinterpret_cast<typename F::A*>(memory);
  for (int64_t i = blockIdx.x; i < f.tiles(); i += gridDim.x) {
    const Tile tile = f.tile(i);
    for (int e = threadIdx.x; e < f.columns(); e += blockDim.x) f.column(tile, e, sums);
    __syncthreads();
    for (int e = threadIdx.x; e < f.cells(); e += blockDim.x) f.cell(tile, e, sums);
    __syncthreads();
  }
}

template <class F>
void launch_tiles(const Where& where, const F& f, int64_t bytes, const char* name) {
  if (f.tiles() == 0) return;
  tiles_kernel<<<grid_for(f.tiles(), 1), kThreads, size_t(bytes), stream_of(where)>>>(f);
  check_launch(name);
}

}  // namespace cuda
}  // namespace segkernels
