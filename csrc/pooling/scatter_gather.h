// Functors for parallel_rows between pooled values and the plane under their windows:
// - Expand*: each value to the cells of its window that a rule selects, zero to the others, for
//   windows that tile the plane. Parallel over windows; every place is written once.
// - Scatter*: scatter (the last value stays) or scatter-add to the positions of the values, for any
//   windows. Parallel over places, each of which searches the windows that cover it: no atomics.
// - Gather*: the value at the position of each window. Parallel over windows.
//
// A position is a code (uint8_t: a cell of the window) or an index (int64_t: an offset in the
// plane).
#pragma once

#include <type_traits>

#include "common/any16.h"
#include "common/parallel_for.h"
#include "common/scalar.h"
#include "common/status.h"
#include "pooling/geometry.h"

namespace segkernels::pooling {
inline namespace SK_NS {

template <int kBytes>
struct BitsOfSize;
template <>
struct BitsOfSize<2> {
  using type = uint16_t;
};
template <>
struct BitsOfSize<4> {
  using type = uint32_t;
};
template <>
struct BitsOfSize<8> {
  using type = uint64_t;
};

// Unsigned integers that move values without computing with them.
template <int kBytes>
using BitsOf = typename BitsOfSize<kBytes>::type;

template <class F>
void with_bits(ScalarType type, const F& f) {
  with_scalar_type(type, [&](auto scalar) { f(BitsOf<sizeof(scalar)>{}); });
}

// Rules: which cells of its window a value goes to.
struct ByCode {
  const uint8_t* codes;

  bool aligned(int64_t row, int v) const { return packs(codes, row, v); }
  template <int V>
  SK_HD Pack<uint8_t, V> fetch(int64_t at) const {
    return load<uint8_t, V>(codes + at);
  }
  SK_HD static bool picks(uint8_t code, int32_t cell) { return code == cell; }
  SK_HD static bool valid(const Windows& w, int32_t y, int32_t x, uint8_t code) {
    int32_t at_y, at_x;
    return place_of_code(w, y, x, code, at_y, at_x);
  }
};

struct ByCell {
  int32_t cell;

  bool aligned(int64_t, int) const { return true; }
  template <int V>
  SK_HD Pack<int32_t, V> fetch(int64_t) const {
    Pack<int32_t, V> cells;
    for (int i = 0; i < V; ++i) cells.lane[i] = cell;
    return cells;
  }
  SK_HD static bool picks(int32_t wanted, int32_t at) { return wanted == at; }
  SK_HD static bool valid(const Windows&, int32_t, int32_t, int32_t) { return true; }
};

struct EveryCell {
  bool aligned(int64_t, int) const { return true; }
  template <int V>
  SK_HD Pack<uint8_t, V> fetch(int64_t) const {
    return {};
  }
  SK_HD static bool picks(uint8_t, int32_t) { return true; }
  SK_HD static bool valid(const Windows&, int32_t, int32_t, uint8_t) { return true; }
};

// Vectors of 16 bytes a thread; 8-byte values fill the bus without vectors.
template <class T>
constexpr int kVectorChannels = sizeof(T) == 8 ? 1 : 16 / sizeof(T);
template <class T>
constexpr int kVectorColumns = sizeof(T) == 8 ? 1 : 8 / sizeof(T);

// Place of a call of parallel_places: V channels of a place of channels_last, or (V = 1) also a
// place of a contiguous plane.
template <int V>
SK_HD Place place_of(const Windows& w, int64_t row, int block, const Raster& raster) {
  if (V > 1 || w.channels > 1) return place_at<true, V>(row, block, raster);
  return place_at<false, V>(row, block, raster);
}

// f for every place of planes of `height` x `width`, V channels a call.
template <int V = 1, class F>
void parallel_places(const Where& where, const Windows& w, int32_t height, int32_t width,
                     const F& f, const char* name) {
  const int64_t lines = w.planes * height;
  if (w.channels > 1) {
    parallel_rows(where, lines * width, nullptr, int(w.channels / V), f, name);
  } else {
    parallel_rows(where, lines, nullptr, width, f, name);
  }
}

// Contiguous planes, windows two columns wide: V neighbouring windows a call.
template <class T, class Rule, int V>
struct Expand2Columns {
  Windows w;
  Raster raster;
  Rule rule;
  const T* input;
  T* output;
  int32_t* status;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_at<false, V>(row, block, raster);
    const bool is_window = p.y < w.pooled[0];
    const int64_t at = pooled_offset(w, p, is_window ? p.y : 0, p.x);
    const Pack<T, V> values = load<T, V>(input + at);
    const auto held = rule.template fetch<V>(at);
    if (status != nullptr && is_window) {
      for (int i = 0; i < V; ++i) {
        if (!Rule::valid(w, p.y, p.x + i, held.lane[i])) report(status, kCodeOutOfRange);
      }
    }
    for (int32_t m = 0; m < w.kernel[0]; ++m) {
      const int32_t y = p.y * w.kernel[0] + m;
      if (y >= w.full[0]) return;
      Pack<T, 2 * V> out;
      for (int i = 0; i < 2 * V; ++i) {
        const bool picked = is_window && Rule::picks(held.lane[i / 2], 2 * m + i % 2);
        out.lane[i] = picked ? values.lane[i / 2] : T(0);
      }
      store(output + full_offset(w, p, y, 2 * p.x), out);
    }
  }
};

// channels_last: one window and V channels a call.
template <class T, class Rule, int V>
struct ExpandWindow {
  Windows w;
  Raster raster;
  Rule rule;
  const T* input;
  T* output;
  int32_t* status;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_at<true, V>(row, block, raster);
    const bool is_window = p.y < w.pooled[0] && p.x < w.pooled[1];
    const int64_t at = pooled_offset(w, p, is_window ? p.y : 0, is_window ? p.x : 0);
    const Pack<T, V> values = load<T, V>(input + at);
    const auto held = rule.template fetch<V>(at);
    if (status != nullptr && is_window) {
      for (int i = 0; i < V; ++i) {
        if (!Rule::valid(w, p.y, p.x, held.lane[i])) report(status, kCodeOutOfRange);
      }
    }
    for (int32_t m = 0; m < w.kernel[0]; ++m) {
      for (int32_t n = 0; n < w.kernel[1]; ++n) {
        const int32_t y = p.y * w.kernel[0] + m, x = p.x * w.kernel[1] + n;
        if (y >= w.full[0] || x >= w.full[1]) continue;
        Pack<T, V> out;
        for (int i = 0; i < V; ++i) {
          const bool picked = is_window && Rule::picks(held.lane[i], m * w.kernel[1] + n);
          out.lane[i] = picked ? values.lane[i] : T(0);
        }
        store(output + full_offset(w, p, y, x), out);
      }
    }
  }
};

