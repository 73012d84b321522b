// interpolate on the CPU, compiled once per instruction set (SK_ISA). Forward: interpolates every
// input row along the width once and keeps it while outputs need it; an output row is a weighted
// sum of such rows. Backward: the transpose. Parallel over chunks of rows; no value depends on the
// number of threads.
#include <string.h>

#include "common/lanes.h"
#include "common/parallel_for.h"
#include "interpolate/interpolate_cpu.h"

namespace segkernels {
inline namespace SK_ISA {

template <class T>
constexpr int kWidth = kVectorBytes / int(sizeof(Acc<T>));  // lanes of a vector

template <class T>
const Acc<T>* widen_row(const T* row, int64_t n, Acc<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return row;
  } else {
    widen_line(row, buffer, n);
    return buffer;
  }
}

template <class A, int K>
void along_width(const ForwardTables<A>& t, const A* row, A* out) {
  const int64_t width = t.g.x.out, inner = t.g.inner;
  const int32_t* position = t.x.position;
  const A* weight = t.x.weight;
  if (inner == 1) {
#pragma GCC ivdep
    for (int64_t x = 0; x < width; ++x) {
      A sum = weight[x] * row[position[x]];
      for (int k = 1; k < K; ++k) sum = sum + weight[k * width + x] * row[position[k * width + x]];
      out[x] = sum;
    }
    return;
  }
  for (int64_t x = 0; x < width; ++x, out += inner) {
    const A* from[K];
    A w[K];
    for (int k = 0; k < K; ++k) {
      from[k] = row + position[k * width + x] * inner;
      w[k] = weight[k * width + x];
    }
    for (int64_t c = 0; c < inner; ++c) {
      A sum = w[0] * from[0][c];
      for (int k = 1; k < K; ++k) sum = sum + w[k] * from[k][c];
      out[c] = sum;
    }
  }
}

template <class T, int K>
void blend(const Acc<T>* const* rows, const Acc<T>* weight, T* out, int64_t n) {
  const Acc<T>* r[K];
  Acc<T> w[K];
  for (int k = 0; k < K; ++k) {
    r[k] = rows[k];
    w[k] = weight[k];
  }
  if (sizeof(T) == 2 && n >= kWidth<T>) {
    each_block<kWidth<T>>(n, [&](auto count, int64_t first) {
      for (int64_t i = first; i < first + count * kWidth<T>; i += kWidth<T>) {
        auto sum = w[0] * load_lanes<kWidth<T>>(r[0] + i);
        for (int k = 1; k < K; ++k) sum = sum + w[k] * load_lanes<kWidth<T>>(r[k] + i);
        store_narrow<kWidth<T>>(out + i, sum);
      }
    });
    return;
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    Acc<T> sum = w[0] * r[0][i];
    for (int k = 1; k < K; ++k) sum = sum + w[k] * r[k][i];
    narrow(sum, out[i]);
  }
}

// The channels of a bilinear output pixel from its four input pixels, without keeping rows.
template <class T>
void blend_pixels(const ForwardTables<Acc<T>>& t, const T* upper, const T* lower, Acc<T> above,
                  Acc<T> below, T* out) {
  using A = Acc<T>;
  constexpr int W = kWidth<T>;
  const int64_t width = t.g.x.out, inner = t.g.inner;
  for (int64_t x = 0; x < width; ++x, out += inner) {
    const int64_t left = t.x.position[x] * inner, right = t.x.position[width + x] * inner;
    const A w0 = t.x.weight[x], w1 = t.x.weight[width + x];
    each_block<W>(inner, [&](auto count, int64_t first) {
      for (int64_t c = first; c < first + count * W; c += W) {
        auto top = w0 * load_wide<W>(upper + left + c);
        top = top + w1 * load_wide<W>(upper + right + c);
        auto bottom = w0 * load_wide<W>(lower + left + c);
        bottom = bottom + w1 * load_wide<W>(lower + right + c);
        auto sum = above * top;
        sum = sum + below * bottom;
        store_narrow<W>(out + c, sum);
      }
    });
  }
}

template <class T>
void forward_pixels(const Where& where, const ForwardTables<Acc<T>>& t, const T* input, T* output) {
  const int64_t in_row = int64_t(t.g.x.in) * t.g.inner, out_row = int64_t(t.g.x.out) * t.g.inner;
  const int64_t height = t.g.y.out;
  parallel_chunks(where, t.g.planes * height, [&](int, Pieces& pieces) {
    while (pieces.next()) {
      for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        const int64_t y = i % height;
        const T* plane = input + i / height * t.g.y.in * in_row;
        blend_pixels<T>(t, plane + t.y.position[y] * in_row,
                        plane + t.y.position[height + y] * in_row, t.y.weight[y],
                        t.y.weight[height + y], output + i * out_row);
      }
    }
  });
}

