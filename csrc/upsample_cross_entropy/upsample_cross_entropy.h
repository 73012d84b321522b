// Losses of upsampled logits: interface and CUDA functors.
//
// Forward: a thread has a few pixels of a column and loops over the classes once. Sums are in
// double, in a fixed order.
//
// Backward: the tiles of interpolate's backward pass (interpolate/kernels.h), with the gradient of
// each pixel's logits computed on the fly. A thread has a column of pixels and a few classes.
#pragma once

#include "common/where.h"
#include "interpolate/interpolate.h"
#include "upsample_cross_entropy/loss.h"

namespace segkernels {

enum class Reduction : int { kNone = 0, kMean = 1, kSum = 2 };

struct LossCall {
  Resampling resampling;  // inner is 1, planes the batch
  int32_t classes;
  Strides strides;  // of the logits
  ScalarType type;
  bool binary;
  const void* logits;
  const void* target;  // [batch, out height, out width]
  TargetType target_type;
  int64_t ignore_index;
  const void* weight;      // [classes], or for binary as target, or null; of the computing type, as
                           // pos_weight and losses
  const void* pos_weight;  // binary: one value, or null
  double smoothing;
  Reduction reduction;
  int32_t* status;
};

// Outputs, of the computing type.
struct LossOutputs {
  void* kept;       // [pixels, 2], for the backward pass; null for binary
  void* losses;     // per pixel, or null unless the reduction is kNone
  void* totals;     // [3]: loss, weight of the pixels, sum of the class weights
  void* workspace;  // CUDA: 2 * kMaxPartials doubles; CPU: as upsample_loss_workspace says
};

struct LossGradient {
  const void* grad;  // per pixel for kNone, else one value
  const void* kept;
  const void* totals;
  void* grad_logits;
  Strides strides;  // of grad_logits
  void* workspace;  // CPU
};

constexpr int kMaxPartials = SK_LIMIT(2048, 3);

inline namespace SK_NS {

// The mean of losses that sum to `total`, of pixels whose weights sum to `weight`. As in torch it
// is NaN for a weight of 0, also where label smoothing makes the total positive.
SK_HD double mean_loss(double total, double weight) {
  return weight != 0 ? total / weight : double(NAN);
}

template <class T, int K, class P>
struct LossForward {
  using A = Acc<T>;
  static constexpr int kRows = kPixelRows<K>;
  Logits<T> logits;
  P loss;
  A* kept;
  A* losses;

  // Rows of pixels a thread. They decide the order of the sums.
  SK_HD int rows() const { return K != kAnyTaps ? kRows : tap_count<K>(logits.y) == 4 ? 1 : 2; }
  SK_HD int64_t count() const { return PixelIndex::count(logits, rows()); }

  // Adds the losses and weights of its pixels to `total` and `weight`.
  SK_HD void operator()(int64_t i, double& total, double& weight) const {
    const PixelIndex at(logits, rows(), i);
    for (int r = 0; r < rows(); r += kRows) pixels(at, at.row + r, total, weight);
  }

  SK_HD void pixels(const PixelIndex& at, int32_t row, double& total, double& weight) const {
    const PixelColumn<T, K, kRows> column(logits, row, at.column);
    const T* plane = logits.data + at.image * logits.strides.batch;
    const int64_t first = (at.image * logits.y.out + row) * logits.x.out + at.column;
    typename P::Sums sums[kRows];
    int32_t label[kRows];
    A value[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sums[r] = loss.start();
      label[r] = row + r < logits.y.out ? loss.label(first + r * int64_t(logits.x.out)) : -1;
    }
    for (int32_t c = 0; c < logits.classes; ++c, plane += logits.strides.channel) {
      column.read(logits, plane, value);
#pragma unroll
      for (int r = 0; r < kRows; ++r) loss.add(sums[r], value[r], c, label[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= logits.y.out) continue;
      const int64_t pixel = first + r * int64_t(logits.x.out);
      A pixel_weight;
      const A l = loss.finish(sums[r], pixel, label[r], kept, pixel_weight);
      if (losses != nullptr) losses[pixel] = l;
      total += double(l);
      weight += double(pixel_weight);
    }
  }
};

// Classes a thread of the backward pass.
template <class P, int K>
constexpr int kLossChannels = K == kAnyTaps || P::kChannels == 1 ? 1
                              : K == 4                           ? 2
                                                                 : 4;

template <class T, int K, class P>
struct LossBackward {
  using A = Acc<T>;
  static constexpr int kChannels = kLossChannels<P, K>;
  Logits<T> logits;
  P loss;
  Tiling tiling;  // its channels are classes
  Reduction reduction;
  const A* grad;
  const A* kept;
  const A* totals;
  T* grad_logits;
  Strides strides;

  SK_HD int64_t tiles() const {
    return logits.batch * tiling.channel_tiles * tiling.row_tiles * tiling.column_tiles;
  }
  SK_HD int columns() const { return tiling.span; }
  SK_HD int cells() const { return tiling.columns * kChannels; }
  SK_HD Tile tile(int64_t i) const {
    return tile_at<K>(Geometry<A>{logits.batch, logits.classes, logits.y, logits.x}, tiling, i);
  }

  SK_HD A scale_of(int64_t pixel) const {
    if (reduction == Reduction::kNone) return grad[pixel];
    return reduction == Reduction::kMean ? grad[0] / totals[1] : grad[0];
  }

  // First step: sums column i of the tile's readers down the height into `sums` [kChannels, rows,
  // span].
  SK_HD void column(const Tile& tile, int i, A* sums) const {
    const int32_t x = tile.x.first + i;
    if (x >= tile.x.last) return;
    const Taps<A, K> tx = taps_at<K>(logits.x, x);
    const T* plane =
        logits.data + tile.plane * logits.strides.batch + tile.channel * logits.strides.channel;
    const int64_t pixels = tile.plane * logits.y.out * logits.x.out + x;
    const int left = logits.classes - tile.channel;
    const A class_weights = totals[2];
    RowWindow<A, K, kChannels> window;
    sum_readers<A, K, kChannels>(
        logits.y, tile.y, tile.row, tile.row_end,
        [&](int32_t y, const Taps<A, K>& ty, A* values) {
          window.move_to(ty.start, !copies(logits.y), [&](int k) {
#pragma unroll
            for (int v = 0; v < kChannels; ++v) {
              const T* from = plane + (v < left ? v : 0) * logits.strides.channel;
              window.value[v][k] = PixelColumn<T, K, 1>::along(logits, from, ty.start, k, tx);
            }
          });
          const int64_t pixel = pixels + y * int64_t(logits.x.out);
          const auto state = loss.pixel(kept, pixel, scale_of(pixel), class_weights);
#pragma unroll
          for (int v = 0; v < kChannels; ++v) {
            const A value = PixelColumn<T, K, 1>::blend(logits, ty, window.value[v]);
            values[v] = v < left ? loss.gradient(state, value, tile.channel + v) : A(0);
          }
        },
        [&](int32_t j, const A* sum) {
#pragma unroll
          for (int v = 0; v < kChannels; ++v)
            sums[(v * tiling.rows + j - tile.row) * tiling.span + i] = sum[v];
        });
  }

  // Second step: sums cell i of every row of the tile along the width.
  SK_HD void cell(const Tile& tile, int i, const A* sums) const {
    const int v = i / tiling.columns;
    const int32_t j = tile.column + i % tiling.columns, c = tile.channel + v;
    if (c >= logits.classes || j >= tile.column_end) return;
    const Readers readers = readers_of<K>(logits.x, j, j + 1);
    A sum[kTileRows] = {};
    for (int32_t x = readers.first; x < readers.last; ++x) {
      const A w = weight_of<K>(logits.x, x, j);
      const A* at = sums + v * tiling.rows * tiling.span + x - tile.x.first;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if (r < tile.row_end - tile.row) sum[r] = mul_add(w, at[r * tiling.span], sum[r]);
      }
    }
    T* to = grad_logits + tile.plane * strides.batch + c * strides.channel +
            tile.row * strides.row + j * strides.column;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (r < tile.row_end - tile.row) to[r * strides.row] = logits.format.narrow(sum[r]);
    }
  }
};

}  // namespace SK_NS

