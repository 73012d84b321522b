// The Hopper convolution y = act((conv(x, w) * scale + shift) + residual), an implicit GEMM for
// channels_last tensors and stride 1, with one or several branches in one launch. schedule.h
// assigns the work to multiprocessors. This file has the arithmetic that the kernel
// (dilated_conv2d.sm90a.cu) and its emulation on the CPU (tests/emulation) share.
//
// A loop step multiplies the box of the input that a tap reads, 128 bytes of channels a pixel, by
// the same channels of that tap's weights. The input gradient is the same convolution with flipped,
// transposed weights.
#pragma once

#include "common/scalar.h"
#include "common/where.h"
#include "dilated_conv2d/schedule.h"
#include "hopper/layout.h"

namespace segkernels::dilated {

constexpr int kStepBytes = 128;  // of input channels, for each pixel and each output channel
constexpr int kPixelBytes = kTilePixels * kStepBytes;
constexpr int kGroups = 2;  // consumer warpgroups, 64 pixels each
constexpr int kGroupPixels = kTilePixels / kGroups;
constexpr int kGroupThreads = 128;
constexpr int kBlockThreads = kGroupThreads * (1 + kGroups);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// A pipeline stage holds 128 rows of 128 bytes of one operand and kChannels rows of the other.
template <int kChannels>
constexpr int kStageBytes = kPixelBytes + kChannels * kStepBytes;
template <int kChannels>
constexpr int kStages = kChannels == 256   ? 4
                        : kChannels == 128 ? 6
                                           : 8;

struct ConvBranch {
  const void* weight;  // [out_channels][kernel[0]][kernel[1]][channels]
  int32_t kernel[2], dilation[2], padding[2];
  int64_t out_channels;
  int64_t offset;  // first channel in the output
};

struct ConvCall {
  ScalarType type;  // of input, weight, residual and output; float is multiplied as tf32
  const void* input;
  int64_t batch, in[2], channels;
  int64_t out[2], out_channels;  // of all branches together
  void* output;
  int64_t out_pitch;     // from one pixel of the output to the next, in channels
  const void* residual;  // [batch][out[0]][out[1]][out_channels] or null
  const float* scale;    // [out_channels] or null: 1
  const float* shift;    // [out_channels] or null: 0
  bool relu;
  // Channels 2i and 2i + 1 of output, residual, scale and shift may be accessed as one vector:
  // counts, offsets and addresses are even.
  bool aligned;
  // The schedule.
  int32_t box[3], boxes[3];
  int32_t tile_channels, cluster, workers;
  int64_t segment_count, fixup_count;
  const int32_t* start;
  const Segment* segments;
  const Fixup* fixups;
  float* workspace;  // [tile][pixel][channel]
  int32_t branches;
  ConvBranch branch[kMaxBranches];
};

// Only where *.sm90a.cu is compiled: SK_HAVE_SM90A.
void dilated_conv2d_sm90(const Where& where, const ConvCall& call);

inline namespace SK_NS {

SK_HD int channels_per_step(ScalarType type) {
  return kStepBytes / (type == ScalarType::kFloat ? 4 : 2);
}

// Iterates over a tile's loop from step `begin` on: channels innermost, then the taps of the
// rectangle.
struct StepWalk {
  int32_t channel_step, channel_steps;
  int32_t x, first_x, end_x, y;

  SK_HD StepWalk(const Segment& s, int32_t steps) : channel_steps(steps) {
    const int32_t tap = s.begin / steps;
    channel_step = s.begin % steps;
    first_x = s.first_tap[1];
    end_x = first_x + s.taps_across;
    x = first_x + tap % s.taps_across;
    y = s.first_tap[0] + tap / s.taps_across;
  }

  SK_HD void next() {
    if (++channel_step < channel_steps) return;
    channel_step = 0;
    if (++x < end_x) return;
    x = first_x;
    ++y;
  }
};

struct BoxOrigin {
  int32_t n, y, x;
};

// A missing box starts behind the last image, where TMA reads zeros.
SK_HD BoxOrigin box_origin(const ConvCall& c, int32_t tile_row) {
  if (tile_row < 0) return {int32_t(c.batch), 0, 0};
  const int32_t x = tile_row % c.boxes[2], y = tile_row / c.boxes[2] % c.boxes[1];
  return {tile_row / c.boxes[2] / c.boxes[1] * c.box[0], y * c.box[1], x * c.box[2]};
}

// Index in the output of a tile's pixel; -1 where the tile overhangs the output.
SK_HD int64_t pixel_of(const ConvCall& c, int32_t tile_row, int row) {
  const BoxOrigin o = box_origin(c, tile_row);
  const int64_t n = int64_t(o.n) + row / (c.box[2] * c.box[1]);
  const int64_t y = int64_t(o.y) + row / c.box[2] % c.box[1];
  const int64_t x = int64_t(o.x) + row % c.box[2];
  if (row >= c.box[0] * c.box[1] * c.box[2]) return -1;
  if (n >= c.batch || y >= c.out[0] || x >= c.out[1]) return -1;
  return (n * c.out[0] + y) * c.out[1] + x;
}

SK_HD float* workspace_row(const ConvCall& c, int64_t tile, int row) {
  return c.workspace + (tile * kTilePixels + row) * c.tile_channels;
}

template <class T>
struct alignas(2 * sizeof(T)) Vec2 {
  T first, second;
};

// Two neighbours in memory. kAligned: one access. `both`: the second exists.
template <bool kAligned, class T>
SK_HD Vec2<T> load_vec2(const T* at, bool both) {
  if (kAligned) return *reinterpret_cast<const Vec2<T>*>(at);
  return {at[0], both ? at[1] : T{}};
}

template <bool kAligned, class T>
SK_HD void store_vec2(T* at, Vec2<T> value, bool both) {
  if (kAligned) {
    *reinterpret_cast<Vec2<T>*>(at) = value;
    return;
  }
  at[0] = value.first;
  if (both) at[1] = value.second;
}

// Epilogue and stores for kRows pixels (-1: none) and kCount vectors of two channels, at `channel`
// of the branch and every kVec2Stride from there. Each part of the epilogue loops over all sums, so
// that an absent part costs one branch.
constexpr int kVec2Stride = 8;

template <bool kAligned, class T, int kRows, int kCount>
SK_HD void finish(const ConvCall& c, const ConvBranch& branch, int64_t channel,
                  const int64_t (&pixels)[kRows], float (&sums)[2 * kRows * kCount]) {
  const int64_t first = branch.offset + channel, room = branch.out_channels - channel;
  const int bound = room > kVec2Stride * kCount ? kVec2Stride * kCount : int(room);
  if (c.scale != nullptr) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = kVec2Stride * j;
      if (at >= bound) continue;
      const Vec2<float> factor = load_vec2<kAligned>(c.scale + first + at, at + 1 < bound);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        sums[2 * (kRows * j + row)] *= factor.first;
        sums[2 * (kRows * j + row) + 1] *= factor.second;
      }
    }
  }
  if (c.shift != nullptr) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = kVec2Stride * j;
      if (at >= bound) continue;
      const Vec2<float> add = load_vec2<kAligned>(c.shift + first + at, at + 1 < bound);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        sums[2 * (kRows * j + row)] += add.first;
        sums[2 * (kRows * j + row) + 1] += add.second;
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (pixels[row] < 0) continue;
    if (c.residual != nullptr) {
      const T* residual = static_cast<const T*>(c.residual) + pixels[row] * c.out_channels + first;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const int at = kVec2Stride * j;
        if (at >= bound) continue;
        const Vec2<T> add = load_vec2<kAligned>(residual + at, at + 1 < bound);
        sums[2 * (kRows * j + row)] += widen(add.first);
        sums[2 * (kRows * j + row) + 1] += widen(add.second);
      }
    }
    if (c.relu) {
#pragma unroll
      for (int j = 0; j < 2 * kCount; ++j) {
        float& sum = sums[2 * (kRows * (j / 2) + row) + j % 2];
        sum = sum < 0 ? 0.0f : sum;  // NaN stays NaN
      }
    }
    T* output = static_cast<T*>(c.output) + pixels[row] * c.out_pitch + first;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = kVec2Stride * j;
      if (at >= bound) continue;
      const Vec2<T> value = {narrow_to<T>(sums[2 * (kRows * j + row)]),
                             narrow_to<T>(sums[2 * (kRows * j + row) + 1])};
      store_vec2<kAligned>(output + at, value, at + 1 < bound);
    }
  }
}

