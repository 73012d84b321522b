// parallel_for(where, n, functor) calls functor(i) for i in [0, n): a grid-stride loop under nvcc,
// pieces for the threads of the pool under g++. parallel_rows(where, bound, limit, blocks, functor)
// calls functor(row, block) for the rows below min(bound, *limit) and the blocks of channels of
// each. `limit` is in device memory, so that the host need not know the number of rows.
#pragma once

#include "common/hd.h"
#include "common/where.h"

#if defined(__CUDACC__)
#include "common/cuda_check.h"
#else
#include "common/thread_pool.h"
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

// f(worker, pieces) on each thread, for about `count` pieces of [0, n). The workers of threads at
// the same time are different, and below cpu_threads(where).
template <class F>
void parallel_pieces(const Where& where, int64_t n, int64_t count, bool is_long, const F& f) {
  if (n <= 0) return;
  if (where.threads <= 1 || n == 1) {
    Pieces all(n);
    return f(0, all);
  }
  const auto run = [](const void* context, int worker, Pieces& pieces) noexcept {
    (*static_cast<const F*>(context))(worker, pieces);
  };
  if (count > kMostPieces) count = kMostPieces;
  run_loop({run, &f, n, count < n ? count : n, where.threads, is_long});
}

// Enough pieces to balance threads of different speed.
inline int64_t short_pieces(const Where& where) { return 16 * int64_t(where.threads); }

template <class F>
void parallel_for(const Where& where, int64_t n, const F& f, const char*) {
  parallel_pieces(where, n, short_pieces(where), false, [&](int, Pieces& pieces) {
    while (pieces.next()) {
      for (int64_t i = pieces.begin; i < pieces.end; ++i) f(i);
    }
  });
}

// f(worker, i) for uneven items (tiles). `is_long`: whether one takes longer than waking a thread.
template <class F>
void parallel_tiles(const Where& where, int64_t n, bool is_long, const F& f) {
  parallel_pieces(where, n, n, is_long, [&](int worker, Pieces& pieces) {
    while (pieces.next()) {
      for (int64_t i = pieces.begin; i < pieces.end; ++i) f(worker, i);
    }
  });
}

// f(worker, pieces) for loops that keep something from one item to the next.
template <class F>
void parallel_chunks(const Where& where, int64_t n, const F& f) {
  parallel_pieces(where, n, short_pieces(where), false, f);
}

template <int N, class F>
void parallel_rows_of(const Where& where, int64_t rows, int blocks, const F& f) {
  const auto row_of = [&](int64_t row) {
    const int count = N > 0 ? N : blocks;
    for (int b = 0; b < count; ++b) f(row, b);
  };
  parallel_for(where, rows, row_of, "parallel_rows");
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
