// The Hopper convolution, step by step, on the CPU: the schedule's segments with the kernel's own
// arithmetic for boxes, taps, descriptors, registers, epilogue and fix-up, and plain models of what
// the hardware does: the copy engine, shared memory, a warpgroup's product. Not a way to compute
// anything, only to test on a machine without a GPU what the GPU runs.
#include <string.h>

#include <limits>
#include <vector>

#include "dilated_conv2d/dilated_conv2d.h"

namespace segkernels::dilated {
namespace {

constexpr uint32_t kShared = 1024;  // where shared memory starts
constexpr int kGroupThreads = 128;

// What PTX says of wgmma's operands in shared memory: a descriptor's fields, and where row r and
// byte b along the summed axis of a K-major operand with 128-byte swizzle lie.
struct Operand {
  uint32_t start, group_stride, swizzle;

  explicit Operand(uint64_t descriptor)
      : start(uint32_t(descriptor & 0x3FFF) << 4),
        group_stride(uint32_t(descriptor >> 32 & 0x3FFF) << 4),
        swizzle(uint32_t(descriptor >> 62)) {}

  uint32_t address(int row, int byte) const {
    const uint32_t plain =
        start + uint32_t(row / 8) * group_stride + uint32_t(row % 8) * 128 + byte;
    const uint32_t piece = plain / 16 % 8, line = plain / 128 % 8;
    return plain - 16 * piece + 16 * (piece ^ line);
  }
};

// Shared memory of one multiprocessor: one stage. Rows that no copy writes hold NaN.
template <class T>
struct Stage {
  std::vector<uint8_t> bytes;

  explicit Stage(int channels) : bytes(kPixelBytes + channels * kStepBytes, 0xFF) {}

  T at(uint32_t address) const {
    T value;
    memcpy(&value, bytes.data() + (address - kShared), sizeof(T));
    return value;
  }

  // The copy engine's box of `sizes` (last axis first), from `from` on: zeros outside the tensor.
  void copy_box(uint32_t to, const T* tensor, const std::vector<int64_t>& sizes,
                const std::vector<int64_t>& from, const std::vector<int>& box) {
    int64_t count = 1;
    for (const int extent : box) count *= extent;
    for (int64_t i = 0; i < count; ++i) {
      int64_t offset = 0, stride = 1, rest = i;
      bool inside = true;
      for (size_t axis = 0; axis < sizes.size(); ++axis) {
        const int64_t index = from[axis] + rest % box[axis];
        rest /= box[axis];
        inside = inside && index >= 0 && index < sizes[axis];
        offset += index * stride;
        stride *= sizes[axis];
      }
      const T value = inside ? tensor[offset] : T{};
      const uint32_t address = hopper::swizzled(to + uint32_t(i) * sizeof(T));
      memcpy(bytes.data() + (address - kShared), &value, sizeof(T));
    }
  }
};

float as_tf32(float value) {
  const uint32_t bits = uint32_t(bits_of<int32_t>(value));
  const uint32_t rounded = (bits + 0xFFFu + ((bits >> 13) & 1u)) & ~0x1FFFu;
  return (bits & 0x7F800000u) == 0x7F800000u ? value : bits_of<float>(int32_t(rounded));
}

float multiplied(float value) { return as_tf32(value); }
float multiplied(Half value) { return widen(value); }
float multiplied(BFloat16 value) { return widen(value); }

// One warpgroup's product of a stage, added to sums[row][column].
template <class T>
void multiply(const Stage<T>& stage, uint64_t a, uint64_t b, int columns, float* sums) {
  constexpr int kDepth = 32 / int(sizeof(T));
  const Operand rows(a), others(b);
  std::vector<float> left(kGroupPixels * kDepth), right(size_t(columns) * kDepth);
  for (int i = 0; i < kGroupPixels * kDepth; ++i) {
    left[i] = multiplied(stage.at(rows.address(i / kDepth, i % kDepth * int(sizeof(T)))));
  }
  for (int i = 0; i < columns * kDepth; ++i) {
    right[i] = multiplied(stage.at(others.address(i / kDepth, i % kDepth * int(sizeof(T)))));
  }
  for (int row = 0; row < kGroupPixels; ++row) {
    for (int column = 0; column < columns; ++column) {
      float sum = sums[row * columns + column];
      for (int k = 0; k < kDepth; ++k) sum += left[row * kDepth + k] * right[column * kDepth + k];
      sums[row * columns + column] = sum;
    }
  }
}

// Which thread and register of a warpgroup holds a sum: PTX's figure of wgmma's accumulator.
template <int kChannels>
void to_registers(const float* sums, float (*registers)[kChannels / 2]) {
  for (int row = 0; row < kGroupPixels; ++row) {
    for (int column = 0; column < kChannels; ++column) {
      const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const int at = column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
      registers[thread][at] = sums[row * kChannels + column];
    }
  }
}

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
      const BoxOrigin origin = box_origin(c, segment.place[rank]);
      stages[rank].copy_box(kShared, static_cast<const T*>(c.input),
                            {c.channels, c.in[1], c.in[0], c.batch},
                            {channel, origin.x + walk.x * branch.dilation[1] - branch.padding[1],
                             origin.y + walk.y * branch.dilation[0] - branch.padding[0], origin.n},
                            {step_channels, c.box[2], c.box[1], c.box[0]});
      for (Stage<T>& stage : stages) {
        stage.copy_box(kShared + kPixelBytes + rank * rows * kStepBytes,
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
          multiply(stages[rank], hopper::row_descriptor(pixels + k),
                   hopper::row_descriptor(kShared + kPixelBytes + k), kChannels,
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
      for (int pair = 0; pair < c.tile_channels / 2; ++pair) {
        add_slots<T>(c, c.fixups[i], row, pair);
      }
    }
  }
}

}  // namespace

void dilated_conv2d_emulated(const Where&, const ConvCall& call) {
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
