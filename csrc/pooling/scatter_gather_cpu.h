// scatter_gather.h as vectorised loops over lines for the CPU: SIMD lanes are the columns of
// contiguous planes, or the channels of channels_last. scatter_cpu.h has the scatters by source.
// Parallel over lines. Included by *.simd.cpp files only.
#pragma once

#include <string.h>

#include <type_traits>

#include "common/lanes.h"
#include "pooling/code_decoder.h"
#include "pooling/scatter_cpu.h"
#include "pooling/scatter_gather.h"

namespace segkernels::pooling {
inline namespace SK_NS {

// Columns or channels a block: its accumulators stay in registers and cache.
constexpr int kLanes = 64;

SK_HD int lanes_left(int64_t from, int64_t end) {
  return int(end - from < kLanes ? end - from : kLanes);
}

SK_HD Place line_of(int64_t line, const Divisor& lines) {
  const Split s = split(line, lines);
  return {s.quotient, s.remainder, 0, 0};
}

// The windows [begin, end) all of whose cells lie in the plane, along one axis.
struct Interior {
  int32_t begin, end;

  Interior(const Windows& w, int axis) {
    const int32_t reach = (w.kernel[axis] - 1) * w.dilation[axis];
    const int32_t room = w.full[axis] - 1 - reach + w.padding[axis];
    begin = (w.padding[axis] + w.stride[axis] - 1) / w.stride[axis];
    end = room < 0 ? 0 : room / w.stride[axis] + 1;
    if (begin > w.pooled[axis]) begin = w.pooled[axis];
    if (end > w.pooled[axis]) end = w.pooled[axis];
    if (end < begin) end = begin;
  }

  bool holds(int32_t window) const { return begin <= window && window < end; }
};

// Constants that all lines of windows share.
struct LineTables {
  Windows w;
  Divisor lines;  // of windows
  Interior ys, xs;
  int32_t cells;
  int64_t offset_of[256];  // from a window's first cell to each cell, in the plane

  explicit LineTables(const Windows& windows)
      : w(windows),
        lines(divisor_of(w.pooled[0] > 0 ? w.pooled[0] : 1)),
        ys(w, 0),
        xs(w, 1),
        cells(w.kernel[0] * w.kernel[1]) {
    int32_t cell = 0;
    for (int64_t m = 0; m < w.kernel[0] && cell < 256; ++m) {
      for (int64_t n = 0; n < w.kernel[1] && cell < 256; ++n) {
        offset_of[cell++] = m * w.dilation[0] * w.full[1] + n * w.dilation[1];
      }
    }
  }
};

// `windows_over` for consecutive coordinates, without divisions.
struct Sweep {
  int32_t step, reach, count, from_edge, first = 0, last = -1;

  Sweep(const Windows& w, int axis, int32_t at)
      : step(w.stride[axis]),
        reach((w.kernel[axis] - 1) * w.dilation[axis]),
        count(w.pooled[axis]),
        from_edge(at + w.padding[axis]) {
    settle();
  }

  void next() {
    ++from_edge;
    settle();
  }

 private:
  void settle() {
    while (first < count && first * step + reach < from_edge) ++first;
    while (last + 1 < count && (last + 1) * step <= from_edge) ++last;
  }
};

// The windows [begin, end) of a line whose columns all lie in the plane, if all their codes are
// valid; else an empty range.
struct ValidWindows {
  int32_t begin, end;

  ValidWindows(const LineTables& tables, const Place& line, const uint8_t* __restrict row)
      : begin(0), end(0) {
    const Windows& w = tables.w;
    const Cells ys = cells_inside(w, 0, line.y);
    uint8_t least = 255, largest = 0;
    for (int64_t i = tables.xs.begin * w.channels; i < tables.xs.end * w.channels; ++i) {
      least = row[i] < least ? row[i] : least;
      largest = row[i] > largest ? row[i] : largest;
    }
    if (least < ys.begin * w.kernel[1] || largest >= ys.end * w.kernel[1]) return;
    begin = tables.xs.begin;
    end = tables.xs.end;
  }
};

// Reports invalid codes in a line of windows.
inline void check_line(const LineTables& tables, const Place& line, const uint8_t* codes,
                       int32_t* status) {
  const Windows& w = tables.w;
  const uint8_t* row = codes + pooled_offset(w, line, line.y, 0);
  const ValidWindows valid(tables, line, row);
  bool bad = false;
  const auto check = [&](int64_t i) {
    bad |= !ByCode::valid(w, line.y, int32_t(i / w.channels), row[i]);
  };
  for (int64_t i = 0; i < valid.begin * w.channels; ++i) check(i);
  for (int64_t i = valid.end * w.channels; i < w.pooled[1] * w.channels; ++i) check(i);
  if (bad) report(status, kCodeOutOfRange);
}

template <class Rule>
SK_HD bool picks(const Rule& rule, const uint8_t* codes, int64_t i, int32_t cell) {
  if constexpr (std::is_same_v<Rule, ByCode>) {
    return codes[i] == cell;
  } else if constexpr (std::is_same_v<Rule, ByCell>) {
    return rule.cell == cell;
  } else {
    return true;
  }
}

// All ones or zeros, to select without a branch, also in scalar loops.
template <class T>
SK_HD T mask_of(bool wanted) {
  return T(T(0) - T(wanted));
}

// out[i * step] = values[i] where the rule selects the cell, else 0.
template <int kStep, class T, class Rule>
SK_HD void expand_lanes(const Rule& rule, const uint8_t* __restrict codes,
                        const T* __restrict values, T* __restrict out, int64_t step, int64_t n,
                        int32_t cell) {
  for (int64_t i = 0; i < n; ++i) {
    const T mask = mask_of<T>(picks(rule, codes, i, cell));
    out[i * (kStep > 0 ? kStep : step)] = T(values[i] & mask);
  }
}

// Two neighbouring cells.
template <class T, class Rule>
SK_HD void expand_2_columns(const Rule& rule, const uint8_t* __restrict codes,
                            const T* __restrict values, T* __restrict out, int64_t n,
                            int32_t cell) {
  for (int64_t i = 0; i < n; ++i) {
    out[2 * i] = T(values[i] & mask_of<T>(picks(rule, codes, i, cell)));
    out[2 * i + 1] = T(values[i] & mask_of<T>(picks(rule, codes, i, cell + 1)));
  }
}

// Whether the rule selects the cell for every value (1), for none (0), or by code (-1).
template <class Rule>
SK_HD int picks_always(const Rule& rule, int32_t cell) {
  if constexpr (std::is_same_v<Rule, ByCode>) {
    return -1;
  } else {
    return picks(rule, nullptr, 0, cell);
  }
}

// channels_last: one place, from the values of its window.
template <class T, class Rule>
SK_HD void expand_place(const Rule& rule, const uint8_t* codes, const T* values, T* out, int64_t n,
                        int32_t cell) {
  const int always = picks_always(rule, cell);
  if (always == 0) {
    memset(static_cast<void*>(out), 0, sizeof(T) * n);
  } else if (always == 1) {
    memcpy(static_cast<void*>(out), values, sizeof(T) * n);
  } else {
    expand_lanes<1>(rule, codes, values, out, 1, n, cell);
  }
}

// One line of the plane from a line of windows: row m of their cells. The first `whole` windows
// have all their columns in the plane.
template <class T, class Rule>
void expand_line(const Windows& w, const Rule& rule, const uint8_t* codes, const T* values, T* out,
                 int32_t m, int32_t whole) {
  const int32_t first = m * w.kernel[1];
  if constexpr (std::is_same_v<Rule, ByCell>) {
    if (rule.cell < first || rule.cell >= first + w.kernel[1]) {
      memset(static_cast<void*>(out), 0, sizeof(T) * w.full[1] * w.channels);
      return;
    }
  }
  if (w.channels > 1) {
    int32_t x = 0;
    for (int32_t window = 0; window < w.pooled[1]; ++window) {
      const int64_t at = window * w.channels;
      for (int32_t n = 0; n < w.kernel[1] && x < w.full[1]; ++n, ++x) {
        expand_place(rule, codes + at, values + at, out + x * w.channels, w.channels, first + n);
      }
    }
    memset(static_cast<void*>(out + x * w.channels), 0, sizeof(T) * (w.full[1] - x) * w.channels);
    return;
  }
  if (w.kernel[1] == 2) {
    expand_2_columns(rule, codes, values, out, whole, first);
  } else {
    for (int32_t n = 0; n < w.kernel[1]; ++n) {
      expand_lanes<0>(rule, codes, values, out + n, w.kernel[1], whole, first + n);
    }
  }
  for (int32_t x = whole * w.kernel[1]; x < w.full[1]; ++x) {
    const bool picked = whole < w.pooled[1] && picks(rule, codes, whole, first + x % w.kernel[1]);
    out[x] = picked ? values[whole] : T(0);
  }
}

template <class T, class Rule>
void expand_lines(const Where& where, const Windows& w, const Rule& rule, const uint8_t* codes,
                  const T* input, T* output, int32_t* status, const char* name) {
  const int32_t lines = (w.full[0] + w.kernel[0] - 1) / w.kernel[0];
  const int64_t row = w.full[1] * w.channels;
  const int32_t columns = w.full[1] / w.kernel[1];
  const int32_t whole = columns < w.pooled[1] ? columns : w.pooled[1];
  const Divisor by = divisor_of(lines > 0 ? lines : 1);
  const LineTables tables(w);
  parallel_for(
      where, w.planes * lines,
      [&](int64_t i) {
        const Place line = line_of(i, by);
        const bool is_window = line.y < w.pooled[0];
        if (is_window && status != nullptr) check_line(tables, line, codes, status);
        const int64_t at = is_window ? pooled_offset(w, line, line.y, 0) : 0;
        for (int32_t m = 0; m < w.kernel[0] && line.y * w.kernel[0] + m < w.full[0]; ++m) {
          T* out = output + full_offset(w, line, line.y * w.kernel[0] + m, 0);
          if (is_window) {
            expand_line(w, rule, codes + (codes != nullptr ? at : 0), input + at, out, m, whole);
          } else {
            memset(static_cast<void*>(out), 0, sizeof(T) * row);
          }
        }
      },
      name);
}

// Masks the bits before widening, so that the loop has no branch.
template <class T>
SK_HD Acc<T> widen_if(T value, bool wanted) {
  using Bits = BitsOf<sizeof(T)>;
  return widen(bits_of<T>(Bits(bits_of<Bits>(value) & mask_of<Bits>(wanted))));
}

template <class T, class P, bool kSum, class A>
SK_HD void merge_matching(const T* __restrict values, const P* __restrict positions,
                          A* __restrict found, int n, P wanted) {
  for (int i = 0; i < n; ++i) {
    if constexpr (kSum) {
      found[i] += widen_if(values[i], positions[i] == wanted);
    } else {
      const T mask = mask_of<T>(positions[i] == wanted);
      found[i] = T((values[i] & mask) | (found[i] & T(~mask)));
    }
  }
}

// kCount vectors of channels of one place: the last value, or the sum of the values, whose position
// it is.
template <class T, class P, bool kSum, int kCount>
struct LastOrSumLanes {
  using A = std::conditional_t<kSum, Acc<T>, T>;
  using Bits = BitsOf<sizeof(T)>;
  static constexpr int kWidth = kVectorBytes / sizeof(A);
  using Mask = Vec<std::make_signed_t<Bits>, kWidth>;

  Vec<A, kWidth> found[kCount] = {};

  SK_HD void update(const T* values, const P* positions, P wanted) {
    for (int i = 0; i < kCount; ++i) {
      const auto same = load_lanes<kWidth>(positions + i * kWidth) == wanted;
      const Mask mask = __builtin_convertvector(same, Mask);
      const auto all = load_lanes<kWidth>(reinterpret_cast<const Bits*>(values) + i * kWidth);
      const auto bits = all & bits_of<Vec<Bits, kWidth>>(mask);
      if constexpr (kSum) {
        found[i] += widen_lanes<kWidth>(bits, T{});
      } else {
        found[i] = bits | (found[i] & bits_of<Vec<Bits, kWidth>>(~mask));
      }
    }
  }

  SK_HD void write(T* out) const {
    for (int i = 0; i < kCount; ++i) {
      if constexpr (sizeof(A) > sizeof(T)) {
        store_narrow<kWidth>(out + i * kWidth, found[i]);
      } else {
        store_lanes(out + i * kWidth, found[i]);
      }
    }
  }
};

// channels_last, any windows: as ScatterWindows.
template <class T, class P, bool kSum>
struct ScatterLines {
  using A = std::conditional_t<kSum, Acc<T>, T>;
  static constexpr int kWidth = LastOrSumLanes<T, P, kSum, 1>::kWidth;

  Windows w;
  Divisor lines;  // of the plane
  const T* input;
  const P* positions;
  T* output;

  void operator()(int64_t i) const {
    const Place line = line_of(i, lines);
    const Rows rows(w, line);
    T* out = output + full_offset(w, line, line.y, 0);
    Sweep xs(w, 1, 0);
    for (int32_t x = 0; x < w.full[1]; ++x, xs.next(), out += w.channels) {
      const int64_t place = int64_t(line.y) * w.full[1] + x;
      if (w.channels < kWidth) {
        few(rows, xs, place, out);
        continue;
      }
      each_block<kWidth>(w.channels, [&](auto count, int64_t c) {
        vectors<decltype(count)::value>(rows, xs, place, c, out + c);
      });
    }
  }

  // The lines of windows that cover a line of the plane and have a cell there, which are evenly
  // spaced: the offset of the first and the code of its first cell there, and the steps of both.
  struct Rows {
    int64_t at = 0, step = 0;
    int32_t code = 0, code_step = 0, count = 0;

    Rows(const Windows& w, const Place& line) {
      const Covering ys = windows_over(w, 0, line.y);
      int32_t first = -1, lines = 1;
      for (int32_t y = ys.first; y <= ys.last; ++y) {
        const int32_t row = cell_at(w, 0, y, line.y);
        if (row < 0) continue;
        if (first >= 0) {
          lines = y - first;
          count = (ys.last - first) / lines + 1;
          break;
        }
        first = y;
        code = row * w.kernel[1];
        count = 1;
      }
      if (first < 0) return;
      at = pooled_offset(w, line, first, 0);
      step = lines * w.pooled[1] * w.channels;
      code_step = lines * w.stride[0] / w.dilation[0] * w.kernel[1];
    }
  };

  // f(offset of the window, the position that means this place) for the windows that cover it.
  template <class F>
  SK_HD void each_window(const Rows& rows, const Sweep& xs, int64_t place, const F& f) const {
    const int32_t column = xs.from_edge - xs.first * xs.step, gap = w.dilation[1];
    int64_t row = rows.at + xs.first * w.channels;
    int32_t code = rows.code;
    for (int32_t r = 0; r < rows.count; ++r, row += rows.step, code -= rows.code_step) {
      int64_t at = row;
      int32_t offset = column;
      for (int32_t px = xs.first; px <= xs.last; ++px, at += w.channels, offset -= xs.step) {
        if (gap > 1 && offset % gap != 0) continue;
        const int32_t cell = gap > 1 ? offset / gap : offset;
        f(at, sizeof(P) == 1 ? P(code + cell) : P(place));
      }
    }
  }

  template <int kCount>
  void vectors(const Rows& rows, const Sweep& xs, int64_t place, int64_t c, T* out) const {
    LastOrSumLanes<T, P, kSum, kCount> lanes;
    each_window(rows, xs, place, [&](int64_t at, P wanted) {
      lanes.update(input + at + c, positions + at + c, wanted);
    });
    lanes.write(out);
  }

  // Fewer channels than a vector.
  void few(const Rows& rows, const Sweep& xs, int64_t place, T* out) const {
    A found[kWidth] = {};
    const int n = int(w.channels);
    each_window(rows, xs, place, [&](int64_t at, P wanted) {
      merge_matching<T, P, kSum>(input + at, positions + at, found, n, wanted);
    });
    for (int i = 0; i < n; ++i) {
      if constexpr (kSum) {
        out[i] = narrow_to<T>(found[i]);
      } else {
        out[i] = found[i];
      }
    }
  }
};

template <class T, class P, bool kSum>
void scatter_by_place(const Where& where, const Windows& w, const T* input, const P* positions,
                      T* output, const char* name) {
  const Divisor lines = divisor_of(w.full[0] > 0 ? w.full[0] : 1);
  const ScatterLines<T, P, kSum> f{w, lines, input, positions, output};
  parallel_for(where, w.planes * w.full[0], f, name);
}

// For shorter lines the vector loops' overhead dominates: planes are cleared and scattered to.
constexpr int32_t kShortLine = 32;

// From codes, for windows that tile the plane.
template <class T>
void expand_codes(const Where& where, const Windows& w, const T* input, const uint8_t* codes,
                  T* output, int32_t* status, const char* name) {
  if (w.channels == 1 && w.pooled[1] < kShortLine && w.planes >= where.threads) {
    scatter_planes<T, uint8_t, false>(where, w, input, codes, output, status, name);
  } else {
    expand_lines(where, w, ByCode{codes}, codes, input, output, status, name);
  }
}

// Selects the cells of a line of 2x2 windows by their codes; returns the largest code.
template <class T>
SK_HD uint8_t gather_2x2(const T* __restrict upper, const T* __restrict lower,
                         const uint8_t* __restrict codes, T* __restrict out, int64_t n) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T right = mask_of<T>(codes[i] & 1), low = mask_of<T>(codes[i] & 2);
    const T above = T((upper[2 * i] & T(~right)) | (upper[2 * i + 1] & right));
    const T below = T((lower[2 * i] & T(~right)) | (lower[2 * i + 1] & right));
    out[i] = T(((above & T(~low)) | (below & low)) & mask_of<T>(codes[i] < 4));
    largest = codes[i] > largest ? codes[i] : largest;
  }
  return largest;
}