// Whether to keep rows that are interpolated along the width: outputs share them, and they fit the
// cache.
template <class T>
bool rows_are_shared(const ForwardTables<Acc<T>>& t) {
  constexpr int64_t kMost = 128 * 1024;
  return t.g.y.out > t.g.y.in && 2 * t.row_stride() * int64_t(sizeof(Acc<T>)) <= kMost;
}

template <class T, int K>
void forward_rows(const Where& where, const ForwardTables<Acc<T>>& t, const T* input, T* output) {
  using A = Acc<T>;
  const int64_t in_row = int64_t(t.g.x.in) * t.g.inner, out_row = int64_t(t.g.x.out) * t.g.inner;
  const int64_t height = t.g.y.out;
  parallel_chunks(where, t.g.planes * height, [&](int worker, Pieces& pieces) {
    A* rows = t.rows + worker * K * t.row_stride();
    A* widened = t.widened + worker * t.widened_stride();
    int64_t held[K];
    for (int k = 0; k < K; ++k) held[k] = -1;
    while (pieces.next()) {
      for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        const int64_t plane = i / height, y = i % height;
        const A* tap_row[K];
        A weight[K];
        for (int k = 0; k < K; ++k) {
          const int64_t source = plane * t.g.y.in + t.y.position[k * height + y];
          // The taps are at most K neighbouring rows, so no two share a slot.
          const int slot = int(t.y.position[k * height + y] % K);
          A* row = rows + slot * t.row_stride();
          if (held[slot] != source) {
            along_width<A, K>(t, widen_row(input + source * in_row, in_row, widened), row);
            held[slot] = source;
          }
          tap_row[k] = row;
          weight[k] = t.y.weight[k * height + y];
        }
        blend<T, K>(tap_row, weight, output + i * out_row, out_row);
      }
    }
  });
}

// One tap: copies values, and repeated rows as a whole.
template <class T>
void copy_rows(const Where& where, const ForwardTables<Acc<T>>& t, const T* input, T* output) {
  const int64_t in_row = int64_t(t.g.x.in) * t.g.inner, width = t.g.x.out, inner = t.g.inner;
  const int64_t out_row = width * inner, height = t.g.y.out;
  parallel_chunks(where, t.g.planes * height, [&](int, Pieces& pieces) {
    while (pieces.next()) {
      for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        const int64_t plane = i / height, y = i % height;
        T* out = output + i * out_row;
        if (i > pieces.begin && y > 0 && t.y.position[y] == t.y.position[y - 1]) {
          memcpy(out, out - out_row, size_t(out_row) * sizeof(T));
          continue;
        }
        const T* row = input + (plane * t.g.y.in + t.y.position[y]) * in_row;
        if (t.g.x.kind == kIdentity) {
          memcpy(out, row, size_t(out_row) * sizeof(T));
        } else if (inner == 1) {
#pragma GCC ivdep
          for (int64_t x = 0; x < width; ++x) out[x] = row[t.x.position[x]];
        } else {
          for (int64_t x = 0; x < width; ++x) {
            memcpy(out + x * inner, row + t.x.position[x] * inner, size_t(inner) * sizeof(T));
          }
        }
      }
    }
  });
}

