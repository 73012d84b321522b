// The convolution's persistent, warp-specialised Hopper kernel, and the fix-up of split tiles.
//
// A multiprocessor runs one block of 384 threads for the whole launch. One thread of the producer
// warpgroup issues TMA loads into the stages of a pipeline (the input's box, with zeros around the
// image, and the weights); two consumer warpgroups run wgmma for 64 pixels each. In a cluster of
// two, the blocks run the same loop on different tiles, and each loads half of the weights for both
// by multicast, so a stage is empty when the consumers of both blocks have released it.
#include "common/cuda_check.h"
#include "dilated_conv2d/dilated_conv2d.h"
#include "hopper/pipeline.h"
#include "hopper/tensor_map.h"

namespace segkernels::dilated {
namespace {

constexpr int kFixupThreads = 256, kFixupRows = 16;

template <int kChannels>
using Pipeline = hopper::Pipeline<kStageBytes<kChannels>, kStages<kChannels>>;

struct TensorMaps {
  CUtensorMap input;
  CUtensorMap weight[kMaxBranches];
};

// The producer thread: loads for every step of every segment of its worker.
template <class T, int kChannels, int kCluster>
__device__ void produce(const TensorMaps& maps, const ConvCall& c, Pipeline<kChannels> pipeline,
                        int worker, int rank) {
  constexpr int kStepChannels = kStepBytes / sizeof(T);
  constexpr int kRows = kChannels / kCluster;  // of the weights, loaded by this block
  const int32_t channel_steps = int32_t((c.channels + kStepChannels - 1) / kStepChannels);
  for (int s = c.start[worker]; s < c.start[worker + 1]; ++s) {
    const Segment& segment = c.segments[s];
    const int steps = segment.end - segment.begin;
    const ConvBranch& branch = c.branch[segment.branch];
    const CUtensorMap& weight = maps.weight[segment.branch];
    const BoxOrigin origin = box_origin(c, segment.tile_row[rank]);
    const int first_channel = segment.column * kChannels + rank * kRows;
    StepWalk walk(segment, channel_steps);
#pragma unroll 1
    for (int i = 0; i < steps; ++i, walk.next(), pipeline.next()) {
      const int channel = walk.channel_step * kStepChannels;
      const uint32_t to = pipeline.stage(), full = pipeline.full_barrier();
      const uint32_t to_weights = to + kPixelBytes + rank * kRows * kStepBytes;
      const int tap = walk.y * branch.kernel[1] + walk.x;
      hopper::mbarrier_wait(pipeline.empty_barrier(), pipeline.parity ^ 1);
      hopper::mbarrier_arrive_expect_tx(full,
                                        (c.box[0] * c.box[1] * c.box[2] + kChannels) * kStepBytes);
      hopper::tma_load(to, maps.input, full, channel,
                       origin.x + walk.x * branch.dilation[1] - branch.padding[1],
                       origin.y + walk.y * branch.dilation[0] - branch.padding[0], origin.n);
      if constexpr (kCluster == 2) {
        hopper::tma_load_multicast(to_weights, weight, full, channel, tap, first_channel);
      } else {
        hopper::tma_load(to_weights, weight, full, channel, tap, first_channel);
      }
    }
  }
}

// A consumer warpgroup: 64 pixels of every tile. One wgmma group is always in flight: after the
// next is committed and the previous is done, the previous stage is released.
template <class T, int kChannels, int kCluster>
__device__ void consume(const ConvCall& c, Pipeline<kChannels> pipeline, int worker, int rank,
                        int group) {
  const int thread = threadIdx.x % kGroupThreads;
  const auto release = [thread](uint32_t empty) {
    if (thread < kCluster) hopper::mbarrier_arrive(empty, thread);
  };
  float sums[kChannels / 2] = {};
  for (int s = c.start[worker]; s < c.start[worker + 1]; ++s) {
    const Segment& segment = c.segments[s];
    const int steps = segment.end - segment.begin;
    uint32_t before = 0;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, pipeline.next()) {
      const uint32_t pixels = pipeline.stage() + group * kGroupPixels * kStepBytes;
      const uint32_t weights = pipeline.stage() + kPixelBytes;
      hopper::mbarrier_wait(pipeline.full_barrier(), pipeline.parity);
      hopper::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStepBytes; k += 32) {
        hopper::wgmma<T, kChannels>(sums, hopper::k_major_descriptor(pixels + k),
                                    hopper::k_major_descriptor(weights + k), i > 0 || k > 0);
      }
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();
      if (i > 0) release(before);
      before = pipeline.empty_barrier();
    }
    hopper::wgmma_wait<0>();
    hopper::fence_operands(sums);
    release(before);
    store_sums<T, kChannels>(c, segment, rank, group, thread, sums);
    __syncwarp();  // reconverges the warp
  }
}