// channels_last: one small window, n channels.
template <class T>
void gather_cells(const Windows& w, const Place& p, const T* input, const uint8_t* codes, T* out,
                  int n) {
  const Cells ys = cells_inside(w, 0, p.y), xs = cells_inside(w, 1, p.x);
  T found[kLanes] = {};
  for (int32_t m = ys.begin; m < ys.end; ++m) {
    for (int32_t k = xs.begin; k < xs.end; ++k) {
      const int32_t y = ys.start + m * w.dilation[0], x = xs.start + k * w.dilation[1];
      merge_matching<T, uint8_t, false>(input + full_offset(w, p, y, x), codes, found, n,
                                        uint8_t(m * w.kernel[1] + k));
    }
  }
  memcpy(static_cast<void*>(out), found, sizeof(T) * n);
}

// Lines [begin, end) of windows of a contiguous plane, one position at a time.
template <class T, class P>
void gather_places(const Windows& w, const CodeDecoder& decoder, int64_t plane, int32_t begin,
                   int32_t end, const T* input, const P* positions, T* output, int32_t* status) {
  const int64_t sources = int64_t(w.pooled[0]) * w.pooled[1];
  const T* __restrict from = input + plane * w.full[0] * w.full[1];
  const P* __restrict at = positions + plane * sources;
  T* __restrict out = output + plane * sources;
  if constexpr (sizeof(P) == 1) {
    if (CodeDecoder::supports(w)) {
      bool bad = false;
      decoder.each(begin, end, at, [&](const CodeDecoder::Batch& batch) {
        T* __restrict to = out + batch.window;
        if (batch.bad) {
          for (int32_t i = 0; i < batch.n; ++i)
            to[i] = batch.place[i] < 0 ? T(0) : from[batch.place[i]];
          bad = true;
        } else {
          for (int32_t i = 0; i < batch.n; ++i) to[i] = from[batch.place[i]];
        }
      });
      if (bad) report(status, kCodeOutOfRange);
      return;
    }
  }
  memset(static_cast<void*>(out + int64_t(begin) * w.pooled[1]), 0,
         sizeof(T) * (end - begin) * w.pooled[1]);
  each_place(w, decoder, begin, end, at, status,
             [&](int64_t to, int64_t place) { out[to] = from[place]; });
}