// The tiles of the backward pass. False if none fits kTileBytes.
template <int K, class P, class T>
bool tile_losses(const Logits<T>& l, int taps, Tiling& t) {
  constexpr int kChannels = kLossChannels<P, K>;
  const Geometry<Acc<T>> g{l.batch, 1, l.y, l.x};
  t = tiling_of(g, taps, kChannels, kTileRows);
  t.channels = kChannels;
  t.channel_tiles = (l.classes + kChannels - 1) / kChannels;
  return int64_t(t.rows) * t.span * kChannels * int64_t(sizeof(Acc<T>)) <= kTileBytes;
}

// f(loss) for logits that are computed in A.
template <class A, class F>
void with_loss(const LossCall& call, const F& f) {
  const A* weight = static_cast<const A*>(call.weight);
  if (call.binary) {
    f(BinaryLoss<A>{call.target, call.target_type, call.ignore_index, weight,
                    static_cast<const A*>(call.pos_weight), call.status});
  } else {
    f(SoftmaxLoss<A>{call.target, call.target_type, call.ignore_index, weight, A(call.smoothing),
                     call.classes, call.status});
  }
}

int64_t upsample_loss_workspace(const Where&, const LossCall&, bool backward);
void upsample_loss_cpu(const Where&, const LossCall&, const LossOutputs&);
void upsample_loss_backward_cpu(const Where&, const LossCall&, const LossGradient&);
void upsample_loss_cuda(const Where&, const LossCall&, const LossOutputs&);
void upsample_loss_backward_cuda(const Where&, const LossCall&, const LossGradient&);

}  // namespace segkernels