// Contiguous planes, windows of any size: one place a call.
template <class T, class Rule>
struct ExpandPlace {
  Windows w;
  Raster raster;
  Rule rule;
  const T* input;
  T* output;

  SK_HD void operator()(int64_t row, int column) const {
    const Place p = place_at<false, 1>(row, column, raster);
    const int32_t y = p.y / w.kernel[0], x = p.x / w.kernel[1];
    T out = 0;
    if (y < w.pooled[0] && x < w.pooled[1]) {
      const Place window{p.plane, y, x, 0};
      const int64_t at = pooled_offset(w, window, y, x);
      const int32_t cell = (p.y - y * w.kernel[0]) * w.kernel[1] + p.x - x * w.kernel[1];
      if (Rule::picks(rule.template fetch<1>(at).lane[0], cell)) out = input[at];
    }
    output[full_offset(w, p, p.y, p.x)] = out;
  }
};

// Reports a code that is no cell of its window, or lies outside the plane.
struct CheckCodes {
  Windows w;
  Raster raster;
  const uint8_t* codes;
  int32_t* status;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_of<1>(w, row, block, raster);
    const uint8_t code = codes[pooled_offset(w, p, p.y, p.x)];
    if (!ByCode::valid(w, p.y, p.x, code)) report(status, kCodeOutOfRange);
  }
};

