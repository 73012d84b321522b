// Emulates the Hopper convolution's weight gradient on the CPU, as hopper_forward.cpp does the
// convolution.
#include "dilated_conv2d/weight_gradient.h"

#include <vector>

#include "hopper_model.h"

namespace segkernels::dilated {
namespace {

using namespace model;

template <class T, int kChannels>
void run_segment(const WeightCall& c, const Segment& segment) {
  Stage<T> stage(kChannels);
  std::vector<float> sums(size_t(kTileRows) * kChannels, 0.0f);
  const std::vector<int> box{kBlockChannels, c.box[2], c.box[1], c.box[0]};
  StepWalk walk(segment, c.image_boxes);
  for (int i = segment.begin; i < segment.end; ++i, walk.next()) {
    const StepBoxes at = step_boxes(c, segment, walk);
    uint32_t to = kShared;
    for (int block = 0; block < kTileRows; block += kBlockChannels, to += kBlockBytes) {
      stage.tma_load(
          to, static_cast<const T*>(c.grad), {c.out_channels, c.out[1], c.out[0], c.batch},
          {int64_t(segment.tile_row[0]) * kTileRows + block, at.grad.x, at.grad.y, at.grad.n}, box);
    }
    for (int block = 0; block < kChannels; block += kBlockChannels, to += kBlockBytes) {
      stage.tma_load(to, static_cast<const T*>(c.input), {c.channels, c.in[1], c.in[0], c.batch},
                     {int64_t(segment.column) * kChannels + block, at.grad.x + at.shift_x,
                      at.grad.y + at.shift_y, at.grad.n},
                     box);
    }
    for (int group = 0; group < kGroups; ++group) {
      for (int k = 0; k < kBlockBytes; k += 16 * kStepBytes) {
        const uint32_t grads = kShared + group * kBlockBytes, inputs = kShared + kPixelBytes;
        wgmma<T, true>(stage, hopper::mn_major_descriptor(grads + k, kBlockBytes),
                       hopper::mn_major_descriptor(inputs + k, kBlockBytes), kChannels,
                       &sums[size_t(group) * kGroupPixels * kChannels]);
      }
    }
  }
  std::vector<float> registers(size_t(kGroupThreads) * kChannels / 2);
  const auto of_thread = reinterpret_cast<float (*)[kChannels / 2]>(registers.data());
  for (int group = 0; group < kGroups; ++group) {
    to_registers<kChannels>(&sums[size_t(group) * kGroupPixels * kChannels], of_thread);
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      store_weight_sums<T, kChannels>(c, segment, group, thread, of_thread[thread]);
    }
  }
}

template <class T>
void run(const WeightCall& c) {
  for (int64_t i = 0; i < c.segment_count; ++i) {
    if (c.tile_channels == 256) {
      run_segment<T, 256>(c, c.segments[i]);
    } else if (c.tile_channels == 128) {
      run_segment<T, 128>(c, c.segments[i]);
    } else {
      run_segment<T, 64>(c, c.segments[i]);
    }
  }
  for (int64_t i = 0; i < c.fixup_count; ++i) {
    for (int row = 0; row < kTileRows; ++row) {
      for (int channel = 0; channel < c.tile_channels; channel += 2) {
        add_weight_slots<T>(c, c.fixups[i], row, channel);
      }
    }
  }
}

}  // namespace

void weight_gradient_sm90(const Where&, const WeightCall& call) {
  if (call.type == ScalarType::kHalf) return run<Half>(call);
  if (call.type == ScalarType::kBFloat16) return run<BFloat16>(call);
  throw std::runtime_error("segkernels: dilated_conv2d_weight: only float16 and bfloat16");
}

}  // namespace segkernels::dilated