// sum += weighted rows, N at a time to save loads and stores of the sum. `first`: sum = instead.
template <class T, int N>
void add_rows(const T* const* rows, const Acc<T>* weight, Acc<T>* sum, int64_t n, bool first) {
  const T* r[N];
  Acc<T> w[N];
  for (int k = 0; k < N; ++k) {
    r[k] = rows[k];
    w[k] = weight[k];
  }
  int64_t i = 0;
  if constexpr (sizeof(T) == 2) {
    constexpr int W = kWidth<T>;
    for (; i + W <= n; i += W) {
      auto total = w[0] * load_wide<W>(r[0] + i);
      if (!first) total = load_lanes<W>(sum + i) + total;
      for (int k = 1; k < N; ++k) total = total + w[k] * load_wide<W>(r[k] + i);
      store_lanes(sum + i, total);
    }
  }
#pragma GCC ivdep
  for (; i < n; ++i) {
    Acc<T> total = first ? w[0] * widen(r[0][i]) : sum[i] + w[0] * widen(r[0][i]);
    for (int k = 1; k < N; ++k) total = total + w[k] * widen(r[k][i]);
    sum[i] = total;
  }
}

template <class T>
void along_height(const BackwardTables<Acc<T>>& t, const T* grad, int64_t j, Acc<T>* sum) {
  const int64_t out_row = int64_t(t.g.x.out) * t.g.inner;
  const int64_t count = t.y.offset[j + 1] - t.y.offset[j];
  const Acc<T>* weight = t.y.weight + t.y.offset[j];
  const T* from = grad + t.y.begin[j] * out_row;
  for (int64_t q = 0; q < count;) {
    const T* rows[4] = {from + q * out_row, from + (q + 1) * out_row, from + (q + 2) * out_row,
                        from + (q + 3) * out_row};
    switch (count - q) {
      case 1:
        add_rows<T, 1>(rows, weight + q, sum, out_row, q == 0);
        break;
      case 2:
        add_rows<T, 2>(rows, weight + q, sum, out_row, q == 0);
        break;
      case 3:
        add_rows<T, 3>(rows, weight + q, sum, out_row, q == 0);
        break;
      default:
        add_rows<T, 4>(rows, weight + q, sum, out_row, q == 0);
    }
    q += 4;
  }
}

// Eight partial sums, so that the loop vectorises.
template <class A>
A dot(const A* a, const A* b, int64_t n) {
  if (n < 16) {
    A sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
  }
  A partial[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) partial[k] += a[i + k] * b[i + k];
  }
  A sum = ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
          ((partial[4] + partial[5]) + (partial[6] + partial[7]));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// The channels of an input pixel: a weighted sum over its readers, which are neighbours.
template <class T>
void gather_channels(const Acc<T>* weight, const Acc<T>* from, int64_t count, int64_t inner,
                     T* out) {
  constexpr int W = kWidth<T>;
  if (inner < W) {
    for (int64_t c = 0; c < inner; ++c) {
      Acc<T> sum = 0;
      for (int64_t q = 0; q < count; ++q) sum += weight[q] * from[q * inner + c];
      narrow(sum, out[c]);
    }
    return;
  }
  each_block<W>(inner, [&](auto vectors, int64_t c) {
    Vec<Acc<T>, W> sum[vectors] = {};
    for (int64_t q = 0; q < count; ++q) {
      for (int i = 0; i < vectors; ++i) {
        sum[i] += weight[q] * load_lanes<W>(from + q * inner + c + i * W);
      }
    }
    for (int i = 0; i < vectors; ++i) store_narrow<W>(out + c + i * W, sum[i]);
  });
}