// Expands and returns true if the windows tile the plane. `status` null: the codes are valid, and
// so are cells.
template <class T, class Rule>
bool expand_tiles(const Where& where, const Windows& w, const Rule& rule, const T* input, T* output,
                  int32_t* status, const char* name) {
  if (!tiles_plane(w) || w.pooled[0] == 0 || w.pooled[1] == 0) return false;
  // Includes the incomplete windows at the far edges, which have no value.
  const int32_t lines = (w.full[0] + w.kernel[0] - 1) / w.kernel[0];
  const int32_t columns = (w.full[1] + w.kernel[1] - 1) / w.kernel[1];
  const Raster raster = raster_of(lines, columns);
  if (w.channels > 1) {
    if constexpr (kVectorChannels<T> > 1) {
      constexpr int V = kVectorChannels<T>;
      if (packs(input, w.channels, V) && packs(output, w.channels, V) &&
          rule.aligned(w.channels, V)) {
        const ExpandWindow<T, Rule, V> f{w, raster, rule, input, output, status};
        parallel_places<V>(where, w, lines, columns, f, name);
        return true;
      }
    }
    const ExpandWindow<T, Rule, 1> f{w, raster, rule, input, output, status};
    parallel_places(where, w, lines, columns, f, name);
    return true;
  }
  if constexpr (kVectorColumns<T> > 1) {
    constexpr int V = kVectorColumns<T>;
    if (w.kernel[1] == 2 && w.full[1] == 2 * w.pooled[1] && packs(output, w.full[1], 2 * V) &&
        packs(input, w.pooled[1], V) && rule.aligned(w.pooled[1], V)) {
      const Expand2Columns<T, Rule, V> f{w, raster, rule, input, output, status};
      parallel_rows(where, w.planes * lines, nullptr, w.pooled[1] / V, f, name);
      return true;
    }
  }
  const ExpandPlace<T, Rule> f{w, raster_of(w.full), rule, input, output};
  parallel_places(where, w, w.full[0], w.full[1], f, name);
  if constexpr (std::is_same_v<Rule, ByCode>) {
    const CheckCodes check{w, raster_of(w.pooled), rule.codes, status};
    if (status != nullptr) parallel_places(where, w, w.pooled[0], w.pooled[1], check, name);
  }
  return true;
}

SK_HD bool points_here(uint8_t code, int32_t cell, int64_t) { return code == cell; }
SK_HD bool points_here(int64_t index, int32_t, int64_t place) { return index == place; }

template <class T, bool kSum>
struct LastOrSum {
  T value;
  SK_HD void add(T other, const Format<T>&) { value = other; }
  SK_HD T get(const Format<T>&) const { return value; }
};

template <class T>
struct LastOrSum<T, true> {
  Acc<T> value;
  SK_HD void add(T other, const Format<T>& format) { value += format.wide(other); }
  SK_HD T get(const Format<T>& format) const { return format.narrow(value); }
};

// Any windows: one place and V channels a call.
template <class T, class P, bool kSum, int V>
struct ScatterWindows {
  Windows w;
  Raster raster;
  const T* input;
  const P* positions;
  T* output;
  Format<T> format;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_of<V>(w, row, block, raster);
    const Covering ys = windows_over(w, 0, p.y), xs = windows_over(w, 1, p.x);
    const int64_t here = int64_t(p.y) * w.full[1] + p.x;
    LastOrSum<T, kSum> found[V];
    for (int i = 0; i < V; ++i) found[i] = {};
    for (int32_t y = ys.first; y <= ys.last; ++y) {
      const int32_t m = cell_at(w, 0, y, p.y);
      if (m < 0) continue;
      for (int32_t x = xs.first; x <= xs.last; ++x) {
        const int32_t n = cell_at(w, 1, x, p.x);
        if (n < 0) continue;
        const int64_t at = pooled_offset(w, p, y, x);
        const Pack<P, V> position = load<P, V>(positions + at);
        const Pack<T, V> value = load<T, V>(input + at);
        for (int i = 0; i < V; ++i) {
          if (points_here(position.lane[i], m * w.kernel[1] + n, here))
            found[i].add(value.lane[i], format);
        }
      }
    }
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) out.lane[i] = found[i].get(format);
    store(output + full_offset(w, p, p.y, p.x), out);
  }
};

