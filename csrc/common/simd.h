// Which copy of the *.simd.cpp files to run: the best instruction set that this machine has, or the
// one that SEGKERNELS_SIMD names (base, avx2, avx512), read once.
#pragma once

#include <stdlib.h>
#include <string.h>

#include <type_traits>

namespace segkernels {

// Each has a second name, that of the namespace: Isa::SK_ISA is a *.simd.cpp file's own.
enum class Isa {
  kBase,
  kAvx2,
  kAvx512,
  isa_base = kBase,
  isa_avx2 = kAvx2,
  isa_avx512 = kAvx512,
};

inline Isa best_isa() {
#if defined(SK_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw");
  const char* wanted = getenv("SEGKERNELS_SIMD");
  if (wanted != nullptr && strcmp(wanted, "base") == 0) return Isa::kBase;
  if (wanted != nullptr && strcmp(wanted, "avx2") == 0) return avx2 ? Isa::kAvx2 : Isa::kBase;
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBase;
#else
  return Isa::kBase;
#endif
}

// f(integral_constant<Isa>) with the best.
template <class F>
void with_best_isa(const F& f) {
#if defined(SK_HAVE_X86_ISAS)
  static const Isa isa = best_isa();
  if (isa == Isa::kAvx512) return f(std::integral_constant<Isa, Isa::kAvx512>{});
  if (isa == Isa::kAvx2) return f(std::integral_constant<Isa, Isa::kAvx2>{});
#endif
  f(std::integral_constant<Isa, Isa::kBase>{});
}

}  // namespace segkernels