// channels_last: a line of windows, one position at a time.
template <class T, class P>
void gather_line(const Windows& w, const Place& line, const T* input, const P* positions, T* output,
                 int32_t* status) {
  const T* plane = input + full_offset(w, line, 0, 0);
  const int64_t at = pooled_offset(w, line, line.y, 0);
  for (int32_t x = 0; x < w.pooled[1]; ++x) {
    for (int64_t c = 0; c < w.channels; ++c) {
      const int64_t i = at + x * w.channels + c;
      const int64_t offset = offset_of_position(w, {line.plane, line.y, x, c}, positions[i]);
      if (offset < 0) report(status, fault_of(positions[i]));
      output[i] = offset < 0 ? T(0) : plane[offset * w.channels + c];
    }
  }
}

// Block of windows of gather_blocks for lines shorter than kShortLine.
constexpr int32_t kBlock = 8;

// gather_2x2 in blocks of N windows. The last may overlap the one before.
template <int N, class T>
SK_HD uint8_t gather_blocks(const T* upper, const T* lower, const uint8_t* codes, T* out,
                            int64_t n) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < n; i += N) {
    const int64_t at = i + N <= n ? i : n - N;
    const uint8_t most = gather_2x2(upper + 2 * at, lower + 2 * at, codes + at, out + at, N);
    largest = most > largest ? most : largest;
  }
  return largest;
}