// Inputs [first, first + n) of a row without channels, from their padded readers.
template <class A>
void gather_padded(const BackwardTables<A>& t, const A* sums, int64_t first, int64_t n, A* out) {
  const int64_t width = t.g.x.in;
  const int most = t.most;
  const A* weight = t.weight + first;
  const int32_t* reader = t.reader + first;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    A sum = A(0);
    for (int q = 0; q < most; ++q) {
      // A padding reader has weight 0, but its value may be NaN.
      const A w = weight[q * width + j], v = sums[reader[q * width + j]];
      sum += w == A(0) ? A(0) : w * v;
    }
    out[j] = sum;
  }
}

// Any number of readers.
template <class T>
void gather_width(const BackwardTables<Acc<T>>& t, const Acc<T>* sums, T* out) {
  using A = Acc<T>;
  const int64_t inner = t.g.inner, width = t.g.x.in;
  for (int64_t j = 0; j < width; ++j) {
    const int64_t count = t.x.offset[j + 1] - t.x.offset[j];
    const A* weight = t.x.weight + t.x.offset[j];
    const A* from = sums + t.x.begin[j] * inner;
    if (inner == 1) {
      narrow(dot(weight, from, count), out[j]);
    } else {
      gather_channels<T>(weight, from, count, inner, out + j * inner);
    }
  }
}

// One tap and an integer ratio: sums of N adjacent values.
template <int N, class A>
void sum_adjacent(const A* sums, int64_t n, A* out) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    A sum = sums[j * N];
    for (int q = 1; q < N; ++q) sum += sums[j * N + q];
    out[j] = sum;
  }
}

// One tap: sums a pixel's channels over its readers in memory.
template <class T>
void sum_pixels(const T* from, int64_t rows, int64_t row, int64_t columns, int64_t inner, T* out) {
  constexpr int W = kWidth<T>;
  if (inner < W) {
    for (int64_t c = 0; c < inner; ++c) {
      Acc<T> sum = 0;
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < columns; ++x) sum += widen(from[y * row + x * inner + c]);
      }
      narrow(sum, out[c]);
    }
    return;
  }
  each_block<W>(inner, [&](auto vectors, int64_t c) {
    Vec<Acc<T>, W> sum[vectors] = {};
    for (int64_t y = 0; y < rows; ++y) {
      const T* pixel = from + y * row + c;
      for (int64_t x = 0; x < columns; ++x, pixel += inner) {
        for (int i = 0; i < vectors; ++i) sum[i] += load_wide<W>(pixel + i * W);
      }
    }
    for (int i = 0; i < vectors; ++i) store_narrow<W>(out + c + i * W, sum[i]);
  });
}

template <class T>
void gather_pixels(const BackwardTables<Acc<T>>& t, const T* grad, int64_t row, T* out) {
  const int64_t inner = t.g.inner, out_row = int64_t(t.g.x.out) * inner;
  const int64_t rows = t.y.offset[row + 1] - t.y.offset[row];
  const T* from = grad + t.y.begin[row] * out_row;
  for (int64_t j = 0; j < t.g.x.in; ++j) {
    const int64_t columns = t.x.offset[j + 1] - t.x.offset[j];
    sum_pixels<T>(from + t.x.begin[j] * inner, rows, out_row, columns, inner, out + j * inner);
  }
}

// One tap, and no input has two readers: scatters the outputs' values to their inputs.
template <class T>
void scatter_row(const BackwardTables<Acc<T>>& t, const T* from, T* out) {
  memset(static_cast<void*>(out), 0, size_t(t.g.x.in) * sizeof(T));
  for (int32_t x = 0; x < t.g.x.out; ++x) {
    if constexpr (sizeof(T) == 2) {
      const uint16_t bits = from[x].bits;
      out[t.source[x]].bits = bits == 0x8000 ? uint16_t(0) : bits;  // as 0 + -0
    } else {
      out[t.source[x]] = T(0) + from[x];
    }
  }
}

