// Losses of upsampled logits on CUDA, with the functors of upsample_cross_entropy.h. Forward: a
// block reduces pixels with CUB, then one block reduces the blocks' sums. Backward: a block a tile,
// partial sums in shared memory.
#include <cub/block/block_reduce.cuh>
#include <type_traits>

#include "interpolate/launch.h"
#include "upsample_cross_entropy/upsample_cross_entropy.h"

namespace segkernels {
namespace {

// f(T{}, integral_constant<K>, loss).
template <class F>
void with_typed_loss(const LossCall& call, const F& f) {
  with_logits(call.resampling, call.type, [&](auto scalar, auto taps) {
    with_loss<Acc<decltype(scalar)>>(call, [&](const auto& loss) { f(scalar, taps, loss); });
  });
}

using BlockSum = cub::BlockReduce<double, kThreads>;

// Leaves both sums in the first thread.
__device__ void sum_block(double& a, double& b) {
  __shared__ typename BlockSum::TempStorage memory;
  a = BlockSum(memory).Sum(a);
  __syncthreads();
  b = BlockSum(memory).Sum(b);
}

template <class F>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(F f, double* partial) {
  double total = 0, weight = 0;
  const int64_t count = f.count();
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * blockDim.x) {
    f(i, total, weight);
  }
  sum_block(total, weight);
  if (threadIdx.x == 0) {
    partial[2 * blockIdx.x] = total;
    partial[2 * blockIdx.x + 1] = weight;
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    totals_kernel(const double* partial, int blocks, const A* class_weights, int classes, bool mean,
                  A* totals) {
  double total = 0, weight = 0, sum = 0, unused = 0;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
    total += partial[2 * i];
    weight += partial[2 * i + 1];
  }
  for (int c = threadIdx.x; c < classes; c += blockDim.x)
    sum += class_weights != nullptr ? double(class_weights[c]) : 1.0;
  sum_block(total, weight);
  __syncthreads();
  sum_block(sum, unused);
  if (threadIdx.x == 0) {
    totals[0] = A(mean ? mean_loss(total, weight) : total);
    totals[1] = A(weight);
    totals[2] = A(sum);
  }
}

}  // namespace

void upsample_loss_cuda(const Where& where, const LossCall& call, const LossOutputs& to) {
  const DeviceGuard guard(where.device);
  with_typed_loss(call, [&](auto scalar, auto taps, const auto& loss) {
    using T = decltype(scalar);
    using A = Acc<T>;
    const LossForward<T, taps.value, std::decay_t<decltype(loss)>> f{
        logits_of<T>(call), loss, static_cast<A*>(to.kept), static_cast<A*>(to.losses)};
    double* partial = static_cast<double*>(to.workspace);
    // The number of blocks, and so the order of summation, depends on the sizes alone.
    const int64_t wanted = (f.count() + kThreads - 1) / kThreads;
    const int blocks = int(wanted < kMaxPartials ? wanted : kMaxPartials);
    if (blocks > 0) {
      forward_kernel<<<blocks, kThreads, 0, stream_of(where)>>>(f, partial);
      check_launch("upsample_cross_entropy");
    }
    const A* class_weights = call.binary ? nullptr : static_cast<const A*>(call.weight);
    totals_kernel<A><<<1, kThreads, 0, stream_of(where)>>>(
        partial, blocks, class_weights, call.classes, call.reduction == Reduction::kMean,
        static_cast<A*>(to.totals));
    check_launch("upsample_cross_entropy");
  });
}

void upsample_loss_backward_cuda(const Where& where, const LossCall& call, const LossGradient& g) {
  const DeviceGuard guard(where.device);
  with_typed_loss(call, [&](auto scalar, auto taps, const auto& loss) {
    using T = decltype(scalar);
    using A = Acc<T>;
    using P = std::decay_t<decltype(loss)>;
    LossBackward<T, taps.value, P> f{logits_of<T>(call),
                                     loss,
                                     {},
                                     call.reduction,
                                     static_cast<const A*>(g.grad),
                                     static_cast<const A*>(g.kept),
                                     static_cast<const A*>(g.totals),
                                     static_cast<T*>(g.grad_logits),
                                     g.strides};
    if (!tile_losses<taps.value, P>(f.logits, call.resampling.taps(), f.tiling)) {
      throw std::runtime_error(
          "segkernels: upsample_cross_entropy: the output is too wide for logits this narrow");
    }
    const int64_t bytes = int64_t(f.tiling.rows) * f.tiling.span * f.kChannels * int64_t(sizeof(A));
    launch_tiles(where, f, bytes, "upsample_cross_entropy_backward");
  });
}

}  // namespace segkernels
