// interpolate on the CPU, row by row, compiled once per instruction set (SK_ISA). Forward: every
// input row is interpolated along the width once and kept while outputs need it; outputs are then
// sums of whole rows. Backward: the other way round. Parallel over rows in chunks, one a thread; no
// value depends on the cut.
#include <string.h>

#include "interpolate/chunks.h"
#include "interpolate/rows.h"

namespace segkernels {
inline namespace SK_ISA {

template <class T>
const Acc<T>* widen_row(const T* row, int64_t n, Acc<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return row;
  } else {
    for (int64_t i = 0; i < n; ++i) buffer[i] = widen(row[i]);
    return buffer;
  }
}

template <class A, int K>
void along_width(const ForwardRows<A>& p, const A* row, A* out) {
  const int64_t width = p.g.x.out, inner = p.g.inner;
  const int32_t* position = p.x.position;
  const A* weight = p.x.weight;
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
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    Acc<T> sum = w[0] * r[0][i];
    for (int k = 1; k < K; ++k) sum = sum + w[k] * r[k][i];
    narrow(sum, out[i]);
  }
}

template <class T, int K>
void forward_rows(const Where& where, const ForwardRows<Acc<T>>& p, const T* input, T* output) {
  using A = Acc<T>;
  const int64_t in_row = int64_t(p.g.x.in) * p.g.inner, out_row = int64_t(p.g.x.out) * p.g.inner;
  const int64_t height = p.g.y.out;
  parallel_chunks(where, p.g.planes * height, [&](int64_t thread, int64_t begin, int64_t end) {
    A* rows = p.rows + thread * K * p.row_stride();
    A* widened = p.widened + thread * p.widened_stride();
    int64_t held[K];
    for (int k = 0; k < K; ++k) held[k] = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / height, y = i % height;
      const A* tap_row[K];
      A weight[K];
      for (int k = 0; k < K; ++k) {
        const int64_t source = plane * p.g.y.in + p.y.position[k * height + y];
        // The taps are at most K neighbouring rows: no two of them share a slot.
        const int slot = int(p.y.position[k * height + y] % K);
        A* row = rows + slot * p.row_stride();
        if (held[slot] != source) {
          along_width<A, K>(p, widen_row(input + source * in_row, in_row, widened), row);
          held[slot] = source;
        }
        tap_row[k] = row;
        weight[k] = p.y.weight[k * height + y];
      }
      blend<T, K>(tap_row, weight, output + i * out_row, out_row);
    }
  });
}

// One tap: values are copied, and equal rows after the first as a whole.
template <class T>
void copy_rows(const Where& where, const ForwardRows<Acc<T>>& p, const T* input, T* output) {
  const int64_t in_row = int64_t(p.g.x.in) * p.g.inner, width = p.g.x.out, inner = p.g.inner;
  const int64_t out_row = width * inner, height = p.g.y.out;
  parallel_chunks(where, p.g.planes * height, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / height, y = i % height;
      T* out = output + i * out_row;
      if (i > begin && y > 0 && p.y.position[y] == p.y.position[y - 1]) {
        memcpy(out, out - out_row, size_t(out_row) * sizeof(T));
        continue;
      }
      const T* row = input + (plane * p.g.y.in + p.y.position[y]) * in_row;
      if (p.g.x.kind == kIdentity) {
        memcpy(out, row, size_t(out_row) * sizeof(T));
      } else if (inner == 1) {
#pragma GCC ivdep
        for (int64_t x = 0; x < width; ++x) out[x] = row[p.x.position[x]];
      } else {
        for (int64_t x = 0; x < width; ++x) {
          memcpy(out + x * inner, row + p.x.position[x] * inner, size_t(inner) * sizeof(T));
        }
      }
    }
  });
}

// sum += the weighted rows, four at a time so that the sum is read and written less often; `first`
// sets it instead.
template <class T, int N>
void add_rows(const T* const* rows, const Acc<T>* weight, Acc<T>* sum, int64_t n, bool first) {
  const T* r[N];
  Acc<T> w[N];
  for (int k = 0; k < N; ++k) {
    r[k] = rows[k];
    w[k] = weight[k];
  }
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    Acc<T> total = first ? w[0] * widen(r[0][i]) : sum[i] + w[0] * widen(r[0][i]);
    for (int k = 1; k < N; ++k) total = total + w[k] * widen(r[k][i]);
    sum[i] = total;
  }
}

template <class T>
void along_height(const BackwardRows<Acc<T>>& p, const T* grad, int64_t j, Acc<T>* sum) {
  const int64_t out_row = int64_t(p.g.x.out) * p.g.inner;
  const int64_t count = p.y.offset[j + 1] - p.y.offset[j];
  const Acc<T>* weight = p.y.weight + p.y.offset[j];
  const T* from = grad + p.y.begin[j] * out_row;
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

// Eight sums side by side, which vectorise, then one.
template <class A>
A dot(const A* a, const A* b, int64_t n) {
  if (n < 16) {
    A sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
  }
  A part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) part[k] += a[i + k] * b[i + k];
  }
  A sum = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// sum[i] of n <= N channels over neighbouring readers.
template <class T, int N>
void gather_channels(const Acc<T>* weight, const Acc<T>* from, int64_t count, int64_t inner,
                     T* out) {
  Acc<T> sum[N] = {};
  for (int64_t q = 0; q < count; ++q, from += inner) {
    for (int i = 0; i < N; ++i) sum[i] += weight[q] * from[i];
  }
  for (int i = 0; i < N; ++i) narrow(sum[i], out[i]);
}

