// Device index, stream and thread count of a native call.
#pragma once

namespace segkernels {

struct Where {
  int device;    // -1: CPU
  void* stream;  // cudaStream_t
  int threads;   // of the CPU
};

}  // namespace segkernels
