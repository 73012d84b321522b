// Software pipeline in shared memory between the producer thread, which issues TMA loads, and the
// consumer warpgroups, for *.sm90a.cu files. A stage has two mbarriers: "full" counts the bytes
// that arrived, "empty" the consumers that are done.
#pragma once

#include "hopper/ptx.h"

namespace segkernels::hopper {
inline namespace cuda {

template <int kStageSize, int kStageCount>
struct Pipeline {
  static constexpr int kStageBytes = kStageSize, kStages = kStageCount;
  static constexpr int kBytes = kStages * kStageBytes + 2 * kStages * 8 + kSwizzleBytes;

  uint32_t stages, full, empty;
  int index = 0;
  uint32_t parity = 0;

  __device__ explicit Pipeline(void* shared) {
    stages = shared_address(shared) + kSwizzleBytes - 1;
    stages &= ~uint32_t(kSwizzleBytes - 1);
    full = stages + kStages * kStageBytes;
    empty = full + 8 * kStages;
  }
  __device__ uint32_t stage() const { return stages + index * kStageBytes; }
  __device__ uint32_t full_barrier() const { return full + 8 * index; }
  __device__ uint32_t empty_barrier() const { return empty + 8 * index; }
  // Called by one thread of the block, before the others use the barriers.
  __device__ void init(int consumers) const {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, consumers);
    }
    mbarrier_init_fence();
  }
  __device__ void next() {
    if (++index < kStages) return;
    index = 0;
    parity ^= 1;
  }
};

}  // namespace cuda
}  // namespace segkernels::hopper
