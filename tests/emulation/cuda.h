// The CUDA language and runtime for g++: qualifiers, the runtime's calls, float16 and bfloat16,
// cooperative groups. Force-included into every .cu that translate.py has turned into C++;
// scheduler.cpp implements it. README.md lists what is modelled.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The runtime API.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrCooperativeLaunch };
using cudaStream_t = struct CUstream_st*;
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int device);
cudaError_t cudaMemsetAsync(void*, int value, size_t bytes, cudaStream_t = nullptr);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*);
// Calls that synchronise or allocate fail while a graph is captured.
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, int kind);
cudaError_t cudaMalloc(void**, size_t bytes);
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, const T& symbol) {
  *address = const_cast<void*>(static_cast<const void*>(&symbol));
  return cudaSuccess;
}

namespace emulation {

// Indices of the current thread.
extern uint3 thread_idx, block_idx;
extern dim3 block_dim, grid_dim;

struct Launch {
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
  bool cooperative = false;
  Launch(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t stream = nullptr)
      : grid(grid), block(block), shared(shared), stream(stream) {}
};

void run(const Launch&, const char* name, const char* type, size_t parameter_bytes,
         const std::function<void()>&);
// Registers a kernel instance of the module, launched or not.
bool known(const char* type);
// Fails unless stream and current device are the ones that Python passed.
void check_stream(cudaStream_t, const char* what);
void* dynamic_shared();
// The block's variable of that key; the first thread to arrive creates it.
void* static_shared(const char* key, size_t bytes, size_t alignment);
template <class T>
T& static_shared(const char* key) {
  return *static_cast<T*>(static_shared(key, sizeof(T), alignof(T)));
}
void sync_threads();
void sync_grid();
// Every thread of `mask` gives its value and gets that of lane `source`.
void shuffle(unsigned mask, void* value, int bytes, int source, const char* what);
[[noreturn]] void fail(const std::string& what);  // in host code or in a kernel
void atomic_begin(const void*, int bytes);
void pause_races(bool);

template <class Kernel>
struct Instance {
  static inline const bool noted = known(typeid(Kernel).name());
};

// Evaluates the arguments once, at the launch; every thread gets copies.
template <class... A, class Kernel>
void launch(const Launch& l, const char* name, std::tuple<A...> arguments, const Kernel& kernel) {
  (void)Instance<Kernel>::noted;
  size_t bytes = 0;
  ((bytes = (bytes + alignof(A) - 1) / alignof(A) * alignof(A) + sizeof(A)), ...);
  run(l, name, typeid(Kernel).name(), bytes, [&] { std::apply(kernel, arguments); });
}

template <class Kernel, class... P, size_t... I>
void launch_together(const Launch& l, const char* name, void** arguments, const Kernel& kernel,
                     void (*)(P...), std::index_sequence<I...>) {
  launch(l, name, std::make_tuple(*static_cast<std::decay_t<P>*>(arguments[I])...), kernel);
}
// cudaLaunchCooperativeKernel. `function` gives the kernel's parameter types.
template <class Kernel, class... P>
cudaError_t launch_cooperative(const char* name, const Kernel& kernel, void (*function)(P...),
                               dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  Launch l(grid, block, shared, stream);
  l.cooperative = true;
  launch_together(l, name, arguments, kernel, function, std::index_sequence_for<P...>());
  return cudaGetLastError();
}

template <class T, class F>
T atomic(T* at, const F& change) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) fail("a misaligned atomic");
  atomic_begin(at, sizeof(T));
  T before;
  __atomic_load(at, &before, __ATOMIC_RELAXED);
  T after = change(before);
  __atomic_store(at, &after, __ATOMIC_RELAXED);
  return before;
}

}  // namespace emulation

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

#define threadIdx (::emulation::thread_idx)
#define blockIdx (::emulation::block_idx)
#define blockDim (::emulation::block_dim)
#define gridDim (::emulation::grid_dim)

// Qualifiers. translate.py has replaced __shared__.
#define __host__
#define __device__
#define __global__ [[maybe_unused]]
#define __constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))

#define __syncthreads() ::emulation::sync_threads()

inline int emulation_lane() {
  return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  char none = 0;
  ::emulation::shuffle(mask, &none, 1, emulation_lane(), "__syncwarp");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step, int width = 32) {
  const int lane = emulation_lane(), source = lane ^ step;
  const bool inside = source / width <= lane / width;
  ::emulation::shuffle(mask, &value, sizeof value, inside ? source : lane, "__shfl_xor_sync");
  return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int step, int width = 32) {
  const int lane = emulation_lane(), source = lane + step;
  const bool inside = source / width == lane / width;
  ::emulation::shuffle(mask, &value, sizeof value, inside ? source : lane, "__shfl_down_sync");
  return value;
}

template <class T>
T atomicCAS(T* at, T expected, T value) {
  return ::emulation::atomic(at, [&](T seen) { return seen == expected ? value : seen; });
}
template <class T>
T atomicMin(T* at, T value) {
  return ::emulation::atomic(at, [&](T seen) { return value < seen ? value : seen; });
}
template <class T>
T atomicMax(T* at, T value) {
  return ::emulation::atomic(at, [&](T seen) { return value > seen ? value : seen; });
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return uint64_t(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __expf(float x) { return expf(x); }

namespace cooperative_groups {
struct grid_group {
  void sync() const { ::emulation::sync_grid(); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

// float16 and bfloat16. NaN is converted to the same bits as on the device.
#if defined(__aarch64__)
using EmulatedHalf = __fp16;  // g++ 12 lacks _Float16 there
#else
using EmulatedHalf = _Float16;
#endif
struct __half {
  EmulatedHalf value;
};
inline __half __ushort_as_half(unsigned short bits) {
  __half h;
  memcpy(&h, &bits, 2);
  return h;
}
inline unsigned short __half_as_ushort(__half h) {
  unsigned short bits;
  memcpy(&bits, &h, 2);
  return (bits & 0x7FFF) > 0x7C00 ? 0x7FFF : bits;
}
inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half_rn(float f) { return {EmulatedHalf(f)}; }
struct __nv_bfloat16 {
  unsigned short bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<unsigned short>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }

#include "cub.h"

#define __CUDACC__ 1
#define __CUDA_ARCH__ 900