// Inputs [first, first + n) of a row without channels. `step`: the ratio, or 0.
template <class A>
void gather_block(const BackwardTables<A>& t, int step, const A* sums, int64_t first, int64_t n,
                  A* out) {
  switch (step) {
    case 1:
      return sum_adjacent<1>(sums + first, n, out);
    case 2:
      return sum_adjacent<2>(sums + 2 * first, n, out);
    case 3:
      return sum_adjacent<3>(sums + 3 * first, n, out);
    case 4:
      return sum_adjacent<4>(sums + 4 * first, n, out);
    case 8:
      return sum_adjacent<8>(sums + 8 * first, n, out);
    default:
      return gather_padded(t, sums, first, n, out);
  }
}

template <class T>
void gather_row(const BackwardTables<Acc<T>>& t, int step, const Acc<T>* sums, T* out) {
  const int64_t n = t.g.x.in;
  const bool whole = (step >= 1 && step <= 4) || step == 8;
  if (!whole && t.most == 0) return gather_width<T>(t, sums, out);
  if constexpr (sizeof(T) == 2) {
    constexpr int64_t kBlock = 64;
    float block[kBlock];
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t count = n - first < kBlock ? n - first : kBlock;
      gather_block(t, step, sums, first, count, block);
      narrow_line(block, out + first, count);
    }
  } else {
    gather_block(t, step, sums, 0, n, out);
  }
}

template <class T>
void backward_rows(const Where& where, const BackwardTables<Acc<T>>& t, const T* grad_output,
                   T* grad_input) {
  const int64_t in_row = int64_t(t.g.x.in) * t.g.inner, out_row = int64_t(t.g.x.out) * t.g.inner;
  const int64_t height = t.g.y.in;
  const int step = t.g.inner == 1 ? t.step() : 0;
  parallel_chunks(where, t.g.planes * height, [&](int worker, Pieces& pieces) {
    Acc<T>* sums = t.sums + worker * t.row_stride();
    while (pieces.next()) {
      for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        const int64_t j = i % height;
        if (t.y.offset[j + 1] == t.y.offset[j]) {  // no output reads it
          memset(grad_input + i * in_row, 0, size_t(in_row) * sizeof(T));
          continue;
        }
        const T* grad = grad_output + i / height * t.g.y.out * out_row;
        if (t.taps == 1 && t.g.inner > 1) {
          gather_pixels<T>(t, grad, j, grad_input + i * in_row);
          continue;
        }
        if (t.sparse && t.y.offset[j + 1] - t.y.offset[j] == 1) {
          scatter_row<T>(t, grad + t.y.begin[j] * out_row, grad_input + i * in_row);
          continue;
        }
        along_height<T>(t, grad, j, sums);
        gather_row(t, step, sums, grad_input + i * in_row);
      }
    }
  });
}

}  // namespace SK_ISA

template <Isa kIsa, class T>
void InterpolateLoops<kIsa, T>::forward(const Where& where, const ForwardTables<Acc<T>>& t,
                                        const T* input, T* output) {
  if (t.taps == 1) {
    copy_rows<T>(where, t, input, output);
  } else if (t.taps == 2 && t.g.inner >= kWidth<T> && !rows_are_shared<T>(t)) {
    forward_pixels<T>(where, t, input, output);
  } else if (t.taps == 2) {
    forward_rows<T, 2>(where, t, input, output);
  } else {
    forward_rows<T, 4>(where, t, input, output);
  }
}

template <Isa kIsa, class T>
void InterpolateLoops<kIsa, T>::backward(const Where& where, const BackwardTables<Acc<T>>& t,
                                         const T* grad_output, T* grad_input) {
  backward_rows<T>(where, t, grad_output, grad_input);
}

template struct InterpolateLoops<Isa::SK_ISA, Half>;
template struct InterpolateLoops<Isa::SK_ISA, BFloat16>;
template struct InterpolateLoops<Isa::SK_ISA, float>;
template struct InterpolateLoops<Isa::SK_ISA, double>;

}  // namespace segkernels