template <class T, int kRows, int kCount>
SK_HD void finish(const ConvCall& c, const ConvBranch& branch, int64_t channel,
                  const int64_t (&pixels)[kRows], float (&sums)[2 * kRows * kCount]) {
  if (channel >= branch.out_channels) return;
  if (c.aligned) {
    finish<true, T, kRows, kCount>(c, branch, channel, pixels, sums);
  } else {
    finish<false, T, kRows, kCount>(c, branch, channel, pixels, sums);
  }
}

// A thread's accumulators, two pixels of every eight-channel column: applies the epilogue, or
// stores partial sums to the workspace.
template <class T, int kChannels>
SK_HD void store_sums(const ConvCall& c, const Segment& s, int rank, int group, int thread,
                      float (&sums)[kChannels / 2]) {
  const int32_t tile_row = s.tile_row[rank];
  if (tile_row < 0) return;
  const int rows[2] = {group * kGroupPixels + hopper::accumulator_row(thread, 0),
                       group * kGroupPixels + hopper::accumulator_row(thread, 2)};
  const int column = hopper::accumulator_column(thread, 0);
  const int32_t slot = s.slot;
  if (slot < 0) {
    const int64_t pixels[2] = {pixel_of(c, tile_row, rows[0]), pixel_of(c, tile_row, rows[1])};
    finish<T, 2, kChannels / 8>(c, c.branch[s.branch], int64_t(s.column) * kChannels + column,
                                pixels, sums);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* to = workspace_row(c, int64_t(slot) * c.cluster + rank, rows[half]) + column;
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      store_vec2<true, float>(to + kVec2Stride * j,
                              {sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]}, true);
    }
  }
}

// Sums the slots of a split tile in order: one pixel, channels `channel` and `channel` + 1.
template <class T>
SK_HD void add_slots(const ConvCall& c, const Fixup& f, int row, int channel) {
  const int64_t pixels[1] = {pixel_of(c, f.tile_row, row)};
  if (pixels[0] < 0) return;
  float sums[2] = {0, 0};
  for (int32_t i = 0; i < f.count; ++i) {
    const float* slot = workspace_row(c, f.first + int64_t(i) * f.stride, row) + channel;
    const Vec2<float> add = load_vec2<true>(slot, true);
    sums[0] += add.first;
    sums[1] += add.second;
  }
  finish<T, 1, 1>(c, c.branch[f.branch], int64_t(f.column) * c.tile_channels + channel, pixels,
                  sums);
}

}  // namespace SK_NS
}  // namespace segkernels::dilated