// Scatters vectors of channels, and returns true, if the tensors allow it.
template <class T, class P, bool kSum>
bool scatter_vectors(const Where& where, const Windows& w, const T* input, const P* positions,
                     T* output, const Format<T>& format, const char* name) {
  constexpr int V = kVectorChannels<T>;
  if constexpr (V > 1) {
    if (w.channels == 1 || !packs(input, w.channels, V) || !packs(output, w.channels, V) ||
        !packs(positions, w.channels, V)) {
      return false;
    }
    const ScatterWindows<T, P, kSum, V> f{w, raster_of(w.full), input, positions, output, format};
    parallel_places<V>(where, w, w.full[0], w.full[1], f, name);
  }
  return V > 1;
}

template <class T, class P, bool kSum>
void scatter_places(const Where& where, const Windows& w, const T* input, const P* positions,
                    T* output, const Format<T>& format, const char* name) {
  const ScatterWindows<T, P, kSum, 1> f{w, raster_of(w.full), input, positions, output, format};
  parallel_places(where, w, w.full[0], w.full[1], f, name);
}

template <class T, class P, bool kSum>
void scatter_windows(const Where& where, const Windows& w, const T* input, const P* positions,
                     T* output, const char* name) {
  if (scatter_vectors<T, P, kSum>(where, w, input, positions, output, {}, name)) return;
  scatter_places<T, P, kSum>(where, w, input, positions, output, {}, name);
}

// 2x2 windows that tile a contiguous plane without a last odd column.
SK_HD bool tiled_2x2(const Windows& w) {
  return tiles_plane(w) && w.kernel[0] == 2 && w.kernel[1] == 2 && w.full[1] == 2 * w.pooled[1] &&
         w.full[0] >= 2 * w.pooled[0];
}

// V neighbouring windows of `tiled_2x2`: loads all cells as vectors and selects.
template <class T, int V>
struct Gather2x2 {
  Windows w;
  Raster raster;
  const T* input;
  const uint8_t* codes;
  T* output;
  int32_t* status;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_at<false, V>(row, block, raster);
    const int64_t at = pooled_offset(w, p, p.y, p.x);
    const Pack<uint8_t, V> code = load<uint8_t, V>(codes + at);
    const T* from = input + full_offset(w, p, 2 * p.y, 2 * p.x);
    const Pack<T, 2 * V> upper = load<T, 2 * V>(from), lower = load<T, 2 * V>(from + w.full[1]);
    Pack<T, V> out;
    for (int i = 0; i < V; ++i) {
      const int c = code.lane[i];
      const T above = c & 1 ? upper.lane[2 * i + 1] : upper.lane[2 * i];
      const T below = c & 1 ? lower.lane[2 * i + 1] : lower.lane[2 * i];
      out.lane[i] = c > 3 ? T(0) : c > 1 ? below : above;
      if (c > 3) report(status, kCodeOutOfRange);
    }
    store(output + at, out);
  }
};

// The offset of a position in the plane; -1 outside it.
SK_HD int64_t offset_of_position(const Windows& w, const Place& p, uint8_t code) {
  int32_t y, x;
  return place_of_code(w, p.y, p.x, code, y, x) ? int64_t(y) * w.full[1] + x : -1;
}

SK_HD int64_t offset_of_position(const Windows& w, const Place&, int64_t index) {
  return index >= 0 && index < int64_t(w.full[0]) * w.full[1] ? index : -1;
}

