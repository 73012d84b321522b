// The weight gradient of the Hopper convolution:
//   dw[o][tap][c] = sum over pixels of grad[pixel][o] * x[input of the tap at pixel][c]
// with the pipeline, schedule, slots and fix-ups of dilated_conv2d.h. A loop step takes a box of 64
// pixels: 128 channels of the gradient, and `tile_channels` of the input, shifted by the tap, with
// zeros outside the image. Operands keep the layout of the tensors, channels innermost, and the sum
// runs across rows (MN-major).
#pragma once

#include "dilated_conv2d/dilated_conv2d.h"

namespace segkernels::dilated {

constexpr int kBlockChannels = 64;  // of a box in shared memory: 128 bytes of 16-bit values
constexpr int kBlockBytes = kStepPixels * kStepBytes;

struct WeightCall {
  ScalarType type;    // of grad, input and output: kHalf or kBFloat16
  const void* grad;   // [batch][out[0]][out[1]][out_channels]
  const void* input;  // [batch][in[0]][in[1]][channels]
  int64_t batch, in[2], out[2], channels, out_channels;
  void* output;  // [out_channels][kernel[0]][kernel[1]][channels]
  int32_t kernel[2], dilation[2], padding[2];
  // The schedule: make_weight_schedule.
  int32_t box[3], image_boxes;
  int32_t tile_channels, workers;
  int64_t segment_count, fixup_count;
  const int32_t* start;
  const Segment* segments;
  const Fixup* fixups;
  float* workspace;  // [tile][output channel][input channel]
};

// Only where *.sm90a.cu is compiled: SK_HAVE_SM90A.
void weight_gradient_sm90(const Where& where, const WeightCall& call);

inline namespace SK_NS {

// The origin of a step's box in the gradient, and its shift in the input.
struct StepBoxes {
  BoxOrigin grad;
  int32_t shift_y, shift_x;
};

SK_HD StepBoxes step_boxes(const WeightCall& c, const Segment& s, const StepWalk& walk) {
  const int32_t tap_y = s.branch / c.kernel[1], tap_x = s.branch % c.kernel[1];
  return {{walk.channel_step * c.box[0], walk.y * c.box[1], walk.x * c.box[2]},
          tap_y * c.dilation[0] - c.padding[0],
          tap_x * c.dilation[1] - c.padding[1]};
}

SK_HD float* workspace_row(const WeightCall& c, int64_t tile, int row) {
  return c.workspace + (tile * kTileRows + row) * c.tile_channels;
}

// Two neighbouring channels, the first even: rows of the tensors are multiples of 16 bytes.
template <class T>
SK_HD void store_weights(const WeightCall& c, int64_t row, int32_t tap, int64_t channel,
                         float first, float second) {
  if (row >= c.out_channels || channel >= c.channels) return;
  const int64_t taps = int64_t(c.kernel[0]) * c.kernel[1];
  T* output = static_cast<T*>(c.output) + (row * taps + tap) * c.channels + channel;
  store_vec2<true, T>(output, {narrow_to<T>(first), narrow_to<T>(second)}, true);
}

// A thread's accumulators: two rows of every eight-channel column.
template <class T, int kChannels>
SK_HD void store_weight_sums(const WeightCall& c, const Segment& s, int group, int thread,
                             const float (&sums)[kChannels / 2]) {
  const int column = hopper::accumulator_column(thread, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = group * kTileRows / kGroups + hopper::accumulator_row(thread, 2 * half);
    float* slot = s.slot < 0 ? nullptr : workspace_row(c, s.slot, row) + column;
#pragma unroll
    for (int j = 0; j < kChannels / 8; ++j) {
      const float first = sums[4 * j + 2 * half], second = sums[4 * j + 2 * half + 1];
      if (slot != nullptr) {
        store_vec2<true, float>(slot + kVec2Stride * j, {first, second}, true);
      } else {
        store_weights<T>(c, int64_t(s.tile_row[0]) * kTileRows + row, s.branch,
                         int64_t(s.column) * kChannels + column + kVec2Stride * j, first, second);
      }
    }
  }
}

// Sums the slots of a split tile in order: one row, channels `channel` and `channel` + 1.
template <class T>
SK_HD void add_weight_slots(const WeightCall& c, const Fixup& f, int row, int channel) {
  float first = 0, second = 0;
  for (int32_t i = 0; i < f.count; ++i) {
    const float* slot = workspace_row(c, f.first + int64_t(i) * f.stride, row) + channel;
    const Vec2<float> add = load_vec2<true>(slot, true);
    first += add.first;
    second += add.second;
  }
  store_weights<T>(c, int64_t(f.tile_row) * kTileRows + row, f.branch,
                   int64_t(f.column) * c.tile_channels + channel, first, second);
}

}  // namespace SK_NS
}  // namespace segkernels::dilated
