// SK_HD marks functions that the CPU loops and the CUDA kernels share. SK_NS is a namespace per
// compiler and instruction set: a template that several of them compile is several symbols, so that
// the linker cannot mix them.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define SK_HD __host__ __device__ __forceinline__
#define SK_NS cuda
#elif defined(SK_ISA)
#define SK_HD inline __attribute__((always_inline))
#define SK_NS SK_ISA
#else
#define SK_HD inline
#define SK_NS cpu
#endif

// A limit of launches that large sizes reach, and a smaller one for the emulation of CUDA on the
// CPU (tests/emulation), so that its small inputs reach it too.
#if defined(SK_EMULATED)
#define SK_LIMIT(real, emulated) (emulated)
#else
#define SK_LIMIT(real, emulated) (real)
#endif
