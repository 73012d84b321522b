// Losses of upsampled logits on the CPU, compiled once per instruction set (SK_ISA). Parallel over
// rows of pixels, in blocks of pixels whose classes stay in cache. Sums are in double, first over
// each row, then over rows: no value depends on the number of threads.
#include <math.h>
#include <string.h>

#include "upsample_cross_entropy/loss_tables.h"

namespace segkernels {
inline namespace SK_ISA {

constexpr int64_t kBlock = LogitTables<float>::kPixelBlock;

// Losses and weights of the n pixels from `pixel` on, whose logits are `block`.
template <class A>
void losses_of(const SoftmaxLoss<A>& loss, const A* block, int64_t pixel, int64_t n, A* kept,
               A* out, A* weight) {
  A best[kBlock], sum[kBlock] = {}, below[kBlock] = {};
  A weights = A(0);
  memcpy(best, block, sizeof best);
  for (int32_t c = 1; c < loss.classes; ++c) {
    const A* value = block + c * kBlock;
#pragma GCC ivdep
    for (int64_t i = 0; i < kBlock; ++i) best[i] = value[i] > best[i] ? value[i] : best[i];
  }
  for (int32_t c = 0; c < loss.classes; ++c) {
    const A* value = block + c * kBlock;
#pragma GCC ivdep
    for (int64_t i = 0; i < kBlock; ++i) sum[i] += exp_fast(value[i] - best[i]);
    if (loss.smoothing == A(0)) continue;
    weights += loss.weight_of_class(c);
#pragma GCC ivdep
    for (int64_t i = 0; i < kBlock; ++i) below[i] += loss.weight_of_class(c) * (best[i] - value[i]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t label = loss.label(pixel + i);
    const A picked = label < 0 ? A(0) : block[label * kBlock + i];
    loss.keep(kept, pixel + i, best[i], sum[i]);
    out[i] = loss.value(log_fast(sum[i]), best[i] - picked, below[i], weights, label, weight[i]);
  }
}

// BinaryLoss::Pixel as a struct of arrays, so that loops vectorise. Zeros behind the n-th.
template <class A>
struct BinaryBlock {
  A falls[kBlock] = {}, rises[kBlock] = {};

  template <class Scale>
  BinaryBlock(const BinaryLoss<A>& loss, int64_t pixel, int64_t n, const Scale& scale_of) {
    for (int64_t i = 0; i < n; ++i) {
      const auto state = loss.pixel(nullptr, pixel + i, scale_of(pixel + i), A(0));
      falls[i] = state.falls;
      rises[i] = state.rises;
    }
  }
};

template <class A>
void losses_of(const BinaryLoss<A>& loss, const A* block, int64_t pixel, int64_t n, A*, A* out,
               A* weight) {
  const BinaryBlock<A> state(loss, pixel, n, [](int64_t) { return A(1); });
#pragma GCC ivdep
  for (int64_t i = 0; i < kBlock; ++i)
    out[i] = BinaryLoss<A>::value({state.falls[i], state.rises[i]}, block[i]);
  for (int64_t i = 0; i < n; ++i) {
    weight[i] = loss.label(pixel + i) < 0 ? A(0) : A(1);
    if (weight[i] == A(0)) out[i] = A(0);
  }
}

template <class A, class P>
void forward_rows(const Where& where, const LossTables<A>& tables, const P& loss,
                  const LossOutputs& to) {
  const LogitTables<A>& l = tables.logits;
  A* kept = static_cast<A*>(to.kept);
  A* losses = static_cast<A*>(to.losses);
  parallel_chunks(where, l.batch * l.y.out, [&](int worker, Pieces& pieces) {
    LogitBlocks<A> source(l, worker);
    A out[kBlock], weight[kBlock];
    while (pieces.next()) {
      for (int64_t row = pieces.begin; row < pieces.end; ++row) {
        source.move_to(row / l.y.out, int32_t(row % l.y.out));
        double total = 0, weights = 0;
        for (int64_t x = 0; x < l.x.out; x += kBlock) {
          const int64_t n = l.x.out - x < kBlock ? l.x.out - x : kBlock;
          losses_of(loss, source.block(x), row * l.x.out + x, n, kept, out, weight);
          for (int64_t i = 0; i < n; ++i) {
            total += double(out[i]);
            weights += double(weight[i]);
          }
          if (losses != nullptr) memcpy(losses + row * l.x.out + x, out, size_t(n) * sizeof(A));
        }
        tables.partial[2 * row] = total;
        tables.partial[2 * row + 1] = weights;
      }
    }
  });
}

// The factor of a pixel's gradient.
template <class A>
struct PixelScale {
  Reduction reduction;
  const A* grad;
  const A* totals;

  A operator()(int64_t pixel) const {
    if (reduction == Reduction::kNone) return grad[pixel];
    return reduction == Reduction::kMean ? grad[0] / totals[1] : grad[0];
  }
};

// Replaces a block of logits by their gradients.
template <class A>
void gradients_of(const SoftmaxLoss<A>& loss, A* block, int64_t pixel, int64_t n, const A* kept,
                  A weights, const PixelScale<A>& scale_of) {
  typename SoftmaxLoss<A>::Pixel state[kBlock];
  A best[kBlock] = {}, softmax[kBlock] = {}, smooth[kBlock] = {}, counts[kBlock] = {};
  for (int64_t i = 0; i < n; ++i) {
    state[i] = loss.pixel(kept, pixel + i, scale_of(pixel + i), weights);
    best[i] = state[i].best;
    softmax[i] = state[i].softmax;
    smooth[i] = state[i].smooth;
    counts[i] = state[i].label < 0 ? A(0) : A(1);
  }
  for (int32_t c = 0; c < loss.classes; ++c) {
    A* value = block + c * kBlock;
    const A w = loss.weight_of_class(c);
    // The logits of an ignored pixel have no effect, not even a NaN.
    if (loss.smoothing == A(0)) {
#pragma GCC ivdep
      for (int64_t i = 0; i < kBlock; ++i) {
        const A e = softmax[i] * exp_fast(value[i] - best[i]);
        value[i] = counts[i] == A(0) ? A(0) : e;
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < kBlock; ++i) {
        const A e = softmax[i] * exp_fast(value[i] - best[i]) - smooth[i] * w;
        value[i] = counts[i] == A(0) ? A(0) : e;
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    if (state[i].label >= 0) block[state[i].label * kBlock + i] -= state[i].picked;
  }
}

template <class A>
void gradients_of(const BinaryLoss<A>& loss, A* block, int64_t pixel, int64_t n, const A*, A,
                  const PixelScale<A>& scale_of) {
  const BinaryBlock<A> state(loss, pixel, n, scale_of);
#pragma GCC ivdep
  for (int64_t i = 0; i < kBlock; ++i) {
    block[i] = BinaryLoss<A>::gradient_of({state.falls[i], state.rises[i]}, block[i]);
  }
}

// The gradients of rows of logits: sums over the output rows that read them, then along the width.
template <class A, class P>
class GradientRows {
 public:
  GradientRows(const LossTables<A>& tables, const P& loss, const LossCall& call,
               const LossGradient& g, int worker)
      : tables_(tables),
        l_(tables.logits),
        loss_(loss),
        g_(g),
        kept_(static_cast<const A*>(g.kept)),
        totals_(static_cast<const A*>(g.totals)),
        scale_of_{call.reduction, static_cast<const A*>(g.grad), totals_},
        source_(l_, worker),
        sums_(tables.sums + worker * l_.rows_stride()) {}

  // Rows [first, last) of one image's gradient. Continues the sums of the call before if that ended
  // at `first`.
  void rows(int64_t image, int32_t first, int32_t last) {
    if (image != image_ || first != row_) {
      memset(sums_, 0, size_t(l_.rows_stride()) * sizeof(A));
      y_ = tables_.y_begin[first];
    }
    int32_t next = first;
    const auto flush_before = [&](int32_t y) {
      for (; next < last && tables_.y_end[next] <= y; ++next) flush(image, next);
    };
    for (; y_ < tables_.y_end[last - 1]; ++y_) {
      flush_before(y_);
      source_.move_to(image, y_);
      for (int64_t x = 0; x < l_.x.out; x += kBlock) add_block(image, y_, x, first);
    }
    flush_before(l_.y.out);
    image_ = image;
    row_ = last;
  }

 private:
  // At most `taps` neighbouring rows are being summed at a time, among them rows beyond `last`.
  A* sums_of(int32_t row) const { return sums_ + (row % l_.taps) * l_.classes * l_.row_stride(); }

  void add_block(int64_t image, int32_t y, int64_t x, int32_t first) {
    const int64_t n = l_.x.out - x < kBlock ? l_.x.out - x : kBlock;
    const int64_t pixel = (image * l_.y.out + y) * l_.x.out + x;
    A* block = source_.block(x);
    gradients_of(loss_, block, pixel, n, kept_, totals_[2], scale_of_);
    const int taps = l_.y.kind == kIdentity ? 1 : l_.taps;
    for (int k = 0; k < taps; ++k) {
      const int32_t row = l_.y_taps.position[int64_t(k) * l_.y.out + y];
      if (row < first) continue;
      const A weight = l_.y_taps.weight[int64_t(k) * l_.y.out + y];
      A* sums = sums_of(row) + x;
      for (int32_t c = 0; c < l_.classes; ++c, sums += l_.row_stride()) {
        const A* from = block + c * kBlock;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) sums[i] += weight * from[i];
      }
    }
  }

  // Writes the gradient of a row from its sums, and clears them.
  void flush(int64_t image, int32_t row) const {
    const ReaderTable<A>& readers = tables_.x_readers;
    A* out = source_.line();
    for (int32_t c = 0; c < l_.classes; ++c) {
      A* sums = sums_of(row) + c * l_.row_stride();
      for (int32_t j = 0; j < l_.x.in; ++j) {
        const int64_t count = readers.offset[j + 1] - readers.offset[j];
        const A* weight = readers.weight + readers.offset[j];
        const A* from = sums + readers.begin[j];
        A sum = A(0);
        for (int64_t q = 0; q < count; ++q) sum += weight[q] * from[q];
        out[j] = sum;
      }
      memset(sums, 0, size_t(l_.row_stride()) * sizeof(A));
      const int64_t at = image * g_.strides.batch + c * g_.strides.channel + row * g_.strides.row;
      with_stored_type<A>(l_.type, [&](auto scalar) {
        auto* to = static_cast<decltype(scalar)*>(g_.grad_logits) + at;
        write_line(out, to, g_.strides.column, l_.x.in);
      });
    }
  }

  const LossTables<A>& tables_;
  const LogitTables<A>& l_;
  const P& loss_;
  const LossGradient& g_;
  const A* kept_;
  const A* totals_;
  PixelScale<A> scale_of_;
  LogitBlocks<A> source_;
  A* sums_;
  // Where the next call may continue: a row of logits, and the output row that comes next.
  int64_t image_ = -1;
  int32_t row_ = 0, y_ = 0;
};

template <class A, class P>
void backward_rows(const Where& where, const LossTables<A>& tables, const P& loss,
                   const LossCall& call, const LossGradient& g) {
  const int64_t height = tables.logits.y.in;
  parallel_chunks(where, tables.logits.batch * height, [&](int worker, Pieces& pieces) {
    GradientRows<A, P> work(tables, loss, call, g, worker);
    while (pieces.next()) {
      for (int64_t row = pieces.begin; row < pieces.end;) {
        const int64_t image = row / height;
        const int64_t stop = (image + 1) * height < pieces.end ? (image + 1) * height : pieces.end;
        work.rows(image, int32_t(row - image * height), int32_t(stop - image * height));
        row = stop;
      }
    }
  });
}

}  // namespace SK_ISA

template <Isa kIsa, class A>
void LossLoops<kIsa, A>::forward(const Where& where, const LossCall& call, const LossOutputs& to,
                                 const LossTables<A>& tables) {
  with_loss<A>(call, [&](const auto& loss) { forward_rows(where, tables, loss, to); });
}

template <Isa kIsa, class A>
void LossLoops<kIsa, A>::backward(const Where& where, const LossCall& call, const LossGradient& g,
                                  const LossTables<A>& tables) {
  with_loss<A>(call, [&](const auto& loss) { backward_rows(where, tables, loss, call, g); });
}

template struct LossLoops<Isa::SK_ISA, float>;
template struct LossLoops<Isa::SK_ISA, double>;

}  // namespace segkernels
