// Where a native function runs: the CPU with a number of threads, or a CUDA device and stream.
#pragma once

namespace segkernels {

struct Where {
  int device;    // -1: CPU
  void* stream;  // cudaStream_t
  int threads;   // of the CPU
};

}  // namespace segkernels
