// Wrappers of Hopper's PTX instructions for *.sm90a.cu files: mbarrier, TMA loads, clusters,
// setmaxnreg and wgmma.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "common/scalar.h"
#include "hopper/layout.h"

namespace segkernels::hopper {
inline namespace cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// An mbarrier is 8 bytes of shared memory, given by its address.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes the initialised mbarriers visible to TMA and to the cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and expects `bytes` of TMA loads.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at the same mbarrier in block `rank` of the cluster. Not .release: that would put a fence
// into every step, and only wgmma reads the memory that the barrier guards.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra.uni again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

template <int kCount>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// TMA load of one box into shared memory, with zeros outside the tensor. `barrier` counts its
// bytes.

__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap& map, uint32_t barrier,
                                         int x0, int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap& map, uint32_t barrier,
                                         int x0, int x1, int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
}

// Multicast to the same address and the same mbarrier in both blocks of the cluster.
__device__ __forceinline__ void tma_load_multicast(uint32_t to, const CUtensorMap& map,
                                                   uint32_t barrier, int x0, int x1, int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "h"(uint16_t(3))
      : "memory");
}

// Asynchronous wgmma: fence, products, commit, wait.

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Stops the compiler from moving reads of the sums above the wait before this call.
template <int kCount>
__device__ __forceinline__ void fence_operands(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// wgmma names every accumulator register: lists of 16, 32, 64 and 128.
#define SK_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SK_REGISTERS_32 \
  SK_REGISTERS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SK_REGISTERS_64                                                              \
  SK_REGISTERS_32                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SK_REGISTERS_128                                                                       \
  SK_REGISTERS_64                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"           \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"           \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110"     \
  ", %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125" \
  ", %126, %127"
#define SK_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SK_SUMS_16(i) SK_SUMS_4(i), SK_SUMS_4(i + 4), SK_SUMS_4(i + 8), SK_SUMS_4(i + 12)
#define SK_SUMS_32(i) SK_SUMS_16(i), SK_SUMS_16(i + 16)
#define SK_SUMS_64(i) SK_SUMS_32(i), SK_SUMS_32(i + 32)
#define SK_SUMS_128(i) SK_SUMS_64(i), SK_SUMS_64(i + 64)

// sums (+)= a * b^T, 64 rows by N columns. `a` and `b` are descriptors, in the registers after the
// accumulators. With `accumulate` 0 the sums start from zero.
#define SK_WGMMA(shape, types, count, a_register, b_register, p_register, majors)   \
  asm volatile(                                                                     \
      "{\n"                                                                         \
      ".reg .pred add;\n"                                                           \
      "setp.ne.b32 add, " p_register                                                \
      ", 0;\n"                                                                      \
      "wgmma.mma_async.sync.aligned." shape ".f32." types " {" SK_REGISTERS_##count \
      "}, " a_register ", " b_register ", add, 1, 1" majors                         \
      ";\n"                                                                         \
      "}"                                                                           \
      : SK_SUMS_##count(0)                                                          \
      : "l"(a), "l"(b), "r"(accumulate))
#define SK_WGMMA_TYPES(n, count, a_register, b_register, p_register)                            \
  if constexpr (std::is_same_v<T, float>) {                                                     \
    SK_WGMMA("m64n" n "k8", "tf32.tf32", count, a_register, b_register, p_register, "");        \
  } else if constexpr (std::is_same_v<T, Half> && !kMnMajor) {                                  \
    SK_WGMMA("m64n" n "k16", "f16.f16", count, a_register, b_register, p_register, ", 0, 0");   \
  } else if constexpr (std::is_same_v<T, Half>) {                                               \
    SK_WGMMA("m64n" n "k16", "f16.f16", count, a_register, b_register, p_register, ", 1, 1");   \
  } else if constexpr (!kMnMajor) {                                                             \
    SK_WGMMA("m64n" n "k16", "bf16.bf16", count, a_register, b_register, p_register, ", 0, 0"); \
  } else {                                                                                      \
    SK_WGMMA("m64n" n "k16", "bf16.bf16", count, a_register, b_register, p_register, ", 1, 1"); \
  }

// T: Half, BFloat16, or float for tf32. kMnMajor: both operands are MN-major; not for float.
template <class T, int kColumns, bool kMnMajor = false>
__device__ __forceinline__ void wgmma(float (&sums)[kColumns / 2], uint64_t a, uint64_t b,
                                      int accumulate) {
  static_assert(kColumns == 256 || kColumns == 128 || kColumns == 64 || kColumns == 32);
  static_assert(!kMnMajor || !std::is_same_v<T, float>);
  if constexpr (kColumns == 256) {
    SK_WGMMA_TYPES("256", 128, "%128", "%129", "%130")
  } else if constexpr (kColumns == 128) {
    SK_WGMMA_TYPES("128", 64, "%64", "%65", "%66")
  } else if constexpr (kColumns == 64) {
    SK_WGMMA_TYPES("64", 32, "%32", "%33", "%34")
  } else {
    SK_WGMMA_TYPES("32", 16, "%16", "%17", "%18")
  }
}

}  // namespace cuda
}  // namespace segkernels::hopper
