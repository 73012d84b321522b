// max_unpool2d on the CPU with the loops of scatter_cpu.h and scatter_gather_cpu.h, compiled once
// per instruction set (SK_ISA).
#include "pooling/max_unpool2d.h"
#include "pooling/scatter_gather_cpu.h"

namespace segkernels::pooling {
inline namespace SK_NS {

template <class T>
void unpool_codes(const Where& where, const Windows& w, const UnpoolBuffers& b, const T* input,
                  T* output) {
  const char* name = "max_unpool2d";
  const uint8_t* codes = static_cast<const uint8_t*>(b.positions);
  if (tiles_plane(w)) {
    expand_codes(where, w, input, codes, output, b.status, name);
  } else if (w.channels == 1) {
    scatter_planes<T, uint8_t, false>(where, w, input, codes, output, b.status, name);
  } else {
    scatter_by_place<T, uint8_t, false>(where, w, input, codes, output, name);
    const LineTables tables(w);
    parallel_for(
        where, w.planes * w.pooled[0],
        [&](int64_t line) { check_line(tables, line_of(line, tables.lines), codes, b.status); },
        name);
  }
}

void max_unpool2d_forward(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    const T* input = static_cast<const T*>(b.input);
    T* output = static_cast<T*>(b.output);
    const int64_t* indices = static_cast<const int64_t*>(b.positions);
    const char* name = "max_unpool2d";
    if (!b.wide) {
      unpool_codes(where, w, b, input, output);
    } else if (w.channels == 1) {
      scatter_planes<T, int64_t, false>(where, w, input, indices, output, b.status, name);
    } else {
      scatter_channels(where, w, input, indices, output, b.status, name);
    }
  });
}

void max_unpool2d_backward(const Where& where, const Windows& w, const UnpoolBuffers& b) {
  const char* name = "max_unpool2d_backward";
  with_bits(b.type, [&](auto bits) {
    using T = decltype(bits);
    const T* input = static_cast<const T*>(b.input);
    T* output = static_cast<T*>(b.output);
    if (b.wide) {
      const int64_t* indices = static_cast<const int64_t*>(b.positions);
      gather_lines(where, w, input, indices, output, b.status, name);
    } else {
      const uint8_t* codes = static_cast<const uint8_t*>(b.positions);
      gather_lines(where, w, input, codes, output, b.status, name);
    }
  });
}

}  // namespace SK_NS

template <Isa kIsa>
MaxUnpool2dApi max_unpool2d_loops() {
  return {max_unpool2d_forward, max_unpool2d_backward};
}

template MaxUnpool2dApi max_unpool2d_loops<Isa::SK_ISA>();

}  // namespace segkernels::pooling
