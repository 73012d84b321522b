// Error checks of CUDA calls and launches, and a guard that makes a tensor's device current.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/where.h"

namespace segkernels {
inline namespace cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears it, or the next launch would report it
    throw std::runtime_error(std::string("segkernels: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline void check_launch(const char* name) { check_cuda(cudaGetLastError(), name); }

inline cudaStream_t stream_of(const Where& where) {
  return static_cast<cudaStream_t>(where.stream);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
    switched_ = before_ != device;
    if (switched_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

}  // namespace cuda
}  // namespace segkernels
