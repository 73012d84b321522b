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
  A best[kBlock], sum[kBlock] = {}, weighted[kBlock] = {};
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
    for (int64_t i = 0; i < kBlock; ++i) weighted[i] += loss.weight_of_class(c) * value[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t label = loss.label(pixel + i);
    const A lse = best[i] + log_fast(sum[i]);
    const A picked = label < 0 ? A(0) : block[label * kBlock + i];
    kept[pixel + i] = lse;
    out[i] = loss.value(lse, picked, weighted[i], weights, label, weight[i]);
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

template <class T, int K, class P>
void forward_rows(const Where& where, const LossTables<T>& tables, const P& loss,
                  const LossOutputs& to) {
  using A = Acc<T>;
  const Logits<T>& l = tables.logits.logits;
  A* kept = static_cast<A*>(to.kept);
  A* losses = static_cast<A*>(to.losses);
  parallel_chunks(where, l.batch * l.y.out, [&](int64_t thread, int64_t begin, int64_t end) {
    LogitBlocks<T, K> source(tables.logits, thread);
    A out[kBlock], weight[kBlock];
    for (int64_t row = begin; row < end; ++row) {
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
  });
}

// Replaces a block of logits by their gradients.
template <class A, class Scale>
void gradients_of(const SoftmaxLoss<A>& loss, A* block, int64_t pixel, int64_t n, const A* kept,
                  A weights, const Scale& scale_of) {
  typename SoftmaxLoss<A>::Pixel state[kBlock];
  A lse[kBlock] = {}, softmax[kBlock] = {}, smooth[kBlock] = {};
  for (int64_t i = 0; i < n; ++i) {
    state[i] = loss.pixel(kept, pixel + i, scale_of(pixel + i), weights);
    lse[i] = state[i].lse;
    softmax[i] = state[i].softmax;
    smooth[i] = state[i].smooth;
  }
  for (int32_t c = 0; c < loss.classes; ++c) {
    A* value = block + c * kBlock;
    const A w = loss.weight_of_class(c);
    // The logits of an ignored pixel have no effect, not even a NaN.
    if (loss.smoothing == A(0)) {
#pragma GCC ivdep
      for (int64_t i = 0; i < kBlock; ++i) {
        const A e = softmax[i] * exp_fast(value[i] - lse[i]);
        value[i] = softmax[i] == A(0) ? A(0) : e;
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < kBlock; ++i) {
        const A e = softmax[i] * exp_fast(value[i] - lse[i]);
        value[i] = (softmax[i] == A(0) ? A(0) : e) - smooth[i] * w;
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    if (state[i].label >= 0) block[state[i].label * kBlock + i] -= state[i].picked;
  }
}

template <class A, class Scale>
void gradients_of(const BinaryLoss<A>& loss, A* block, int64_t pixel, int64_t n, const A*, A,
                  const Scale& scale_of) {
  const BinaryBlock<A> state(loss, pixel, n, scale_of);
#pragma GCC ivdep
  for (int64_t i = 0; i < kBlock; ++i) {
    block[i] = BinaryLoss<A>::gradient_of({state.falls[i], state.rises[i]}, block[i]);
  }
}

// The gradient of one row of logits, from its sums over output rows, which it clears.
template <class T>
void flush_row(const LossTables<T>& tables, Acc<T>* sums, T* out, const Strides& strides) {
  using A = Acc<T>;
  const Logits<T>& l = tables.logits.logits;
  for (int32_t c = 0; c < l.classes; ++c) {
    A* row = sums + c * tables.logits.row_stride();
    for (int32_t j = 0; j < l.x.in; ++j) {
      const int64_t count = tables.x_readers.offset[j + 1] - tables.x_readers.offset[j];
      const A* weight = tables.x_readers.weight + tables.x_readers.offset[j];
      const A* from = row + tables.x_readers.begin[j];
      A sum = A(0);
      for (int64_t q = 0; q < count; ++q) sum += weight[q] * from[q];
      narrow(sum, out[c * strides.channel + j * strides.column]);
    }
    memset(row, 0, size_t(tables.logits.row_stride()) * sizeof(A));
  }
}

template <class T, int K, class P>
class GradientRows {
 public:
  using A = Acc<T>;

  GradientRows(const LossTables<T>& tables, const P& loss, Reduction reduction,
               const LossGradient& g, int64_t thread)
      : tables_(tables),
        loss_(loss),
        reduction_(reduction),
        g_(g),
        grad_(static_cast<const A*>(g.grad)),
        kept_(static_cast<const A*>(g.kept)),
        totals_(static_cast<const A*>(g.totals)),
        source_(tables.logits, thread),
        sums_(tables.sums + thread * tables.logits.rows_stride()) {
    memset(sums_, 0, size_t(tables.logits.rows_stride()) * sizeof(A));
  }

  // Rows [first, last) of one image's gradient.
  void rows(int64_t image, int32_t first, int32_t last) {
    const Logits<T>& l = tables_.logits.logits;
    T* out = static_cast<T*>(g_.grad_logits) + image * g_.strides.batch;
    int32_t next = first;
    const auto flush_before = [&](int32_t y) {
      for (; next < last && tables_.y_end[next] <= y; ++next) {
        flush_row(tables_, sums_of(next), out + next * g_.strides.row, g_.strides);
      }
    };
    for (int32_t y = tables_.y_begin[first]; y < tables_.y_end[last - 1]; ++y) {
      flush_before(y);
      source_.move_to(image, y);
      for (int64_t x = 0; x < l.x.out; x += kBlock) add_block(image, y, x, first, last);
    }
    flush_before(l.y.out);
  }

 private:
  // At most K neighbouring rows are being summed at a time.
  A* sums_of(int32_t row) const {
    return sums_ + (row % K) * tables_.logits.logits.classes * tables_.logits.row_stride();
  }

  void add_block(int64_t image, int32_t y, int64_t x, int32_t first, int32_t last) {
    const Logits<T>& l = tables_.logits.logits;
    const int64_t n = l.x.out - x < kBlock ? l.x.out - x : kBlock;
    const int64_t pixel = (image * l.y.out + y) * l.x.out + x;
    A* block = const_cast<A*>(source_.block(x));
    gradients_of(loss_, block, pixel, n, kept_, totals_[2], [&](int64_t i) {
      if (reduction_ == Reduction::kNone) return grad_[i];
      return reduction_ == Reduction::kMean ? grad_[0] / totals_[1] : grad_[0];
    });
    const int taps = l.y.kind == kIdentity ? 1 : K;
    for (int k = 0; k < taps; ++k) {
      const int32_t row = tables_.logits.y.position[int64_t(k) * l.y.out + y];
      if (row < first || row >= last) continue;
      const A weight = tables_.logits.y.weight[int64_t(k) * l.y.out + y];
      A* sums = sums_of(row) + x;
      for (int32_t c = 0; c < l.classes; ++c, sums += tables_.logits.row_stride()) {
        const A* from = block + c * kBlock;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) sums[i] += weight * from[i];
      }
    }
  }

  const LossTables<T>& tables_;
  const P& loss_;
  Reduction reduction_;
  const LossGradient& g_;
  const A* grad_;
  const A* kept_;
  const A* totals_;
  LogitBlocks<T, K> source_;
  A* sums_;
};

template <class T, int K, class P>
void backward_rows(const Where& where, const LossTables<T>& tables, const P& loss,
                   const LossCall& call, const LossGradient& g) {
  const int64_t height = tables.logits.logits.y.in;
  parallel_chunks(
      where, tables.logits.logits.batch * height, [&](int64_t thread, int64_t begin, int64_t end) {
        GradientRows<T, K, P> work(tables, loss, call.reduction, g, thread);
        for (int64_t row = begin; row < end;) {
          const int64_t image = row / height;
          const int64_t stop = (image + 1) * height < end ? (image + 1) * height : end;
          work.rows(image, int32_t(row - image * height), int32_t(stop - image * height));
          row = stop;
        }
      });
}

}  // namespace SK_ISA

template <Isa kIsa, class T>
void LossLoops<kIsa, T>::forward(const Where& where, const LossCall& call, const LossOutputs& to,
                                 const LossTables<T>& tables) {
  with_loss<T>(call, [&](auto taps, const auto& loss) {
    forward_rows<T, taps.value>(where, tables, loss, to);
  });
}

template <Isa kIsa, class T>
void LossLoops<kIsa, T>::backward(const Where& where, const LossCall& call, const LossGradient& g,
                                  const LossTables<T>& tables) {
  with_loss<T>(call, [&](auto taps, const auto& loss) {
    backward_rows<T, taps.value>(where, tables, loss, call, g);
  });
}

template struct LossLoops<Isa::SK_ISA, Half>;
template struct LossLoops<Isa::SK_ISA, BFloat16>;
template struct LossLoops<Isa::SK_ISA, float>;
template struct LossLoops<Isa::SK_ISA, double>;

}  // namespace segkernels
