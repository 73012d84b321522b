// Run-time dispatch to the copy of the *.simd.cpp files for the best instruction set of this
// machine, or for the one that SEGKERNELS_SIMD names (base, avx2, avx512; read once).
#pragma once

#include <stdlib.h>
#include <string.h>

#include <type_traits>

namespace segkernels {

// Named like the namespaces: a *.simd.cpp file's own is Isa::SK_ISA.
enum class Isa { isa_base, isa_avx2, isa_avx512 };

inline Isa best_isa() {
#if defined(SK_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw");
  const char* wanted = getenv("SEGKERNELS_SIMD");
  if (wanted != nullptr && strcmp(wanted, "base") == 0) return Isa::isa_base;
  if (avx512 && (wanted == nullptr || strcmp(wanted, "avx2") != 0)) return Isa::isa_avx512;
  if (avx2) return Isa::isa_avx2;
#endif
  return Isa::isa_base;
}

// f(integral_constant<Isa>) for the best instruction set; returns what f returns.
template <class F>
auto with_best_isa(const F& f) {
#if defined(SK_HAVE_X86_ISAS)
  static const Isa isa = best_isa();
  if (isa == Isa::isa_avx512) return f(std::integral_constant<Isa, Isa::isa_avx512>{});
  if (isa == Isa::isa_avx2) return f(std::integral_constant<Isa, Isa::isa_avx2>{});
#endif
  return f(std::integral_constant<Isa, Isa::isa_base>{});
}

}  // namespace segkernels
