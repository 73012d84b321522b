// The status words of each CUDA device. They are a global variable of the module, zero when it is
// loaded, and so belong to no stream, graph or allocator.
#include "common/cuda_check.h"
#include "common/status.h"

namespace segkernels {
namespace {

__device__ int32_t words[kStatusCodes];

}  // namespace

int32_t* status_words(int device) {
  const DeviceGuard guard(device);
  void* address = nullptr;
  // The first call loads the module, which would fail while this thread captures a graph.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "status words");
  const cudaError_t error = cudaGetSymbolAddress(&address, words);
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "status words");
  check_cuda(error, "status words");
  return static_cast<int32_t*>(address);
}

}  // namespace segkernels
