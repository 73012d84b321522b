// Tables of taps and scratch memory of the CPU's loops, and the loops' declarations.
#pragma once

#include "common/simd.h"
#include "common/where.h"
#include "interpolate/kernels.h"
#include "interpolate/tables.h"

namespace segkernels {

template <class A>
struct ForwardTables {
  Geometry<A> g;
  TapTable<A> y, x;
  A* rows;     // per thread: `taps` rows of the output's width
  A* widened;  // per thread: a row of the input
  int taps;

  void allocate(Arena& arena, int threads) {
    y.allocate(arena, g.y, taps);
    x.allocate(arena, g.x, taps);
    rows = arena.allocate<A>(int64_t(threads) * taps * row_stride());
    widened = arena.allocate<A>(int64_t(threads) * widened_stride());
  }
  // Rounded up, so that threads do not share cache lines.
  int64_t row_stride() const { return (int64_t(g.x.out) * g.inner + 15) / 16 * 16; }
  int64_t widened_stride() const { return (int64_t(g.x.in) * g.inner + 15) / 16 * 16; }
};

template <class A>
struct BackwardTables {
  Geometry<A> g;
  ReaderTable<A> y, x;
  // Readers along the width again, if few: padded to `most` for each input, so that loops over
  // inputs vectorise. Reader q of input j is reader[q * in + j]; padding has weight 0.
  int32_t* reader;
  A* weight;
  // One tap, if no input has two readers: the input of each output.
  int32_t* source;
  bool sparse;
  A* sums;  // per thread: a row of the output's width
  int taps;

  static constexpr int kMost = 8;

  void allocate(Arena& arena, int threads) {
    y.allocate(arena, g.y, taps);
    x.allocate(arena, g.x, taps);
    const bool few = g.inner == 1 && taps * double(g.x.inverse) + 2 <= kMost;
    reader = arena.allocate<int32_t>(few ? int64_t(g.x.in) * kMost : 0);
    weight = arena.allocate<A>(few ? int64_t(g.x.in) * kMost : 0);
    source = arena.allocate<int32_t>(few && taps == 1 ? g.x.out : 0);
    sums = arena.allocate<A>(int64_t(threads) * row_stride());
    most = few ? kMost : 0;
  }

  // One tap: the step if outputs step * j .. step * (j + 1) - 1 read input j, for all j; else 0.
  int step() const {
    const int64_t count = x.offset[1] - x.offset[0];
    if (taps != 1 || count < 1 || count > 8) return 0;
    for (int32_t j = 0; j < g.x.in; ++j) {
      if (x.begin[j] != j * count || x.offset[j + 1] != (j + 1) * count) return 0;
    }
    return int(count);
  }

  // Fills the padded readers, once the tables are filled. `most` becomes the largest number of
  // readers, or 0 if that is too many.
  void pad() {
    int64_t needed = 0;
    for (int32_t j = 0; j < g.x.in; ++j) {
      const int64_t count = x.offset[j + 1] - x.offset[j];
      needed = count > needed ? count : needed;
    }
    most = needed <= most ? int(needed) : 0;
    for (int64_t q = 0; q < most; ++q) {
      for (int32_t j = 0; j < g.x.in; ++j) {
        const bool there = q < x.offset[j + 1] - x.offset[j];
        reader[q * g.x.in + j] = there ? x.begin[j] + int32_t(q) : 0;
        weight[q * g.x.in + j] = there ? x.weight[x.offset[j] + q] : A(0);
      }
    }
    sparse = taps == 1 && most == 1;
    for (int32_t j = 0; sparse && j < g.x.in; ++j) {
      if (x.offset[j + 1] > x.offset[j]) source[x.begin[j]] = j;
    }
  }

  int most;
  int64_t row_stride() const { return (int64_t(g.x.out) * g.inner + 15) / 16 * 16; }
};

// Defined in interpolate.simd.cpp.
template <Isa kIsa, class T>
struct InterpolateLoops {
  static void forward(const Where&, const ForwardTables<Acc<T>>&, const T* input, T* output);
  static void backward(const Where&, const BackwardTables<Acc<T>>&, const T* grad_output,
                       T* grad_input);
};

}  // namespace segkernels
