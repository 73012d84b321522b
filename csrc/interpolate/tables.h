// Tables of taps for the CPU's loops, filled once a call, in memory of the caller. The file that
// fills them is compiled without contraction: the rounding of source coordinates must not depend on
// the instruction set.
#pragma once

#include "interpolate/axis.h"

namespace segkernels {

// A bump allocator of aligned memory. Without memory it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* allocate(int64_t count) {
    T* address = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : address;
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Tap k of output i reads input position[k * out + i] with weight[k * out + i].
template <class A>
struct TapTable {
  int32_t* position;
  A* weight;

  void allocate(Arena& arena, const Axis<A>& axis, int taps) {
    position = arena.allocate<int32_t>(int64_t(axis.out) * taps);
    weight = arena.allocate<A>(int64_t(axis.out) * taps);
  }
};

// Outputs begin[j] + q read input j with weight[offset[j] + q], for q < offset[j + 1] - offset[j].
template <class A>
struct ReaderTable {
  int32_t* begin;
  int64_t* offset;
  A* weight;

  void allocate(Arena& arena, const Axis<A>& axis, int taps) {
    begin = arena.allocate<int32_t>(axis.in);
    offset = arena.allocate<int64_t>(int64_t(axis.in) + 1);
    weight = arena.allocate<A>(int64_t(axis.out) * taps);
  }
};

namespace cpu {

template <int K, class A>
void fill(const Axis<A>& axis, const TapTable<A>& table) {
  for (int32_t i = 0; i < axis.out; ++i) {
    const Taps<A, K> taps = taps_at<K>(axis, i);
    for (int k = 0; k < K; ++k) {
      table.position[int64_t(k) * axis.out + i] = tap_position(axis, taps.start, k);
      table.weight[int64_t(k) * axis.out + i] = taps.weight[k];
    }
  }
}

template <int K, class A>
void fill(const Axis<A>& axis, const ReaderTable<A>& table) {
  table.offset[0] = 0;
  for (int32_t j = 0; j < axis.in; ++j) {
    const int32_t begin = first_reader<K>(axis, j), end = last_reader<K>(axis, j);
    A* weight = table.weight + table.offset[j];
    for (int32_t i = begin; i < end; ++i) *weight++ = weight_of<K>(axis, i, j);
    table.begin[j] = begin;
    table.offset[j + 1] = weight - table.weight;
  }
}

}  // namespace cpu
}  // namespace segkernels
