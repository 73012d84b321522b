// 64-bit atomics of the hash table, for both compilers. Relaxed order is enough: an earlier launch
// (CUDA) or parallel loop (CPU) wrote the data that a slot refers to.
#pragma once

#include "common/hd.h"

namespace segkernels {
inline namespace SK_NS {

using Word = unsigned long long;

SK_HD Word atomic_read(const Word* p) {
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const volatile Word*>(p);
#else
  return __atomic_load_n(p, __ATOMIC_RELAXED);
#endif
}

// Stores `value` if *p equals `expected`; returns the old value.
SK_HD Word atomic_cas(Word* p, Word expected, Word value) {
#if defined(__CUDA_ARCH__)
  return atomicCAS(p, expected, value);
#else
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
#endif
}

SK_HD void atomic_min(Word* p, Word value) {
#if defined(__CUDA_ARCH__)
  atomicMin(p, value);
#else
  Word seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value < seen &&
         !__atomic_compare_exchange_n(p, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
#endif
}

}  // namespace SK_NS
}  // namespace segkernels
