// SIMD vectors for the *.simd.cpp files: load, store, and conversion of 16-bit types. The compiler
// splits vectors that are wider than the instruction set's.
#pragma once

#include <string.h>

#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/scalar.h"
#include "common/vec.h"

namespace segkernels {
inline namespace SK_NS {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
// The maskless conversions make GCC warn about uninitialised lanes.
constexpr uint16_t kAllLanes = 0xFFFF;
#else
constexpr int kVectorBytes = 32;
#endif

template <int W, class T>
SK_HD Vec<T, W> load_lanes(const T* from) {
  Vec<T, W> lanes;
  memcpy(static_cast<void*>(&lanes), from, sizeof(T) * W);
  return lanes;
}

template <class T, class V>
SK_HD void store_lanes(T* to, const V& lanes) {
  static_assert(sizeof(V) % sizeof(T) == 0, "whole elements");
  memcpy(static_cast<void*>(to), &lanes, sizeof(V));
}

// f(number of vectors of W lanes, first lane) for blocks that cover n >= W lanes. The last block
// may overlap the one before, so that every vector is full.
template <int W, class F>
SK_HD void each_block(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) f(std::integral_constant<int, 4>{}, i);
  for (; i + 2 * W <= n; i += 2 * W) f(std::integral_constant<int, 2>{}, i);
  for (; i < n; i += W) f(std::integral_constant<int, 1>{}, i + W <= n ? i : n - W);
}

// Converts in two steps: GCC 12 does a conversion to more than twice the size lane by lane.
template <int W>
SK_HD Vec<uint32_t, W> widen_bytes(Vec<uint8_t, W> bytes) {
  return __builtin_convertvector(__builtin_convertvector(bytes, Vec<uint16_t, W>),
                                 Vec<uint32_t, W>);
}

template <int W, class V>
SK_HD Vec<uint8_t, W> bytes_of(V lanes) {
  if constexpr (sizeof(lanes[0]) == 8) {
    return bytes_of<W>(__builtin_convertvector(lanes, Vec<uint32_t, W>));
  } else if constexpr (sizeof(lanes[0]) == 4) {
    return bytes_of<W>(__builtin_convertvector(lanes, Vec<uint16_t, W>));
  } else {
    return __builtin_convertvector(lanes, Vec<uint8_t, W>);
  }
}

// Widens W values, given as bits.
template <int W>
SK_HD Vec<float, W> widen_lanes(Vec<uint32_t, W> bits, float) {
  return bits_of<Vec<float, W>>(bits);
}

template <int W>
SK_HD Vec<double, W> widen_lanes(Vec<uint64_t, W> bits, double) {
  return bits_of<Vec<double, W>>(bits);
}

template <int W>
SK_HD Vec<float, W> widen_lanes(Vec<uint16_t, W> lanes, BFloat16) {
  const auto bits = __builtin_convertvector(lanes, Vec<uint32_t, W>) << 16;
  return bits_of<Vec<float, W>>(bits);
}

template <int W>
SK_HD Vec<float, W> widen_lanes(Vec<uint16_t, W> lanes, Half) {
  Vec<float, W> out;
#if defined(__AVX512BW__)
  static_assert(W == 16, "what the conversion takes");
  const __m512 wide = _mm512_maskz_cvtph_ps(kAllLanes, bits_of<__m256i>(lanes));
  memcpy(&out, &wide, sizeof(out));
#elif defined(__F16C__)
  static_assert(W == 8, "what the conversion takes");
  const __m256 wide = _mm256_cvtph_ps(bits_of<__m128i>(lanes));
  memcpy(&out, &wide, sizeof(out));
#else
  for (int i = 0; i < W; ++i) out[i] = widen(Half{lanes[i]});
#endif
  return out;
}

// Rounds W values to 16 bits and stores them.
template <int W>
SK_HD void store_narrow(BFloat16* to, Vec<float, W> lanes) {
  const auto bits = bits_of<Vec<uint32_t, W>>(lanes);
  const auto rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const auto narrow = (bits & 0x7FFFFFFFu) > 0x7F800000u ? rounded * 0 + 0x7FC0u : rounded;
  store_lanes(to, __builtin_convertvector(narrow, Vec<uint16_t, W>));
}

template <int W>
SK_HD void store_narrow(Half* to, Vec<float, W> lanes) {
#if defined(__F16C__)
  constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512BW__)
  static_assert(W == 16, "what the conversion takes");
  const __m256i halves = _mm512_maskz_cvtps_ph(kAllLanes, bits_of<__m512>(lanes), kRound);
#else
  static_assert(W == 8, "what the conversion takes");
  const __m128i halves = _mm256_cvtps_ph(bits_of<__m256>(lanes), kRound);
#endif
  const auto bits = bits_of<Vec<int16_t, W>>(halves);
  // The same NaN as `narrow` stores.
  store_lanes(to, (bits & 0x7FFF) > 0x7C00 ? (bits & int16_t(0x8000)) | 0x7E00 : bits);
#else
  for (int i = 0; i < W; ++i) to[i] = narrow_to<Half>(lanes[i]);
#endif
}

// Widens one value with the hardware's instruction.
template <class T>
SK_HD Acc<T> widen_one(T value) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Half>) return _cvtsh_ss(value.bits);
#endif
  return widen(value);
}

template <int W>
SK_HD void store_narrow(float* to, Vec<float, W> lanes) {
  store_lanes(to, lanes);
}

template <int W>
SK_HD void store_narrow(double* to, Vec<double, W> lanes) {
  store_lanes(to, lanes);
}

// Loads and widens W values.
template <int W, class T>
SK_HD Vec<Acc<T>, W> load_wide(const T* from) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  return widen_lanes<W>(load_lanes<W>(reinterpret_cast<const Bits*>(from)), T{});
}

template <class T>
SK_HD void widen_line(const T* __restrict from, float* __restrict to, int64_t n) {
  constexpr int kWidth = kVectorBytes / sizeof(float);
  if (n < kWidth) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen_one(from[i]);
    return;
  }
  each_block<kWidth>(n, [&](auto count, int64_t first) {
    for (int64_t i = first; i < first + count * kWidth; i += kWidth) {
      store_lanes(to + i, load_wide<kWidth>(from + i));
    }
  });
}

template <class T>
SK_HD void narrow_line(const float* __restrict from, T* __restrict to, int64_t n) {
  constexpr int kWidth = kVectorBytes / sizeof(float);
  if (n < kWidth) {
    for (int64_t i = 0; i < n; ++i) to[i] = narrow_to<T>(from[i]);
    return;
  }
  each_block<kWidth>(n, [&](auto count, int64_t first) {
    for (int64_t i = first; i < first + count * kWidth; i += kWidth) {
      store_narrow<kWidth>(to + i, load_lanes<kWidth>(from + i));
    }
  });
}

}  // namespace SK_NS
}  // namespace segkernels
