// Decodes the codes of consecutive windows of a contiguous plane into offsets, on the CPU. Works in
// batches of windows, of one line or of several short ones, so that the arithmetic vectorises.
// Included by *.simd.cpp files only.
#pragma once

#include <string.h>

#include "common/lanes.h"
#include "pooling/scatter_gather.h"

namespace segkernels::pooling {
inline namespace SK_NS {

class CodeDecoder {
 public:
  static constexpr int kMost = 128;
  static constexpr int kWidth = kVectorBytes / 4;

  // Offsets in the plane of n windows, of which `window` is the first. Invalid codes give -1 and
  // set `bad`.
  struct Batch {
    int32_t place[kMost];
    int64_t window;
    int32_t n;
    bool bad;
  };

  explicit CodeDecoder(const Windows& windows)
      : w_(windows), inverse_((65535 + uint32_t(w_.kernel[1])) / uint32_t(w_.kernel[1])) {
    lines_ = w_.pooled[1] > 0 && w_.pooled[1] < kMost ? kMost / w_.pooled[1] : 1;
    short_lines_ = w_.pooled[1] <= kMost;
    if (short_lines_) describe(0, w_.pooled[1], lines_, table_);
  }

  // Whether offsets fit 32 bits.
  static bool supports(const Windows& w) {
    return w.channels == 1 && int64_t(w.full[0]) * w.full[1] < (int64_t(1) << 30);
  }

  // f(batch) for the batches that cover the lines [begin, end) of windows, in order.
  template <class F>
  void each(int32_t begin, int32_t end, const uint8_t* codes, const F& f) const {
    Batch batch;
    for (int32_t y = begin, x = 0; y < end;) {
      decode(y, x, end, codes, batch);
      f(batch);
    }
  }

 private:
  // For each window of a batch: the offset of its first cell from the start of the batch's first
  // line, and the columns [begin, end) of cells that lie in the plane.
  struct Table {
    uint32_t from[kMost];
    int32_t begin[kMost], end[kMost];
  };

  // Decodes the batch that starts with window (y, x), and moves (y, x) behind it.
  __attribute__((noinline)) void decode(int32_t& y, int32_t& x, int32_t end, const uint8_t* codes,
                                        Batch& batch) const {
    const Cells ys = cells_inside(w_, 0, y);
    const int64_t first = int64_t(y) * w_.pooled[1] + x;
    if (short_lines_) {
      int32_t lines = 1;
      while (lines < lines_ && y + lines < end && alike(ys, y + lines)) ++lines;
      find(ys, table_, codes, first, lines * w_.pooled[1], batch);
      y += lines;
      return;
    }
    const int32_t n = w_.pooled[1] - x < kMost ? w_.pooled[1] - x : kMost;
    Table table;
    describe(x, n, 1, table);
    find(ys, table, codes, first, n, batch);
    x += n;
    if (x == w_.pooled[1]) x = 0, ++y;
  }

  void describe(int32_t x, int32_t columns, int32_t lines, Table& table) const {
    for (int32_t i = 0; i < columns; ++i) {
      const Cells xs = cells_inside(w_, 1, x + i);
      table.from[i] = uint32_t(xs.start);
      table.begin[i] = xs.begin;
      table.end[i] = xs.end;
    }
    const uint32_t step = uint32_t(w_.stride[0]) * uint32_t(w_.full[1]);
    for (int32_t i = columns; i < lines * columns; ++i) {
      table.from[i] = table.from[i - columns] + step;
      table.begin[i] = table.begin[i - columns];
      table.end[i] = table.end[i - columns];
    }
  }

  bool alike(const Cells& ys, int32_t y) const {
    const Cells other = cells_inside(w_, 0, y);
    return other.begin == ys.begin && other.end == ys.end;
  }

  void find(const Cells& ys, const Table& table, const uint8_t* codes, int64_t window, int32_t n,
            Batch& batch) const {
    using Wide = Vec<uint32_t, kWidth>;
    using Signed = Vec<int32_t, kWidth>;
    const uint32_t row = uint32_t(w_.dilation[0]) * uint32_t(w_.full[1]);
    const uint32_t column = uint32_t(w_.dilation[1]), width = uint32_t(w_.kernel[1]);
    const uint32_t origin = uint32_t(ys.start) * uint32_t(w_.full[1]);
    Signed lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    Signed bad = {};
    for (int32_t i = 0; i < n; i += kWidth) {
      uint8_t few[kWidth] = {};
      const uint8_t* from = codes + window + i;
      if (n - i < kWidth) from = static_cast<uint8_t*>(memcpy(few, from, size_t(n - i)));
      const Wide code = widen_bytes<kWidth>(load_lanes<kWidth>(from));
      const Wide m = (code * inverse_) >> 16, k = code - m * width;
      const Wide at = origin + load_lanes<kWidth>(table.from + i) + m * row + k * column;
      const Signed y = bits_of<Signed>(m), x = bits_of<Signed>(k);
      const Signed inside = (y >= ys.begin) & (y < ys.end) &
                            (x >= load_lanes<kWidth>(table.begin + i)) &
                            (x < load_lanes<kWidth>(table.end + i));
      store_lanes(batch.place + i, bits_of<Signed>(at) | ~inside);
      bad |= ~inside & (lane < n - i);
    }
    batch.window = window;
    batch.n = n;
    batch.bad = false;
    for (int i = 0; i < kWidth; ++i) batch.bad |= bad[i] != 0;
  }

  Windows w_;
  uint32_t inverse_;  // 2^16 / kernel width, rounded up
  int32_t lines_;     // at most, in a batch
  bool short_lines_;  // a line fits a batch
  Table table_;
};

}  // namespace SK_NS
}  // namespace segkernels::pooling
