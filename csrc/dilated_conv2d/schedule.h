// How the Hopper convolution is spread over the multiprocessors: a function of the shape and of
// their number alone, made once a shape on the host.
//
// An output tile is a box of at most 128 pixels (images x rows x columns) times `tile_channels`
// output channels of one branch. Its work is a loop over the rectangle of taps whose box meets the
// image, times the steps of input channels. Tiles go whole to the workers (multiprocessors, or
// clusters of two that share the weights and so work on two tiles with the same loop), longest
// first, as long as they fit under the even share; the loops of the rest are cut to fill what is
// left. A cut tile's pieces leave partial sums in numbered slots of a workspace, and a fix-up adds
// a tile's slots in their order.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <array>
#include <vector>

namespace segkernels::dilated {

constexpr int kTilePixels = 128;
constexpr int kMaxBranches = 8;
constexpr int kMaxKernel = 7;

// Convolutions of one input to planes of one size, side by side in the output's channels.
struct Branch {
  std::array<int, 2> kernel, dilation, padding;
  int64_t out_channels;
};

struct Shape {
  int64_t batch;
  std::array<int64_t, 2> in, out;  // height, width
  int64_t channel_steps;           // loop steps over the input channels, a tap
  std::vector<Branch> branches;
};

// Read by the kernel as it lies here: int32 words.
struct Segment {
  int32_t tile_row[2];  // box of each multiprocessor of the cluster; -1: none
  int32_t branch, column;
  int32_t begin, end;  // of the loop: tap of the rectangle * channel_steps + channel step
  int32_t slot;        // of the workspace; -1: the whole loop
  int32_t first_tap[2], taps_across;
};

// Workspace tiles first, first + stride, ... (count of them) add up to a tile; none: it is zero.
struct Fixup {
  int32_t tile_row, branch, column;
  int32_t first, stride, count;
};

static_assert(sizeof(Segment) == 40 && sizeof(Fixup) == 24, "words of 4 bytes");

struct Schedule {
  std::array<int, 3> box;  // images, rows, columns: at most 128 pixels
  std::array<int64_t, 3>
      boxes;  // of them along each axis; place = (n * boxes[1] + y) * boxes[2] + x
  int tile_channels, cluster, workers;
  std::vector<int32_t> start;  // worker w has segments start[w] .. start[w + 1] - 1
  std::vector<Segment> segments;
  std::vector<Fixup> fixups;
  int64_t workspace_tiles;
  int64_t tile_steps;  // loop steps of all tiles
  int64_t max_load;    // loop steps of the busiest worker
  double cost;         // estimate of the time, in loop steps
};

// Output channels of a tile, 256, 128, 64 or 32: the least work, with what narrow tiles cost more.
int choose_tile_channels(const Shape& shape);

// The boxes of at most `pixels` pixels, a multiple of `multiple`, with the fewest loop steps over
// all tiles, best first.
std::vector<std::array<int, 3>> best_boxes(const Shape& shape, size_t count, int pixels,
                                           int multiple);

// `tile_channels` 0, `cluster` 0 and a `box` of zeros are chosen here. Throws
// std::invalid_argument for shapes that int32 tile numbers do not hold.
Schedule make_schedule(const Shape& shape, int multiprocessors, int tile_channels, int cluster,
                       std::array<int, 3> box);

// The weight's gradient in the same terms. A tile is 128 output channels (`place`) times
// `tile_channels` input channels (`column`) of one tap (`branch`); its loop runs over the boxes of
// 64 pixels that the tap reads inside the image: `first_tap` and `taps_across` are the rectangle of
// boxes, and images take the place of channel steps.
constexpr int kTileRows = 128;
constexpr int kStepPixels = 64;

Schedule make_weight_schedule(const Shape& shape, int64_t channels, int multiprocessors);

}  // namespace segkernels::dilated
