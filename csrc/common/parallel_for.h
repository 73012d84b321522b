// parallel_for(where, n, functor) calls functor(i) for i in [0, n): a grid-stride loop under nvcc,
// an OpenMP loop under g++. parallel_rows(where, bound, limit, blocks, functor) calls functor(row,
// block) for the rows below min(bound, *limit) and the blocks of channels of each. `limit` is in
// device memory, so that the host need not know the number of rows.
#pragma once

#include "common/hd.h"
#include "common/where.h"

#if defined(__CUDACC__)
#include "common/cuda_check.h"
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace segkernels {
inline namespace SK_NS {

SK_HD int64_t row_count(int64_t bound, const int32_t* limit) {
  return limit != nullptr && *limit < bound ? *limit : bound;
}

#if defined(__CUDACC__)

constexpr int kThreads = 256;
// Enough blocks to fill any device several times over; the grid-stride loop does the rest.
constexpr int64_t kMaxBlocks = SK_LIMIT(1 << 16, 5);
constexpr int64_t kMaxBlocksOfRows = SK_LIMIT(4096, 3);

inline unsigned grid_for(int64_t items, int per_block) {
  int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

template <class F>
__global__ void __launch_bounds__(kThreads) for_each_kernel(int64_t n, F f) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (; i < n; i += step) f(i);
}

template <class F>
void parallel_for(const Where& where, int64_t n, const F& f, const char* name) {
  if (n <= 0) return;
  for_each_kernel<<<grid_for(n, kThreads), kThreads, 0, stream_of(where)>>>(n, f);
  check_launch(name);
}

// `lanes` neighbouring threads share a row, so that their accesses coalesce.
template <class F>
__global__ void __launch_bounds__(kThreads, 1)
    for_rows_kernel(int64_t bound, const int32_t* limit, int blocks, int lanes, F f) {
  const int64_t rows = row_count(bound, limit);
  const int lane = threadIdx.x % lanes;
  int64_t row = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int64_t step = int64_t(gridDim.x) * (blockDim.x / lanes);
  for (; row < rows; row += step) {
    for (int b = lane; b < blocks; b += lanes) f(row, b);
  }
}

inline int lanes_for(int blocks) {
  int lanes = 1;
  while (lanes < blocks && lanes < 32) lanes *= 2;
  return lanes;
}

template <class F>
void parallel_rows(const Where& where, int64_t bound, const int32_t* limit, int blocks, const F& f,
                   const char* name) {
  if (bound <= 0 || blocks <= 0) return;
  const int lanes = lanes_for(blocks);
  // With the count on the device the bound is loose: launch no more blocks than keep it busy.
  int64_t grid = grid_for(bound, kThreads / lanes);
  if (limit != nullptr && grid > kMaxBlocksOfRows) grid = kMaxBlocksOfRows;
  for_rows_kernel<<<unsigned(grid), kThreads, 0, stream_of(where)>>>(bound, limit, blocks, lanes,
                                                                     f);
  check_launch(name);
}

#else

SK_HD int cpu_threads(const Where& where) { return where.threads > 1 ? where.threads : 1; }

inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

template <class F>
void parallel_for(const Where& where, int64_t n, const F& f, const char*) {
  // A plain loop for one thread: a forked child must not use the OpenMP runtime.
  if (where.threads <= 1 || n < 2) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(where.threads)
  for (int64_t i = 0; i < n; ++i) f(i);
}

// f(i) for a range. It is not inlined, so that the body is compiled once, not once for one thread
// and once for several.
template <class F>
__attribute__((noinline)) void loop(int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end; ++i) f(i);
}

// As parallel_for with a dynamic schedule, for few and uneven items (tiles).
template <class F>
void parallel_tiles(const Where& where, int64_t n, const F& f) {
  if (where.threads <= 1 || n < 2) return loop(0, n, f);
#pragma omp parallel for schedule(dynamic) num_threads(where.threads)
  for (int64_t i = 0; i < n; ++i) loop(i, i + 1, f);
}

// f(thread, begin, end) for one equal chunk of [0, n) a thread.
template <class F>
void parallel_chunks(const Where& where, int64_t n, const F& f) {
  const int64_t chunks = where.threads < n ? cpu_threads(where) : n;
  const auto chunk = [&](int64_t i) { f(i, n * i / chunks, n * (i + 1) / chunks); };
  parallel_for(where, chunks, chunk, "parallel_chunks");
}

template <int N, class F>
void parallel_rows_of(const Where& where, int64_t rows, int blocks, const F& f) {
  const auto row_of = [&](int64_t row) {
    const int count = N > 0 ? N : blocks;
    for (int b = 0; b < count; ++b) f(row, b);
  };
  parallel_chunks(where, rows,
                  [&](int64_t, int64_t begin, int64_t end) { loop(begin, end, row_of); });
}

// Unrolls the common short rows, so that their blocks share what the row computes.
template <class F>
void parallel_rows(const Where& where, int64_t bound, const int32_t* limit, int blocks, const F& f,
                   const char*) {
  const int64_t rows = row_count(bound, limit);
  switch (blocks) {
    case 1:
      return parallel_rows_of<1>(where, rows, blocks, f);
    case 2:
      return parallel_rows_of<2>(where, rows, blocks, f);
    case 3:
      return parallel_rows_of<3>(where, rows, blocks, f);
    default:
      return parallel_rows_of<0>(where, rows, blocks, f);
  }
}

#endif

}  // namespace SK_NS
}  // namespace segkernels
