// max_pool2d on the CPU, compiled once per instruction set (SK_ISA). SIMD lanes are the windows of
// a line, or the channels of a window in channels_last, and loop over their cells in order.
// Parallel over lines.
#include "pooling/max_pool2d.h"
#include "pooling/scatter_gather_cpu.h"

namespace segkernels::pooling {
inline namespace SK_NS {

// How values of a type are compared, and the type of their codes, which has the same width, so that
// one mask selects both. 16-bit types are compared as max_pool2d.h says; they differ in `infinity`.
template <class Value>
struct OrderOf {
  using Code = std::conditional_t<sizeof(Value) == 4, int32_t, int64_t>;
  explicit OrderOf(ScalarType) {}
  template <class V>
  SK_HD V operator()(V value) const {
    return value;
  }
  Value least() const { return Value(-INFINITY); }
};
template <>
struct OrderOf<uint16_t> {
  using Code = int16_t;
  int16_t infinity;
  explicit OrderOf(ScalarType type)
      : infinity(type == ScalarType::kHalf ? kHalfInfinity : kBFloat16Infinity) {}
  SK_HD int16_t operator()(uint16_t bits) const { return order_of_bits(bits, infinity); }
  template <class V, class Order = Vec<int16_t, sizeof(V) / 2>>
  SK_HD Order operator()(V bits) const {
    const auto magnitude = bits_of<Order>(bits) & 0x7FFF;
    const auto sign = bits_of<Order>(bits) >> 15;
    return magnitude > infinity ? Order{} + 0x7FFF : (magnitude ^ sign) - sign;
  }
  uint16_t least() const { return uint16_t(0x8000 | infinity); }
};

template <class Value, class Code>
SK_HD void update(OrderOf<Value> order, Value other, Code other_code, Value& value, Code& code) {
  const bool better = replaces(order(other), order(value));
  value = better ? other : value;
  code = better ? other_code : code;
}

// 16-bit values are ranked once: `rank` holds the order of `value`.
template <class Value>
constexpr bool kRanked = sizeof(Value) == 2;

template <int kStep, class Value, class Code>
SK_HD void update_lanes(OrderOf<Value> order, const Value* __restrict from, int64_t step, int n,
                        Code cell, Value* __restrict value, Code* __restrict code,
                        int16_t* __restrict rank) {
  for (int i = 0; i < n; ++i) {
    const Value other = from[i * (kStep > 0 ? kStep : step)];
    if constexpr (kRanked<Value>) {
      const int16_t ranked = order(other);
      const bool better = replaces(ranked, rank[i]);
      rank[i] = better ? ranked : rank[i];
      value[i] = better ? other : value[i];
      code[i] = better ? cell : code[i];
    } else {
      update(order, other, cell, value[i], code[i]);
    }
  }
}

template <int kStep, class Value, class Code>
SK_HD void start_lanes(OrderOf<Value> order, const Value* __restrict from, int64_t step, int n,
                       Code cell, Value* __restrict value, Code* __restrict code,
                       int16_t* __restrict rank) {
  for (int i = 0; i < n; ++i) {
    value[i] = from[i * (kStep > 0 ? kStep : step)];
    code[i] = cell;
    if constexpr (kRanked<Value>) rank[i] = order(value[i]);
  }
}

// All four cells of neighbouring 2x2 windows.
template <class Value, class Code>
SK_HD void update_2x2(OrderOf<Value> order, const Value* __restrict upper,
                      const Value* __restrict lower, int n, Value* __restrict values,
                      Code* __restrict codes) {
  for (int i = 0; i < n; ++i) {
    Value value = upper[2 * i];
    Code code = 0;
    update(order, upper[2 * i + 1], Code(1), value, code);
    update(order, lower[2 * i], Code(2), value, code);
    update(order, lower[2 * i + 1], Code(3), value, code);
    values[i] = value;
    codes[i] = code;
  }
}

template <class Order>
SK_HD auto is_nan(const Order& rank) {
  if constexpr (sizeof(rank[0]) == 2) {
    return rank == 0x7FFF;
  } else {
    return rank != rank;
  }
}

// The maxima so far of kCount vectors of channels, and their codes.
template <class Value, int kCount>
struct BestVectors {
  using Code = typename OrderOf<Value>::Code;
  static constexpr int kWidth = kVectorBytes / sizeof(Value), kLanes = kWidth * kCount;
  using Values = Vec<Value, kWidth>;
  using Codes = Vec<Code, kWidth>;
  using Ranks = decltype(std::declval<OrderOf<Value>>()(Values{}));

  OrderOf<Value> order;
  Values value[kCount];
  Ranks best[kCount];
  Codes code[kCount];

  SK_HD BestVectors(OrderOf<Value> order, const Value* from, int32_t first) : order(order) {
    for (int i = 0; i < kCount; ++i) {
      value[i] = load_lanes<kWidth>(from + i * kWidth);
      best[i] = order(value[i]);
      code[i] = Codes{} + Code(first);
    }
  }

  SK_HD void update(const Value* from, int32_t cell) {
    for (int i = 0; i < kCount; ++i) {
      const Values other = load_lanes<kWidth>(from + i * kWidth);
      const Ranks rank = order(other);
      const Codes better = (rank > best[i]) | is_nan(rank);
      value[i] = better ? other : value[i];
      best[i] = better ? rank : best[i];
      code[i] = better ? Codes{} + Code(cell) : code[i];
    }
  }

  SK_HD void write(Value* values, uint8_t* codes) const {
    for (int i = 0; i < kCount; ++i) {
      store_lanes(values + i * kWidth, value[i]);
      store_lanes(codes + i * kWidth, bytes_of<kWidth>(code[i]));
    }
  }
};

template <class Value>
struct PoolLines {
  using Code = typename OrderOf<Value>::Code;

  Windows w;
  OrderOf<Value> order;
  const Value* input;
  Value* values;
  uint8_t* codes;
  int64_t* indices;
  LineTables tables;
  uint32_t inverse;  // 2^16 / kernel width, rounded up
  bool narrow;       // indices fit 32 bits

  PoolLines(const Windows& windows, const PoolBuffers& b)
      : w(windows),
        order(b.type),
        input(static_cast<const Value*>(b.input)),
        values(static_cast<Value*>(b.values)),
        codes(b.codes),
        indices(b.indices),
        tables(windows),
        inverse((65535 + uint32_t(w.kernel[1])) / w.kernel[1]),
        narrow(last_index() <= INT32_MAX) {}

  // An upper bound of the indices, also for windows without a cell in the plane.
  int64_t last_index() const {
    int64_t reach[2];
    for (int axis = 0; axis < 2; ++axis) {
      reach[axis] = int64_t(w.pooled[axis]) * w.stride[axis] + w.kernel[axis] * w.dilation[axis];
    }
    return (w.full[0] + reach[0]) * w.full[1] + reach[1];
  }

  void operator()(int64_t line) const {
    const Place p = line_of(line, tables.lines);
    const Cells ys = cells_inside(w, 0, p.y);
    if (w.channels > 1) {
      for (int32_t x = 0; x < w.pooled[1]; ++x) channels({p.plane, p.y, x, 0}, ys);
      return;
    }
    const auto edge = [&](int32_t x) {
      cells<1>({p.plane, p.y, x, 0}, ys, cells_inside(w, 1, x), 1, 1);
    };
    for (int32_t x = 0; x < tables.xs.begin; ++x) edge(x);
    for (int32_t x = tables.xs.begin; x < tables.xs.end; x += kLanes) {
      columns({p.plane, p.y, x, 0}, ys, lanes_left(x, tables.xs.end));
    }
    for (int32_t x = tables.xs.end; x < w.pooled[1]; ++x) edge(x);
  }

  // n windows of a line, all of whose columns lie in the plane.
  void columns(const Place& p, const Cells& ys, int n) const {
    const int32_t left = p.x * w.stride[1] - w.padding[1];
    const Cells xs{left, 0, w.kernel[1]};
    switch (w.stride[1]) {
      case 1:
        return cells<1>(p, ys, xs, 1, n);
      case 2:
        return cells<2>(p, ys, xs, 2, n);
      default:
        return cells<0>(p, ys, xs, w.stride[1], n);
    }
  }

  // One window, all channels.
  void channels(Place p, const Cells& ys) const {
    const Cells xs = cells_inside(w, 1, p.x);
    constexpr int kWidth = BestVectors<Value, 1>::kWidth;
    if (w.channels < kWidth || ys.begin >= ys.end || xs.begin >= xs.end) {
      for (; p.channel < w.channels; p.channel += kLanes) {
        cells<1>(p, ys, xs, 1, lanes_left(p.channel, w.channels));
      }
      return;
    }
    const Corner corner{input + full_offset(w, p, ys.start + ys.begin * w.dilation[0],
                                            xs.start + xs.begin * w.dilation[1]),
                        ys.end - ys.begin,
                        xs.end - xs.begin,
                        ys.begin * w.kernel[1] + xs.begin,
                        pooled_offset(w, p, p.y, p.x),
                        int64_t(ys.start) * w.full[1] + xs.start};
    corner.rows == 2 && corner.columns == 2 ? blocks<2>(corner) : blocks<0>(corner);
  }

  // The part of a window that lies in the plane: its first cell, and its size.
  struct Corner {
    const Value* from;
    int32_t rows, columns, code;
    int64_t at, first_index;
  };

  // kCells: rows and columns of cells, 0 if not known at compile time.
  template <int kCells>
  void blocks(const Corner& corner) const {
    each_block<BestVectors<Value, 1>::kWidth>(w.channels, [&](auto count, int64_t c) {
      vectors<decltype(count)::value, kCells>(corner, c);
    });
  }

  template <int kCount, int kCells>
  void vectors(const Corner& corner, int64_t c) const {
    const int64_t row = int64_t(w.dilation[0]) * w.full[1] * w.channels;
    const int64_t column = w.dilation[1] * w.channels;
    const int32_t rows = kCells > 0 ? kCells : corner.rows;
    const int32_t columns = kCells > 0 ? kCells : corner.columns;
    const Value* line = corner.from + c;
    BestVectors<Value, kCount> best(order, line, corner.code);
    for (int32_t m = 0; m < rows; ++m, line += row) {
      const Value* from = line;
      for (int32_t k = 0; k < columns; ++k, from += column) {
        if (m + k > 0) best.update(from, corner.code + m * w.kernel[1] + k);
      }
    }
    const int64_t at = corner.at + c;
    uint8_t found[BestVectors<Value, kCount>::kLanes];
    uint8_t* to = codes != nullptr ? codes + at : found;
    best.write(values + at, to);
    if (indices != nullptr) {
      write_indices(to, corner.first_index, 0, indices + at, BestVectors<Value, kCount>::kLanes);
    }
  }

  // n windows or channels, whose values are `step` apart, loop over their cells in order.
  template <int kStep>
  void cells(const Place& p, const Cells& ys, const Cells& xs, int64_t step, int n) const {
    Value value[kLanes];
    Code code[kLanes];
    int16_t rank[kRanked<Value> ? kLanes : 1];
    const auto at = [&](int32_t m, int32_t k) {
      return input + full_offset(w, p, ys.start + m * w.dilation[0], xs.start + k * w.dilation[1]);
    };
    const bool four = w.kernel[0] == 2 && w.kernel[1] == 2 && ys.begin == 0 && xs.begin == 0 &&
                      ys.end == 2 && xs.end == 2;
    if (four && kStep == 2 && w.dilation[1] == 1) {
      update_2x2(order, at(0, 0), at(1, 0), n, value, code);
    } else if (ys.begin >= ys.end || xs.begin >= xs.end) {
      for (int i = 0; i < n; ++i) {
        value[i] = order.least();
        code[i] = Code(ys.begin * w.kernel[1] + xs.begin);
      }
    } else {
      const Code first = Code(ys.begin * w.kernel[1] + xs.begin);
      start_lanes<kStep>(order, at(ys.begin, xs.begin), step, n, first, value, code, rank);
      for (int32_t m = ys.begin; m < ys.end; ++m) {
        for (int32_t k = m > ys.begin ? xs.begin : xs.begin + 1; k < xs.end; ++k) {
          const Code cell = Code(m * w.kernel[1] + k);
          update_lanes<kStep>(order, at(m, k), step, n, cell, value, code, rank);
        }
      }
    }
    write(p, value, code, n, ys.start, xs.start);
  }

  void write(const Place& p, const Value* value, const Code* code, int n, int32_t y,
             int32_t x) const {
    const int64_t at = pooled_offset(w, p, p.y, p.x);
    memcpy(values + at, value, sizeof(Value) * n);
    if (codes != nullptr) {
      uint8_t* __restrict to = codes + at;
      for (int i = 0; i < n; ++i) to[i] = uint8_t(code[i]);
    }
    if (indices != nullptr) {
      const int64_t first = int64_t(y) * w.full[1] + x, step = w.channels > 1 ? 0 : w.stride[1];
      write_indices(code, first, step, indices + at, n);
    }
  }

  template <class C>
  void write_indices(const C* __restrict from, int64_t first, int64_t step, int64_t* __restrict to,
                     int n) const {
    if (!narrow) {
      for (int i = 0; i < n; ++i) to[i] = first + i * step + tables.offset_of[uint8_t(from[i])];
      return;
    }
    // A code is divided by the kernel width with a multiplication.
    const uint32_t per_cell = uint32_t(w.dilation[1]);
    const uint32_t per_row = uint32_t(w.dilation[0]) * w.full[1] - w.kernel[1] * per_cell;
    for (int i = 0; i < n; ++i) {
      const uint32_t code = uint32_t(from[i]) & 255, m = (code * inverse) >> 16;
      const uint32_t start = uint32_t(first) + uint32_t(i) * uint32_t(step);
      to[i] = int32_t(start + m * per_row + code * per_cell);
    }
  }
};

void max_pool2d_forward(const Where& where, const Windows& w, const PoolBuffers& b) {
  const auto pool = [&](auto value) {
    const PoolLines<decltype(value)> f(w, b);
    parallel_for(where, w.planes * w.pooled[0], f, "max_pool2d");
  };
  switch (b.type) {
    case ScalarType::kFloat:
      return pool(float{});
    case ScalarType::kDouble:
      return pool(double{});
    default:
      pool(uint16_t{});
  }
}

template <class P>
void pool_grad_rows(const Where& where, const Windows& w, const PoolGradBuffers& b) {
  const P* positions = static_cast<const P*>(b.positions);
  const char* name = "max_pool2d_backward";
  with_scalar_type(b.type, [&](auto scalar) {
    using T = decltype(scalar);
    const T* grad = static_cast<const T*>(b.grad);
    T* out = static_cast<T*>(b.grad_input);
    if constexpr (sizeof(P) == 1) {
      using Bits = BitsOf<sizeof(T)>;
      if (tiles_plane(w)) {
        expand_codes(where, w, static_cast<const Bits*>(b.grad), positions,
                     static_cast<Bits*>(b.grad_input), nullptr, name);
        return;
      }
    }
    if (w.channels > 1) {
      scatter_by_place<T, P, true>(where, w, grad, positions, out, name);
    } else if constexpr (sizeof(T) >= 4) {
      scatter_planes<T, P, true>(where, w, grad, positions, out, nullptr, name);
    } else {
      scatter_sums(where, w, grad, positions, out, b.sums);
    }
  });
}

void max_pool2d_backward(const Where& where, const Windows& w, const PoolGradBuffers& b) {
  if (b.wide) {
    pool_grad_rows<int64_t>(where, w, b);
  } else {
    pool_grad_rows<uint8_t>(where, w, b);
  }
}

}  // namespace SK_NS

template <Isa kIsa>
MaxPool2dApi max_pool2d_loops() {
  return {max_pool2d_forward, max_pool2d_backward};
}

template MaxPool2dApi max_pool2d_loops<Isa::SK_ISA>();

}  // namespace segkernels::pooling
