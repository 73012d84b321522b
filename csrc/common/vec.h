// Vec<T, W>: W neighbouring channels of a row, loaded and stored at once, with +, * and scalar *
// vector. It is a compiler vector on the CPU and an aligned struct on the GPU. The GPU's is passed
// by value: a reference to a row in memory would be read lane by lane.
#pragma once

#include "common/hd.h"

namespace segkernels {
inline namespace SK_NS {

#if defined(__CUDACC__)

template <class T, int W>
struct alignas(sizeof(T) * W > 16 ? 16 : sizeof(T) * W) VecStruct {
  T lane[W];
  SK_HD T& operator[](int i) { return lane[i]; }
  SK_HD T operator[](int i) const { return lane[i]; }
};

template <class T, int W>
SK_HD VecStruct<T, W> operator+(VecStruct<T, W> a, VecStruct<T, W> b) {
  VecStruct<T, W> r;
#pragma unroll
  for (int i = 0; i < W; ++i) r.lane[i] = a.lane[i] + b.lane[i];
  return r;
}

template <class T, int W>
SK_HD VecStruct<T, W> operator+(VecStruct<T, W> a, T s) {
  VecStruct<T, W> r;
#pragma unroll
  for (int i = 0; i < W; ++i) r.lane[i] = a.lane[i] + s;
  return r;
}

template <class T, int W>
SK_HD VecStruct<T, W> operator*(T s, VecStruct<T, W> a) {
  VecStruct<T, W> r;
#pragma unroll
  for (int i = 0; i < W; ++i) r.lane[i] = s * a.lane[i];
  return r;
}

template <class T, int W>
SK_HD VecStruct<T, W> operator*(VecStruct<T, W> a, VecStruct<T, W> b) {
  VecStruct<T, W> r;
#pragma unroll
  for (int i = 0; i < W; ++i) r.lane[i] = a.lane[i] * b.lane[i];
  return r;
}

template <class T, int W>
struct VecOf {
  using type = VecStruct<T, W>;
};

#else

template <class T, int W>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};

#endif

// A vector of one lane is the scalar itself.
template <class T>
struct VecOf<T, 1> {
  using type = T;
};

template <class T, int W>
using Vec = typename VecOf<T, W>::type;

// acc + s * a. The GPU's is an explicit fma, because the build disables contraction; the CPU files
// that use it are compiled with contraction enabled.
template <class T>
SK_HD T mul_add(T s, T a, T acc) {
#if defined(__CUDA_ARCH__)
  return fma(s, a, acc);
#else
  return acc + s * a;
#endif
}

#if defined(__CUDACC__)
template <class T, int W>
SK_HD VecStruct<T, W> mul_add(T s, VecStruct<T, W> a, VecStruct<T, W> acc) {
  VecStruct<T, W> r;
#pragma unroll
  for (int i = 0; i < W; ++i) r.lane[i] = mul_add(s, a.lane[i], acc.lane[i]);
  return r;
}
#else
template <class T, class V>
SK_HD V mul_add(T s, const V& a, const V& acc) {
  return acc + s * a;
}
#endif

}  // namespace SK_NS
}  // namespace segkernels
