// Interpolated logits on the CPU, in blocks of neighbouring pixels of an output row, all classes.
// Interpolates every row of the logits along the width once and keeps it while output rows need it.
// Computes in A; the logits' own type matters only where a row is read.
#pragma once

#include <string.h>

#include "common/parallel_for.h"
#include "interpolate/interpolate.h"
#include "interpolate/pixels.h"
#if defined(SK_ISA)
#include "common/lanes.h"
#endif

namespace segkernels {

template <class A>
struct LogitTables {
  Axis<A> y, x;
  int64_t batch;
  int32_t classes;
  Strides strides;
  const void* data;
  ScalarType type;  // of the logits
  int taps;
  TapTable<A> y_taps, x_taps;
  A* rows;   // [workers, taps, classes, row_stride]
  A* line;   // [workers, in width]
  A* block;  // [workers, classes, kPixelBlock]

  // Call: an ArgmaxCall or a LossCall.
  template <class Call>
  explicit LogitTables(const Call& call)
      : batch(call.resampling.planes),
        classes(call.classes),
        strides(call.strides),
        data(call.logits),
        type(call.type),
        taps(call.resampling.taps()) {
    const auto g = call.resampling.template geometry<A>();
    y = g.y;
    x = g.x;
  }

  void allocate(Arena& arena, int threads) {
    y_taps.allocate(arena, y, taps);
    x_taps.allocate(arena, x, taps);
    rows = arena.allocate<A>(threads * rows_stride());
    line = arena.allocate<A>(threads * line_stride());
    block = arena.allocate<A>(threads * block_stride());
  }
  void fill() const {
    with_taps(taps, [&](auto count) {
      cpu::fill<count.value>(y, y_taps);
      cpu::fill<count.value>(x, x_taps);
    });
  }
  int64_t row_stride() const { return (int64_t(x.out) + 15) / 16 * 16; }
  int64_t rows_stride() const { return taps * classes * row_stride(); }
  int64_t line_stride() const { return (int64_t(x.in) + 15) / 16 * 16; }
  int64_t block_stride() const { return int64_t(classes) * kPixelBlock; }

  static constexpr int64_t kPixelBlock = 64;
};

#if defined(SK_ISA)
inline namespace SK_ISA {

// Rounds n values, to places `stride` apart.
template <class T, class A>
void write_line(const A* from, T* out, int64_t stride, int64_t n) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) narrow(from[i], out[i * stride]);
  } else if constexpr (std::is_same_v<T, A>) {
    memcpy(out, from, size_t(n) * sizeof(A));
  } else {
    narrow_line(from, out, n);
  }
}

template <class A>
class LogitBlocks {
 public:
  static constexpr int64_t kBlock = LogitTables<A>::kPixelBlock;

  LogitBlocks(const LogitTables<A>& tables, int64_t worker)
      : t_(tables),
        rows_(t_.rows + worker * t_.rows_stride()),
        line_(t_.line + worker * t_.line_stride()),
        block_(t_.block + worker * t_.block_stride()) {}

  // A line of the input's width that the caller may use.
  A* line() const { return line_; }

  void move_to(int64_t image, int32_t y) {
    for (int k = 0; k < t_.taps; ++k) {
      const int32_t source = t_.y_taps.position[int64_t(k) * t_.y.out + y];
      const int slot = source % t_.taps;
      A* rows = rows_ + slot * t_.classes * t_.row_stride();
      if (held_[slot] != image * t_.y.in + source) {
        with_taps(t_.taps, [&](auto taps) {
          interpolate<taps.value>(image * t_.strides.batch + source * t_.strides.row, rows);
        });
        held_[slot] = image * t_.y.in + source;
      }
      row_[k] = rows;
      weight_[k] = t_.y_taps.weight[int64_t(k) * t_.y.out + y];
    }
  }

  // The logits [classes, kBlock] of pixels x .. x + kBlock - 1; rows are padded.
  A* block(int64_t x) const {
    with_taps(t_.taps, [&](auto taps) { blend<taps.value>(x); });
    return block_;
  }

 private:
  template <int K>
  void blend(int64_t x) const {
    const int64_t n = t_.row_stride() - x < kBlock ? t_.row_stride() - x : kBlock;
    for (int32_t c = 0; c < t_.classes; ++c) {
      A* out = block_ + c * kBlock;
      const A* r[K];
      A w[K];
      for (int k = 0; k < K; ++k) {
        r[k] = row_[k] + c * t_.row_stride() + x;
        w[k] = weight_[k];
      }
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        A sum = w[0] * r[0][i];
        for (int k = 1; k < K; ++k) sum = sum + w[k] * r[k][i];
        out[i] = sum;
      }
    }
  }

  // Interpolates row `at` of every class along the width.
  template <int K>
  void interpolate(int64_t at, A* rows) const {
    const int64_t width = t_.x.out;
    const int32_t* position = t_.x_taps.position;
    const A* weight = t_.x_taps.weight;
    // If most inputs are not read, `line_` holds what each tap reads.
    const bool few = K * width <= t_.x.in;
    for (int32_t c = 0; c < t_.classes; ++c, rows += t_.row_stride()) {
      const A* line = read(at + c * t_.strides.channel, few ? position : nullptr, K * width);
      if (few) {
#pragma GCC ivdep
        for (int64_t x = 0; x < width; ++x) {
          A sum = weight[x] * line[x];
          for (int k = 1; k < K; ++k) sum = sum + weight[k * width + x] * line[k * width + x];
          rows[x] = sum;
        }
      } else {
#pragma GCC ivdep
        for (int64_t x = 0; x < width; ++x) {
          A sum = weight[x] * line[position[x]];
          for (int k = 1; k < K; ++k) {
            sum = sum + weight[k * width + x] * line[position[k * width + x]];
          }
          rows[x] = sum;
        }
      }
      for (int64_t x = width; x < t_.row_stride(); ++x) rows[x] = A(0);
    }
  }

  // A row of logits in A, or only the n values at `position`: in `line_`, or where it is.
  const A* read(int64_t at, const int32_t* position, int64_t n) const {
    const A* line = line_;
    with_stored_type<A>(t_.type, [&](auto scalar) {
      using T = decltype(scalar);
      const T* row = static_cast<const T*>(t_.data) + at;
      const int64_t stride = t_.strides.column;
      if (position != nullptr) {
        for (int64_t i = 0; i < n; ++i) line_[i] = widen_one(row[position[i] * stride]);
      } else if (stride != 1) {
        for (int64_t i = 0; i < t_.x.in; ++i) line_[i] = widen_one(row[i * stride]);
      } else if constexpr (std::is_same_v<T, A>) {
        line = row;
      } else {
        widen_line(row, line_, t_.x.in);
      }
    });
    return line;
  }

  const LogitTables<A>& t_;
  A* rows_;
  A* line_;
  A* block_;
  int64_t held_[4] = {-1, -1, -1, -1};
  const A* row_[4];
  A weight_[4];
};

}  // namespace SK_ISA
#endif

}  // namespace segkernels
