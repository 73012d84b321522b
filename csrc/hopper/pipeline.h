// The ring of stages in shared memory between the thread that asks for copies and the warpgroups
// that multiply, for *.sm90a.cu files. Two barriers guard a stage: "full" counts the bytes that
// arrived, "empty" the consumers that are through.
#pragma once

#include "dilated_conv2d/dilated_conv2d.h"
#include "hopper/ptx.h"

namespace segkernels::dilated {
inline namespace cuda {

constexpr int kGroupThreads = 128;
constexpr int kBlockThreads = kGroupThreads * (1 + kGroups);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// A stage holds 128 rows of 128 bytes of the one operand and kChannels of the other.
template <int kChannels>
struct Ring {
  static constexpr int kStages = kChannels == 256 ? 4 : kChannels == 128 ? 6 : 8;
  static constexpr int kStageBytes = kPixelBytes + kChannels * kStepBytes;
  static constexpr int kBytes = kStages * kStageBytes + 2 * kStages * 8 + hopper::kSwizzleBytes;

  uint32_t stages, full, empty;
  int at = 0;
  uint32_t parity = 0;

  __device__ explicit Ring(void* shared) {
    stages = hopper::shared_address(shared) + hopper::kSwizzleBytes - 1;
    stages &= ~uint32_t(hopper::kSwizzleBytes - 1);
    full = stages + kStages * kStageBytes;
    empty = full + 8 * kStages;
  }
  __device__ uint32_t stage() const { return stages + at * kStageBytes; }
  __device__ uint32_t full_barrier() const { return full + 8 * at; }
  __device__ uint32_t empty_barrier() const { return empty + 8 * at; }
  // One thread of the block, before any other touches the barriers.
  __device__ void init(int consumers) const {
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(full + 8 * i, 1);
      hopper::barrier_init(empty + 8 * i, consumers);
    }
    hopper::barrier_init_fence();
  }
  __device__ void next() {
    if (++at < kStages) return;
    at = 0;
    parity ^= 1;
  }
};

}  // namespace cuda
}  // namespace segkernels::dilated
