// Tensor maps: the descriptors by which TMA loads boxes of a tensor.
#pragma once

#include <cuda.h>

#include <array>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/cuda_check.h"
#include "common/scalar.h"

namespace segkernels::hopper {
inline namespace cuda {

// The driver's cuTensorMapEncodeTiled, found through the runtime, so that libcuda is not linked.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
#else
    check_cuda(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
#endif
    if (found == nullptr || result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("segkernels: this driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encoder;
}

// Map of a dense tensor, its last axis first in `sizes`, with the 128-byte swizzle.
template <class T, size_t kAxes>
CUtensorMap tensor_map(const void* data, const std::array<int64_t, kAxes>& sizes,
                       const std::array<int, kAxes>& box) {
  constexpr CUtensorMapDataType kType = std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                        : std::is_same_v<T, BFloat16>
                                            ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;  // rounded by TMA
  cuuint64_t dims[kAxes], strides[kAxes];
  cuuint32_t extents[kAxes], every[kAxes];
  cuuint64_t bytes = sizeof(T);
  for (size_t i = 0; i < kAxes; ++i) {
    dims[i] = cuuint64_t(sizes[i]);
    strides[i] = bytes *= dims[i];  // between indices of axis i + 1
    extents[i] = cuuint32_t(box[i]);
    every[i] = 1;
  }
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, kType, kAxes, const_cast<void*>(data), dims, strides, extents,
                           every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("segkernels: cuTensorMapEncodeTiled failed with error " +
                             std::to_string(int(result)));
  }
  return map;
}

}  // namespace cuda
}  // namespace segkernels::hopper
