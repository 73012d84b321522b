// The schedule of the Hopper convolution (hybrid stream-K): which multiprocessor computes what. A
// function of the shape and the number of multiprocessors, computed once a shape on the host.
//
// An output tile is a box of at most 128 pixels (images x rows x columns) times `tile_channels`
// output channels of one branch. Its loop runs over the rectangle of taps whose box meets the
// image, times the steps of input channels. A worker is a multiprocessor, or a cluster of two that
// share the weights and so run the same loop on two tiles. Workers get whole tiles, longest first,
// as long as these fit under an even share of the steps; the loops of the other tiles are cut into
// segments that fill the gaps. The segments of a split tile store partial sums in slots of a
// workspace, and a fix-up adds the slots of each tile in order.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <array>
#include <vector>

namespace segkernels::dilated {

constexpr int kTilePixels = 128;
constexpr int kMaxBranches = 8;
constexpr int kMaxKernel = 7;

// Convolutions of one input with outputs of one size, concatenated in the output's channels.
struct Branch {
  std::array<int, 2> kernel, dilation, padding;
  int64_t out_channels;
};

struct Shape {
  int64_t batch;
  std::array<int64_t, 2> in, out;  // height, width
  int64_t channel_steps;           // loop steps over the input channels, per tap
  std::vector<Branch> branches;
};

// The kernel reads this layout: int32 words.
struct Segment {
  int32_t tile_row[2];  // box of each block of the cluster; -1: none
  int32_t branch, column;
  int32_t begin, end;  // of the loop: tap of the rectangle * channel_steps + channel step
  int32_t slot;        // of the workspace; -1: the segment is the whole loop
  int32_t first_tap[2], taps_across;
};

// `count` tiles of the workspace, first, first + stride, ..., add up to a tile; with none it is
// zero.
struct Fixup {
  int32_t tile_row, branch, column;
  int32_t first, stride, count;
};

static_assert(sizeof(Segment) == 40 && sizeof(Fixup) == 24, "words of 4 bytes");

struct Schedule {
  std::array<int, 3> box;        // images, rows, columns: at most 128 pixels
  std::array<int64_t, 3> boxes;  // along each axis; tile_row = (n * boxes[1] + y) * boxes[2] + x
  int tile_channels, cluster, workers;
  std::vector<int32_t> start;  // worker w has segments start[w] .. start[w + 1] - 1
  std::vector<Segment> segments;
  std::vector<Fixup> fixups;
  int64_t workspace_tiles;
  int64_t tile_steps;  // loop steps of all tiles
  int64_t max_load;    // of the busiest worker, in loop steps
  double cost;         // estimated time in loop steps
};

// Output channels of a tile: 256, 128, 64 or 32, by the least padding, weighted by the cost of
// narrow tiles.
int choose_tile_channels(const Shape& shape);

// The `count` best boxes by loop steps over all tiles, best first. A box has at most `pixels`
// pixels, a multiple of `multiple`.
std::vector<std::array<int, 3>> best_boxes(const Shape& shape, size_t count, int pixels,
                                           int multiple);

// Chooses `tile_channels` if 0, `cluster` if 0, and `box` if zeros. Throws std::invalid_argument
// for shapes whose tiles int32 cannot number.
Schedule make_schedule(const Shape& shape, int multiprocessors, int tile_channels, int cluster,
                       std::array<int, 3> box);

// The schedule of the weight gradient. A tile is 128 output channels (`tile_row`) times
// `tile_channels` input channels (`column`) of one tap (`branch`). Its loop runs over the boxes of
// 64 pixels that the tap reads inside the image: `first_tap` and `taps_across` describe that
// rectangle of boxes, and images replace channel steps.
constexpr int kTileRows = 128;
constexpr int kStepPixels = 64;

Schedule make_weight_schedule(const Shape& shape, int64_t channels, int multiprocessors);

}  // namespace segkernels::dilated
