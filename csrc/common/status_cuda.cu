// The status words of each CUDA device: in the module's own memory, zero when it is loaded, so that
// they belong to no stream, graph or pool of an allocator.
#include "common/cuda_check.h"
#include "common/status.h"

namespace segkernels {
namespace {

__device__ int32_t words[kStatusCodes];

}  // namespace

int32_t* status_words(int device) {
  const DeviceGuard guard(device);
  void* address = nullptr;
  // The first call loads the module, which a capture of another mode on this thread may refuse.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "status words");
  const cudaError_t error = cudaGetSymbolAddress(&address, words);
  check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "status words");
  check_cuda(error, "status words");
  return static_cast<int32_t*>(address);
}

}  // namespace segkernels
