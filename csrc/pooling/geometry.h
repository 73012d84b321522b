// Geometry of pooling windows: the cells of a window that lie in the plane, and the windows that
// cover a place of the plane. "Full" is the plane under the windows, "pooled" the plane with one
// value a window. A cell is a position in a window; its number in row-major order is its code.
#pragma once

#include "common/hd.h"

namespace segkernels::pooling {

struct Windows {
  int64_t planes;    // images times channels; channels_last: images
  int64_t channels;  // innermost in memory: 1; channels_last: all channels
  // (height, width). Python has checked that coordinates of windows fit 31 bits.
  int32_t full[2], pooled[2], kernel[2], stride[2], padding[2], dilation[2];
};

inline namespace SK_NS {

// A vector of N neighbours in memory.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T lane[N];
};

template <class T, int N>
SK_HD Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
SK_HD void store(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Division by a number known before the launch, as a multiplication, because 64-bit division is a
// function call on the GPU. Exact for values below 2^63.
struct Divisor {
  uint64_t multiplier;
  int32_t shift, value;
};

inline Divisor divisor_of(int32_t value) {
  int32_t shift = 0;
  while (int64_t(1) << shift < value) ++shift;
  const unsigned __int128 one = 1;
  const unsigned __int128 multiplier = ((one << (63 + shift)) + value - 1) / value;
  return {uint64_t(multiplier), shift, value};
}

struct Split {
  int64_t quotient;
  int32_t remainder;
};

SK_HD Split split(int64_t value, const Divisor& by) {
#if defined(__CUDA_ARCH__)
  const uint64_t high = __umul64hi(uint64_t(value) << 1, by.multiplier);
#else
  const unsigned __int128 product = static_cast<unsigned __int128>(value) * 2 * by.multiplier;
  const uint64_t high = uint64_t(product >> 64);
#endif
  const int64_t quotient = int64_t(high >> by.shift);
  return {quotient, int32_t(value - quotient * by.value)};
}

struct Place {
  int64_t plane;
  int32_t y, x;
  int64_t channel;
};

// The lines and columns over which parallel_rows runs.
struct Raster {
  Divisor lines, columns;
};

inline Raster raster_of(int32_t lines, int32_t columns) {
  return {divisor_of(lines > 0 ? lines : 1), divisor_of(columns > 0 ? columns : 1)};
}

inline Raster raster_of(const int32_t (&size)[2]) { return raster_of(size[0], size[1]); }

// Decodes row and block of parallel_rows. Contiguous: a line of a plane and V of its columns.
// channels_last: a place and V of its channels.
template <bool kChannelsLast, int V>
SK_HD Place place_at(int64_t row, int block, const Raster& raster) {
  Place p{0, 0, 0, 0};
  if (kChannelsLast) {
    const Split s = split(row, raster.columns);
    p.x = s.remainder;
    p.channel = int64_t(block) * V;
    row = s.quotient;
  } else {
    p.x = block * V;
  }
  const Split s = split(row, raster.lines);
  p.y = s.remainder;
  p.plane = s.quotient;
  return p;
}

SK_HD int64_t full_offset(const Windows& w, const Place& p, int32_t y, int32_t x) {
  return ((p.plane * w.full[0] + y) * w.full[1] + x) * w.channels + p.channel;
}

SK_HD int64_t pooled_offset(const Windows& w, const Place& p, int32_t y, int32_t x) {
  return ((p.plane * w.pooled[0] + y) * w.pooled[1] + x) * w.channels + p.channel;
}

SK_HD int32_t ceil_div(int32_t a, int32_t b) { return b == 1 ? a : (a + b - 1) / b; }

// The cells [begin, end) of a window that lie in the plane, along one axis. Cell 0 is at `start`.
struct Cells {
  int32_t start, begin, end;
};

SK_HD Cells cells_inside(const Windows& w, int axis, int32_t window) {
  const int32_t start = window * w.stride[axis] - w.padding[axis];
  const int32_t left = w.full[axis] - start;
  const int32_t end = left <= 0 ? 0 : ceil_div(left, w.dilation[axis]);
  return {start, start < 0 ? ceil_div(-start, w.dilation[axis]) : 0,
          end < w.kernel[axis] ? end : w.kernel[axis]};
}

// The windows [first, last] whose extent covers coordinate `at`, along one axis.
struct Covering {
  int32_t first, last;
};

SK_HD Covering windows_over(const Windows& w, int axis, int32_t at) {
  const int32_t from_edge = at + w.padding[axis];
  const int32_t beyond = from_edge - (w.kernel[axis] - 1) * w.dilation[axis];
  const int32_t last = from_edge / w.stride[axis];
  return {beyond <= 0 ? 0 : ceil_div(beyond, w.stride[axis]),
          last < w.pooled[axis] ? last : w.pooled[axis] - 1};
}

// The cell of a window at coordinate `at`, along one axis; -1 if dilation skips it.
SK_HD int32_t cell_at(const Windows& w, int axis, int32_t window, int32_t at) {
  const int32_t offset = at + w.padding[axis] - window * w.stride[axis];
  if (w.dilation[axis] == 1) return offset;
  return offset % w.dilation[axis] == 0 ? offset / w.dilation[axis] : -1;
}

// Whether the windows tile the plane: each place is in one window, or in none at the far edges.
SK_HD bool tiles_plane(const Windows& w) {
  return w.stride[0] == w.kernel[0] && w.stride[1] == w.kernel[1] && w.padding[0] == 0 &&
         w.padding[1] == 0 && w.dilation[0] == 1 && w.dilation[1] == 1;
}

// Whether every window lies in the plane.
SK_HD bool all_inside(const Windows& w) {
  for (int axis = 0; axis < 2; ++axis) {
    const int32_t last = (w.pooled[axis] - 1) * w.stride[axis] - w.padding[axis];
    if (w.padding[axis] > 0) return false;
    if (last + (w.kernel[axis] - 1) * w.dilation[axis] >= w.full[axis]) return false;
  }
  return true;
}

// The coordinates that the code of window (y, x) stands for. False if it is no cell of the window
// or lies outside the plane.
SK_HD bool place_of_code(const Windows& w, int32_t y, int32_t x, int32_t code, int32_t& at_y,
                         int32_t& at_x) {
  const int32_t m = code / w.kernel[1];
  at_y = y * w.stride[0] - w.padding[0] + m * w.dilation[0];
  at_x = x * w.stride[1] - w.padding[1] + (code - m * w.kernel[1]) * w.dilation[1];
  return m < w.kernel[0] && at_y >= 0 && at_y < w.full[0] && at_x >= 0 && at_x < w.full[1];
}

// Whether V neighbours can be loaded at once: they divide the row, and the pointer is aligned.
template <class T>
bool packs(const T* pointer, int64_t row, int v) {
  const uint64_t bytes = sizeof(T) * v;
  return row % v == 0 && reinterpret_cast<uintptr_t>(pointer) % (bytes < 16 ? bytes : 16) == 0;
}

}  // namespace SK_NS

}  // namespace segkernels::pooling