SK_HD StatusCode fault_of(uint8_t) { return kCodeOutOfRange; }
SK_HD StatusCode fault_of(int64_t) { return kIndexOutOfRange; }

// Any windows: one window and one channel a call.
template <class T, class P>
struct GatherWindow {
  Windows w;
  Raster raster;
  const T* input;
  const P* positions;
  T* output;
  int32_t* status;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_of<1>(w, row, block, raster);
    const int64_t at = pooled_offset(w, p, p.y, p.x);
    const int64_t offset = offset_of_position(w, p, positions[at]);
    if (offset < 0) report(status, fault_of(positions[at]));
    output[at] = offset < 0 ? T(0) : input[full_offset(w, p, 0, 0) + offset * w.channels];
  }
};

// channels_last, small windows: one window and V channels a call. Loads all cells as vectors and
// selects.
template <class T, int V>
struct GatherCells {
  Windows w;
  Raster raster;
  const T* input;
  const uint8_t* codes;
  T* output;
  int32_t* status;

  SK_HD void operator()(int64_t row, int block) const {
    const Place p = place_at<true, V>(row, block, raster);
    const Cells ys = cells_inside(w, 0, p.y), xs = cells_inside(w, 1, p.x);
    const int64_t at = pooled_offset(w, p, p.y, p.x);
    const Pack<uint8_t, V> code = load<uint8_t, V>(codes + at);
    Pack<T, V> out;
    bool found[V];
    for (int i = 0; i < V; ++i) {
      out.lane[i] = T(0);
      found[i] = false;
    }
    for (int32_t m = ys.begin; m < ys.end; ++m) {
      const int32_t y = ys.start + m * w.dilation[0];
      for (int32_t n = xs.begin; n < xs.end; ++n) {
        const int32_t x = xs.start + n * w.dilation[1];
        const Pack<T, V> cell = load<T, V>(input + full_offset(w, p, y, x));
        for (int i = 0; i < V; ++i) {
          const bool here = code.lane[i] == m * w.kernel[1] + n;
          out.lane[i] = here ? cell.lane[i] : out.lane[i];
          found[i] |= here;
        }
      }
    }
    bool all = true;
    for (int i = 0; i < V; ++i) all &= found[i];
    if (!all) report(status, kCodeOutOfRange);
    store(output + at, out);
  }
};

// Above this many cells GatherCells would load mostly what it does not need.
constexpr int32_t kFewCells = 9;

template <class T, class P>
void gather(const Where& where, const Windows& w, const T* input, const P* positions, T* output,
            int32_t* status, const char* name) {
  const Raster raster = raster_of(w.pooled);
  if constexpr (sizeof(P) == 1 && kVectorChannels<T> > 1) {
    constexpr int V = kVectorChannels<T>, kWindows = kVectorColumns<T>;
    if (w.channels == 1 && tiled_2x2(w) && packs(input, w.full[1], 2 * kWindows) &&
        packs(output, w.pooled[1], kWindows) && packs(positions, w.pooled[1], kWindows)) {
      const Gather2x2<T, kWindows> f{w, raster, input, positions, output, status};
      return parallel_rows(where, w.planes * w.pooled[0], nullptr, w.pooled[1] / kWindows, f, name);
    }
    if (w.channels > 1 && int64_t(w.kernel[0]) * w.kernel[1] <= kFewCells &&
        packs(input, w.channels, V) && packs(output, w.channels, V) &&
        packs(positions, w.channels, V)) {
      const GatherCells<T, V> f{w, raster, input, positions, output, status};
      return parallel_places<V>(where, w, w.pooled[0], w.pooled[1], f, name);
    }
  }
  const GatherWindow<T, P> f{w, raster, input, positions, output, status};
  parallel_places(where, w, w.pooled[0], w.pooled[1], f, name);
}

}  // namespace SK_NS
}  // namespace segkernels::pooling