template <class T, int kChannels, int kCluster>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kBlockThreads, 1)
    conv_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ ConvCall call) {
  extern __shared__ uint8_t shared[];
  const Pipeline<kChannels> pipeline(shared);
  const int rank = kCluster == 1 ? 0 : hopper::cluster_rank();
  const int worker = blockIdx.x / kCluster;
  if (threadIdx.x == 0) pipeline.init(kGroups * kCluster);
  hopper::cluster_sync();
  if (threadIdx.x < kGroupThreads) {
    hopper::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) produce<T, kChannels, kCluster>(maps, call, pipeline, worker, rank);
    __syncwarp();
  } else {
    hopper::setmaxnreg_inc<kConsumerRegisters>();
    consume<T, kChannels, kCluster>(call, pipeline, worker, rank, threadIdx.x / kGroupThreads - 1);
  }
  // A block must not exit while the other of its cluster may write to its shared memory.
  hopper::cluster_sync();
}

// A block: kFixupRows pixels of a split tile. A thread: two channels of some of them.
template <class T>
__global__ void __launch_bounds__(kFixupThreads, 1)
    fixup_kernel(const __grid_constant__ ConvCall call) {
  const int vectors = call.tile_channels / 2;
  const Fixup fixup = call.fixups[blockIdx.x];
  const int first = blockIdx.y * kFixupRows;
  for (int row = threadIdx.x / vectors; row < kFixupRows; row += kFixupThreads / vectors) {
    add_slots<T>(call, fixup, first + row, 2 * (threadIdx.x % vectors));
  }
}

template <class T, int kChannels, int kCluster>
void launch(const Where& where, const ConvCall& c) {
  constexpr int kStepChannels = kStepBytes / sizeof(T);
  constexpr int kBytes = Pipeline<kChannels>::kBytes;
  if (c.segment_count > 0) {
    // Also binds the device's context to this thread, which encoding tensor maps needs.
    const auto kernel = conv_kernel<T, kChannels, kCluster>;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
               "dilated_conv2d: shared memory");
    TensorMaps maps{};
    maps.input = hopper::tensor_map<T, 4>(c.input, {c.channels, c.in[1], c.in[0], c.batch},
                                          {kStepChannels, c.box[2], c.box[1], c.box[0]});
    for (int i = 0; i < c.branches; ++i) {
      const ConvBranch& b = c.branch[i];
      maps.weight[i] = hopper::tensor_map<T, 3>(
          b.weight, {c.channels, int64_t(b.kernel[0]) * b.kernel[1], b.out_channels},
          {kStepChannels, 1, kChannels / kCluster});
    }
    kernel<<<c.workers * kCluster, kBlockThreads, kBytes, stream_of(where)>>>(maps, c);
    check_launch("dilated_conv2d");
  }
  if (c.fixup_count == 0) return;
  const dim3 grid(unsigned(c.fixup_count), kTilePixels / kFixupRows);
  fixup_kernel<T><<<grid, kFixupThreads, 0, stream_of(where)>>>(c);
  check_launch("dilated_conv2d_fixup");
}

template <class T>
void launch_tile(const Where& where, const ConvCall& c) {
  const auto is = [&c](int channels, int cluster) {
    return c.tile_channels == channels && c.cluster == cluster;
  };
  if (is(256, 2)) return launch<T, 256, 2>(where, c);
  if (is(256, 1)) return launch<T, 256, 1>(where, c);
  if (is(128, 2)) return launch<T, 128, 2>(where, c);
  if (is(128, 1)) return launch<T, 128, 1>(where, c);
  if (is(64, 1)) return launch<T, 64, 1>(where, c);
  if (is(32, 1)) return launch<T, 32, 1>(where, c);
  throw std::runtime_error("segkernels: dilated_conv2d: no kernel for this tile");
}

}  // namespace

void dilated_conv2d_sm90(const Where& where, const ConvCall& call) {
  const DeviceGuard guard(where.device);
  switch (call.type) {
    case ScalarType::kHalf:
      return launch_tile<Half>(where, call);
    case ScalarType::kBFloat16:
      return launch_tile<BFloat16>(where, call);
    case ScalarType::kFloat:
      return launch_tile<float>(where, call);
    case ScalarType::kDouble:
      break;
  }
  throw std::runtime_error("segkernels: dilated_conv2d: no kernel for float64");
}

}  // namespace segkernels::dilated
