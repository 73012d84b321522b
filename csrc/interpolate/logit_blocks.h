// Interpolated logits on the CPU, in blocks of neighbouring pixels of an output row, all classes.
// Interpolates every row of the logits along the width once and keeps it while output rows need it.
#pragma once

#include "common/parallel_for.h"
#include "interpolate/pixels.h"
#include "interpolate/tables.h"

namespace segkernels {

template <class T>
struct LogitTables {
  using A = Acc<T>;
  Logits<T> logits;
  TapTable<A> y, x;
  A* rows;     // [threads, taps, classes, row_stride]
  A* widened;  // [threads, in width]
  A* block;    // [threads, classes, kPixelBlock]
  int taps;

  void allocate(Arena& arena, int threads) {
    y.allocate(arena, logits.y, taps);
    x.allocate(arena, logits.x, taps);
    rows = arena.allocate<A>(threads * rows_stride());
    widened = arena.allocate<A>(threads * widened_stride());
    block = arena.allocate<A>(threads * block_stride());
  }
  int64_t row_stride() const { return (int64_t(logits.x.out) + 15) / 16 * 16; }
  int64_t rows_stride() const { return taps * logits.classes * row_stride(); }
  int64_t widened_stride() const { return (int64_t(logits.x.in) + 15) / 16 * 16; }
  int64_t block_stride() const { return int64_t(logits.classes) * kPixelBlock; }

  static constexpr int64_t kPixelBlock = 64;
};

#if defined(SK_ISA)
inline namespace SK_ISA {

template <class T, int K>
class LogitBlocks {
 public:
  using A = Acc<T>;
  static constexpr int64_t kBlock = LogitTables<T>::kPixelBlock;

  LogitBlocks(const LogitTables<T>& tables, int64_t thread)
      : tables_(tables),
        rows_(tables.rows + thread * tables.rows_stride()),
        widened_(tables.widened + thread * tables.widened_stride()),
        block_(tables.block + thread * tables.block_stride()) {
    for (int k = 0; k < K; ++k) held_[k] = -1;
  }

  void move_to(int64_t image, int32_t y) {
    const Logits<T>& l = tables_.logits;
    for (int k = 0; k < K; ++k) {
      const int32_t source = tables_.y.position[int64_t(k) * l.y.out + y];
      const int slot = source % K;
      A* rows = rows_ + slot * l.classes * tables_.row_stride();
      if (held_[slot] != image * l.y.in + source) {
        fill(l.data + image * l.strides.batch + source * l.strides.row, rows);
        held_[slot] = image * l.y.in + source;
      }
      row_[k] = rows;
      weight_[k] = tables_.y.weight[int64_t(k) * l.y.out + y];
    }
  }

  // The logits [classes, kBlock] of pixels x .. x + kBlock - 1; rows are padded.
  const A* block(int64_t x) const {
    for (int32_t c = 0; c < tables_.logits.classes; ++c) {
      const int64_t at = c * tables_.row_stride() + x;
      const int64_t n = tables_.row_stride() - x < kBlock ? tables_.row_stride() - x : kBlock;
      A* out = block_ + c * kBlock;
      const A* r[K];
      for (int k = 0; k < K; ++k) r[k] = row_[k] + at;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        A sum = weight_[0] * r[0][i];
        for (int k = 1; k < K; ++k) sum = sum + weight_[k] * r[k][i];
        out[i] = sum;
      }
    }
    return block_;
  }

 private:
  void fill(const T* from, A* rows) const {
    const Logits<T>& l = tables_.logits;
    const int64_t width = l.x.out;
    for (int32_t c = 0; c < l.classes; ++c, rows += tables_.row_stride()) {
      const T* row = from + c * l.strides.channel;
      if (K * width <= l.x.in) {  // most inputs are not read
        for (int64_t x = 0; x < width; ++x) {
          A sum = A(0);
          for (int k = 0; k < K; ++k) {
            const int64_t at = tables_.x.position[k * width + x] * l.strides.column;
            const A value = widen(row[at]), weight = tables_.x.weight[k * width + x];
            sum = k == 0 ? weight * value : sum + weight * value;
          }
          rows[x] = sum;
        }
        for (int64_t x = width; x < tables_.row_stride(); ++x) rows[x] = A(0);
        continue;
      }
      for (int32_t i = 0; i < l.x.in; ++i) widened_[i] = widen(row[i * l.strides.column]);
#pragma GCC ivdep
      for (int64_t x = 0; x < width; ++x) {
        A sum = tables_.x.weight[x] * widened_[tables_.x.position[x]];
        for (int k = 1; k < K; ++k) {
          sum = sum + tables_.x.weight[k * width + x] * widened_[tables_.x.position[k * width + x]];
        }
        rows[x] = sum;
      }
      for (int64_t x = width; x < tables_.row_stride(); ++x) rows[x] = A(0);
    }
  }

  const LogitTables<T>& tables_;
  A* rows_;
  A* widened_;
  A* block_;
  int64_t held_[K];
  const A* row_[K];
  A weight_[K];
};

}  // namespace SK_ISA
#endif

}  // namespace segkernels