template <class T>
void gather_width(const BackwardRows<Acc<T>>& p, const Acc<T>* sums, T* out) {
  using A = Acc<T>;
  const int64_t inner = p.g.inner, width = p.g.x.in;
  if (p.most > 0) {
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      A sum = A(0);
      for (int q = 0; q < p.most; ++q) {
        // The place of a reader that is not there may hold a NaN.
        const A w = p.weight[q * width + j], v = sums[p.reader[q * width + j]];
        sum += w == A(0) ? A(0) : w * v;
      }
      narrow(sum, out[j]);
    }
    return;
  }
  for (int64_t j = 0; j < width; ++j) {
    const int64_t count = p.x.offset[j + 1] - p.x.offset[j];
    const A* weight = p.x.weight + p.x.offset[j];
    const A* from = sums + p.x.begin[j] * inner;
    if (inner == 1) {
      narrow(dot(weight, from, count), out[j]);
      continue;
    }
    int64_t c = 0;
    T* to = out + j * inner;
    for (; c + 32 <= inner; c += 32) gather_channels<T, 32>(weight, from + c, count, inner, to + c);
    for (; c + 8 <= inner; c += 8) gather_channels<T, 8>(weight, from + c, count, inner, to + c);
    for (; c < inner; ++c) gather_channels<T, 1>(weight, from + c, count, inner, to + c);
  }
}

// One tap and a whole ratio: neighbouring runs of N.
template <class T, int N>
void sum_runs(const Acc<T>* sums, T* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    Acc<T> sum = sums[j * N];
    for (int q = 1; q < N; ++q) sum += sums[j * N + q];
    narrow(sum, out[j]);
  }
}

// One tap: each pixel's channels summed over its readers where they lie.
template <class T>
void gather_pixels(const BackwardRows<Acc<T>>& p, const T* grad, int64_t row, T* out) {
  const int64_t inner = p.g.inner, out_row = int64_t(p.g.x.out) * inner;
  const int64_t rows = p.y.offset[row + 1] - p.y.offset[row];
  const T* from = grad + p.y.begin[row] * out_row;
  constexpr int kChannels = 32;
  for (int64_t j = 0; j < p.g.x.in; ++j) {
    const int64_t columns = p.x.offset[j + 1] - p.x.offset[j];
    const T* first = from + p.x.begin[j] * inner;
    for (int64_t c = 0; c < inner; c += kChannels) {
      const int64_t n = inner - c < kChannels ? inner - c : kChannels;
      Acc<T> sum[kChannels] = {};
      for (int64_t y = 0; y < rows; ++y) {
        for (int64_t x = 0; x < columns; ++x) {
          const T* values = first + y * out_row + x * inner + c;
          if (n == kChannels) {
            for (int i = 0; i < kChannels; ++i) sum[i] += widen(values[i]);
          } else {
            for (int64_t i = 0; i < n; ++i) sum[i] += widen(values[i]);
          }
        }
      }
      for (int64_t i = 0; i < n; ++i) narrow(sum[i], out[j * inner + c + i]);
    }
  }
}

template <class T>
void gather_steps(const BackwardRows<Acc<T>>& p, int step, const Acc<T>* sums, T* out) {
  switch (step) {
    case 1:
      return sum_runs<T, 1>(sums, out, p.g.x.in);
    case 2:
      return sum_runs<T, 2>(sums, out, p.g.x.in);
    case 3:
      return sum_runs<T, 3>(sums, out, p.g.x.in);
    case 4:
      return sum_runs<T, 4>(sums, out, p.g.x.in);
    case 8:
      return sum_runs<T, 8>(sums, out, p.g.x.in);
    default:
      return gather_width<T>(p, sums, out);
  }
}

template <class T>
void backward_rows(const Where& where, const BackwardRows<Acc<T>>& p, const T* grad_output,
                   T* grad_input) {
  const int64_t in_row = int64_t(p.g.x.in) * p.g.inner, out_row = int64_t(p.g.x.out) * p.g.inner;
  const int64_t height = p.g.y.in;
  const int step = p.g.inner == 1 ? p.step() : 0;
  parallel_chunks(where, p.g.planes * height, [&](int64_t thread, int64_t begin, int64_t end) {
    Acc<T>* sums = p.sums + thread * p.row_stride();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t j = i % height;
      if (p.y.offset[j + 1] == p.y.offset[j]) {  // nobody reads it
        memset(grad_input + i * in_row, 0, size_t(in_row) * sizeof(T));
        continue;
      }
      const T* grad = grad_output + i / height * p.g.y.out * out_row;
      if (p.taps == 1 && p.g.inner > 1) {
        gather_pixels<T>(p, grad, j, grad_input + i * in_row);
        continue;
      }
      along_height<T>(p, grad, j, sums);
      gather_steps<T>(p, step, sums, grad_input + i * in_row);
    }
  });
}

void forward(const Where& where, ScalarType type, const void* plan, const void* input,
             void* output) {
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    const auto& p = *static_cast<const ForwardRows<Acc<T>>*>(plan);
    const T* in = static_cast<const T*>(input);
    T* out = static_cast<T*>(output);
    if (p.taps == 1) {
      copy_rows<T>(where, p, in, out);
    } else if (p.taps == 2) {
      forward_rows<T, 2>(where, p, in, out);
    } else {
      forward_rows<T, 4>(where, p, in, out);
    }
  });
}

void backward(const Where& where, ScalarType type, const void* plan, const void* grad_output,
              void* grad_input) {
  with_scalar_type(type, [&](auto scalar) {
    using T = decltype(scalar);
    backward_rows<T>(where, *static_cast<const BackwardRows<Acc<T>>*>(plan),
                     static_cast<const T*>(grad_output), static_cast<T*>(grad_input));
  });
}

const InterpolateRows& interpolate_rows() {
  static const InterpolateRows rows{forward, backward};
  return rows;
}

}  // namespace SK_ISA
}  // namespace segkernels