// channels_last: a line of small windows.
template <class T>
void gather_cells_line(const LineTables& tables, const Place& line, const T* input,
                       const uint8_t* codes, T* output, int32_t* status) {
  const Windows& w = tables.w;
  const int64_t at = pooled_offset(w, line, line.y, 0);
  check_line(tables, line, codes, status);
  for (int32_t x = 0; x < w.pooled[1]; ++x) {
    for (int64_t c = 0; c < w.channels; c += kLanes) {
      const int64_t i = at + x * w.channels + c;
      gather_cells(w, {line.plane, line.y, x, c}, input, codes + i, output + i,
                   lanes_left(c, w.channels));
    }
  }
}

template <class T, class P>
void gather_lines(const Where& where, const Windows& w, const T* input, const P* positions,
                  T* output, int32_t* status, const char* name) {
  const LineTables tables(w);
  const int64_t lines = w.planes * w.pooled[0];
  const bool codes = sizeof(P) == 1, four = w.kernel[0] == 2 && w.kernel[1] == 2;
  if (w.channels > 1) {
    const bool few = codes && int64_t(w.kernel[0]) * w.kernel[1] <= kFewCells;
    parallel_for(
        where, lines,
        [&](int64_t i) {
          const Place line = line_of(i, tables.lines);
          if constexpr (sizeof(P) == 1) {
            if (few) return gather_cells_line(tables, line, input, positions, output, status);
          }
          gather_line(w, line, input, positions, output, status);
        },
        name);
    return;
  }
  if constexpr (sizeof(P) == 1) {
    if (four && tiles_plane(w) && all_inside(w) && w.pooled[1] >= kBlock) {
      parallel_for(
          where, lines,
          [&](int64_t i) {
            const Place line = line_of(i, tables.lines);
            const T* upper = input + full_offset(w, line, 2 * line.y, 0);
            const int64_t at = i * w.pooled[1];
            const T* lower = upper + w.full[1];
            const uint8_t largest =
                w.pooled[1] < kShortLine
                    ? gather_blocks<kBlock>(upper, lower, positions + at, output + at, w.pooled[1])
                    : gather_blocks<kShortLine>(upper, lower, positions + at, output + at,
                                                w.pooled[1]);
            if (largest > 3) report(status, kCodeOutOfRange);
          },
          name);
      return;
    }
  }
  const CodeDecoder decoder(w);
  // Parallel over planes, or over lines if there are fewer planes than threads.
  const int32_t step = w.planes >= where.threads ? w.pooled[0] : 1;
  parallel_for(
      where, step == 1 ? lines : w.planes,
      [&](int64_t i) {
        const Place line = step == 1 ? line_of(i, tables.lines) : Place{i, 0, 0, 0};
        gather_places(w, decoder, line.plane, line.y, line.y + step, input, positions, output,
                      status);
      },
      name);
}

}  // namespace SK_NS
}  // namespace segkernels::pooling
