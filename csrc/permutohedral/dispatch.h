// Run-time dimension and scalar type as template arguments.
#pragma once

#include <stdexcept>

#include "permutohedral/lattice.h"

namespace segkernels {

constexpr int kAnyDims = 0;

inline namespace SK_NS {

// The number of dimensions, known at compile time: loops unroll, so that arrays are registers.
template <int D>
struct Dims {
  static constexpr int kFixed = D;
  static constexpr int kMost = D;     // size of arrays
  static constexpr int kUnroll = 64;  // all iterations
  SK_HD explicit Dims(int) {}
  SK_HD constexpr operator int() const { return D; }
};

// The same, known at run time.
template <>
struct Dims<kAnyDims> {
  static constexpr int kFixed = kAnyDims;
  static constexpr int kMost = kMaxDims;
  static constexpr int kUnroll = 1;
  int32_t count;
  SK_HD explicit Dims(int dims) : count(dims) {}
  SK_HD operator int() const { return count; }
};

}  // namespace SK_NS

// f(Dims<dims>) for the dimensions of images and volumes (position, and up to four channels), else
// f(Dims<kAnyDims>), which is slower: an instance of every kernel for each number builds slowly.
template <class F>
void with_dims(int dims, const F& f) {
  switch (dims) {
    case 1:
      return f(Dims<1>(dims));
    case 2:
      return f(Dims<2>(dims));
    case 3:
      return f(Dims<3>(dims));
    case 4:
      return f(Dims<4>(dims));
    case 5:
      return f(Dims<5>(dims));
    case 6:
      return f(Dims<6>(dims));
    case 7:
      return f(Dims<7>(dims));
    default:
      if (dims < 1 || dims > kMaxDims)
        throw std::runtime_error("segkernels: the lattice has 1 to 16 dimensions");
      return f(Dims<kAnyDims>(dims));
  }
}

// f(T{}): float or double
template <class F>
void with_scalar(bool is_double, const F& f) {
  if (is_double) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace segkernels
