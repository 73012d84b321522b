// Emulates the Hopper convolution on the CPU: runs the schedule's segments with the kernel's own
// arithmetic (boxes, taps, descriptors, registers, epilogue, fix-up) on the models of
// hopper_model.h. Only for tests without a GPU.
#include <vector>

#include "hopper_model.h"

namespace segkernels::dilated {
namespace {

using namespace model;

template <class T, int kChannels>
void run_segment(const ConvCall& c, const Segment& segment) {
  const ConvBranch& branch = c.branch[segment.branch];
  const int step_channels = channels_per_step(c.type);
  const int32_t channel_steps = int32_t((c.channels + step_channels - 1) / step_channels);
  const int rows = kChannels / c.cluster;
  const int64_t taps = int64_t(branch.kernel[0]) * branch.kernel[1];
  std::vector<Stage<T>> stages(c.cluster, Stage<T>(kChannels));
  std::vector<float> sums(size_t(c.cluster) * kTilePixels * kChannels, 0.0f);
  StepWalk walk(segment, channel_steps);
  for (int i = segment.begin; i < segment.end; ++i, walk.next()) {
    const int channel = walk.channel_step * step_channels;
    for (int rank = 0; rank < c.cluster; ++rank) {
      const BoxOrigin origin = box_origin(c, segment.tile_row[rank]);
      stages[rank].tma_load(kShared, static_cast<const T*>(c.input),
                            {c.channels, c.in[1], c.in[0], c.batch},
                            {channel, origin.x + walk.x * branch.dilation[1] - branch.padding[1],
                             origin.y + walk.y * branch.dilation[0] - branch.padding[0], origin.n},
                            {step_channels, c.box[2], c.box[1], c.box[0]});
      for (Stage<T>& stage : stages) {
        stage.tma_load(kShared + kPixelBytes + rank * rows * kStepBytes,
                       static_cast<const T*>(branch.weight),
                       {c.channels, taps, branch.out_channels},
                       {channel, walk.y * branch.kernel[1] + walk.x,
                        int64_t(segment.column) * kChannels + rank * rows},
                       {step_channels, 1, rows});
      }
    }
    for (int rank = 0; rank < c.cluster; ++rank) {
      for (int group = 0; group < kGroups; ++group) {
        for (int k = 0; k < kStepBytes; k += 32) {
          const uint32_t pixels = kShared + group * kGroupPixels * kStepBytes;
          wgmma<T, false>(stages[rank], hopper::k_major_descriptor(pixels + k),
                          hopper::k_major_descriptor(kShared + kPixelBytes + k), kChannels,
                          &sums[size_t(rank * kGroups + group) * kGroupPixels * kChannels]);
        }
      }
    }
  }
  std::vector<float> registers(size_t(kGroupThreads) * kChannels / 2);
  const auto of_thread = reinterpret_cast<float (*)[kChannels / 2]>(registers.data());
  for (int rank = 0; rank < c.cluster; ++rank) {
    for (int group = 0; group < kGroups; ++group) {
      to_registers<kChannels>(&sums[size_t(rank * kGroups + group) * kGroupPixels * kChannels],
                              of_thread);
      for (int thread = 0; thread < kGroupThreads; ++thread) {
        store_sums<T, kChannels>(c, segment, rank, group, thread, of_thread[thread]);
      }
    }
  }
}

template <class T>
void run(const ConvCall& c) {
  if (c.cluster == 2 && c.tile_channels < 128) throw std::runtime_error("no kernel for this tile");
  for (int64_t i = 0; i < c.segment_count; ++i) {
    switch (c.tile_channels) {
      case 256:
        run_segment<T, 256>(c, c.segments[i]);
        break;
      case 128:
        run_segment<T, 128>(c, c.segments[i]);
        break;
      case 64:
        run_segment<T, 64>(c, c.segments[i]);
        break;
      default:
        run_segment<T, 32>(c, c.segments[i]);
    }
  }
  for (int64_t i = 0; i < c.fixup_count; ++i) {
    for (int row = 0; row < kTilePixels; ++row) {
      for (int channel = 0; channel < c.tile_channels; channel += 2) {
        add_slots<T>(c, c.fixups[i], row, channel);
      }
    }
  }
}

}  // namespace

void dilated_conv2d_sm90(const Where&, const ConvCall& call) {
  switch (call.type) {
    case ScalarType::kHalf:
      return run<Half>(call);
    case ScalarType::kBFloat16:
      return run<BFloat16>(call);
    case ScalarType::kFloat:
      return run<float>(call);
    case ScalarType::kDouble:
      break;
  }
  throw std::runtime_error("segkernels: dilated_conv2d: no kernel for float64");
}

}  // namespace segkernels::dilated
