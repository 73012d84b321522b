// The weight gradient's Hopper kernel, and the fix-up of split tiles. As in
// dilated_conv2d.sm90a.cu, one block of 384 threads a multiprocessor: one thread issues TMA loads
// of the boxes of the gradient and the input, and two consumer warpgroups run wgmma for 64 output
// channels each. The operands' rows are pixels, along which the sum runs: both are MN-major.
#include "common/cuda_check.h"
#include "dilated_conv2d/weight_gradient.h"
#include "hopper/pipeline.h"
#include "hopper/tensor_map.h"

namespace segkernels::dilated {
namespace {

constexpr int kFixupThreads = 256, kFixupRows = 16;

template <int kChannels>
using Pipeline = hopper::Pipeline<kStageBytes<kChannels>, kStages<kChannels>>;

struct WeightMaps {
  CUtensorMap grad, input;
};

// The producer thread: loads for every step of every segment of its worker.
template <int kChannels>
__device__ void produce(const WeightMaps& maps, const WeightCall& c, Pipeline<kChannels> pipeline,
                        int worker) {
  for (int s = c.start[worker]; s < c.start[worker + 1]; ++s) {
    const Segment& segment = c.segments[s];
    const int steps = segment.end - segment.begin;
    const int first_row = segment.tile_row[0] * kTileRows,
              first_column = segment.column * kChannels;
    const StepBoxes shift = step_boxes(c, segment, StepWalk(segment, c.image_boxes));
    StepWalk walk(segment, c.image_boxes);
#pragma unroll 1
    for (int i = 0; i < steps; ++i, walk.next(), pipeline.next()) {
      const uint32_t full = pipeline.full_barrier();
      const int n = walk.channel_step * c.box[0], y = walk.y * c.box[1], x = walk.x * c.box[2];
      uint32_t to = pipeline.stage();
      hopper::mbarrier_wait(pipeline.empty_barrier(), pipeline.parity ^ 1);
      hopper::mbarrier_arrive_expect_tx(full, pipeline.kStageBytes);
#pragma unroll
      for (int block = 0; block < kTileRows; block += kBlockChannels, to += kBlockBytes) {
        hopper::tma_load(to, maps.grad, full, first_row + block, x, y, n);
      }
#pragma unroll
      for (int block = 0; block < kChannels; block += kBlockChannels, to += kBlockBytes) {
        hopper::tma_load(to, maps.input, full, first_column + block, x + shift.shift_x,
                         y + shift.shift_y, n);
      }
    }
  }
}

// A consumer warpgroup: 64 output channels of every tile.
template <class T, int kChannels>
__device__ void consume(const WeightCall& c, Pipeline<kChannels> pipeline, int worker, int group) {
  const int thread = threadIdx.x % kGroupThreads;
  const auto release = [thread](uint32_t empty) {
    if (thread == 0) hopper::mbarrier_arrive(empty, 0);
  };
  float sums[kChannels / 2] = {};
  for (int s = c.start[worker]; s < c.start[worker + 1]; ++s) {
    const Segment& segment = c.segments[s];
    const int steps = segment.end - segment.begin;
    uint32_t before = 0;
#pragma unroll 1
    for (int i = 0; i < steps; ++i, pipeline.next()) {
      const uint32_t grads = pipeline.stage() + group * kBlockBytes;
      const uint32_t inputs = pipeline.stage() + kPixelBytes;
      hopper::mbarrier_wait(pipeline.full_barrier(), pipeline.parity);
      hopper::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlockBytes; k += 16 * kStepBytes) {
        hopper::wgmma<T, kChannels, true>(sums, hopper::mn_major_descriptor(grads + k, kBlockBytes),
                                          hopper::mn_major_descriptor(inputs + k, kBlockBytes),
                                          i > 0 || k > 0);
      }
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();
      if (i > 0) release(before);
      before = pipeline.empty_barrier();
    }
    hopper::wgmma_wait<0>();
    hopper::fence_operands(sums);
    release(before);
    store_weight_sums<T, kChannels>(c, segment, group, thread, sums);
    __syncwarp();  // reconverges the warp
  }
}

template <class T, int kChannels>
__global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(kBlockThreads, 1)
    weight_kernel(const __grid_constant__ WeightMaps maps,
                  const __grid_constant__ WeightCall call) {
  extern __shared__ uint8_t shared[];
  const Pipeline<kChannels> pipeline(shared);
  if (threadIdx.x == 0) pipeline.init(kGroups);
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    hopper::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) produce<kChannels>(maps, call, pipeline, blockIdx.x);
  } else {
    hopper::setmaxnreg_inc<kConsumerRegisters>();
    consume<T, kChannels>(call, pipeline, blockIdx.x, threadIdx.x / kGroupThreads - 1);
  }
}

// A block: kFixupRows rows of a split tile. A thread: two channels of some of them.
template <class T>
__global__ void __launch_bounds__(kFixupThreads, 1)
    weight_fixup_kernel(const __grid_constant__ WeightCall call) {
  const int vectors = call.tile_channels / 2;
  const Fixup fixup = call.fixups[blockIdx.x];
  const int first = blockIdx.y * kFixupRows;
  for (int row = threadIdx.x / vectors; row < kFixupRows; row += kFixupThreads / vectors) {
    add_weight_slots<T>(call, fixup, first + row, 2 * (threadIdx.x % vectors));
  }
}

template <class T, int kChannels>
void launch(const Where& where, const WeightCall& c) {
  constexpr int kBytes = Pipeline<kChannels>::kBytes;
  if (c.segment_count > 0) {
    // Also binds the device's context to this thread, which encoding tensor maps needs.
    const auto kernel = weight_kernel<T, kChannels>;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
               "dilated_conv2d_weight: shared memory");
    const std::array<int, 4> box{kBlockChannels, c.box[2], c.box[1], c.box[0]};
    const WeightMaps maps{
        hopper::tensor_map<T, 4>(c.grad, {c.out_channels, c.out[1], c.out[0], c.batch}, box),
        hopper::tensor_map<T, 4>(c.input, {c.channels, c.in[1], c.in[0], c.batch}, box)};
    kernel<<<c.workers, kBlockThreads, kBytes, stream_of(where)>>>(maps, c);
    check_launch("dilated_conv2d_weight");
  }
  if (c.fixup_count == 0) return;
  const dim3 grid(unsigned(c.fixup_count), kTileRows / kFixupRows);
  weight_fixup_kernel<T><<<grid, kFixupThreads, 0, stream_of(where)>>>(c);
  check_launch("dilated_conv2d_weight_fixup");
}

template <class T>
void launch_tile(const Where& where, const WeightCall& c) {
  if (c.tile_channels == 256) return launch<T, 256>(where, c);
  if (c.tile_channels == 128) return launch<T, 128>(where, c);
  if (c.tile_channels == 64) return launch<T, 64>(where, c);
  throw std::runtime_error("segkernels: dilated_conv2d_weight: no kernel for this tile");
}

}  // namespace

void weight_gradient_sm90(const Where& where, const WeightCall& call) {
  const DeviceGuard guard(where.device);
  if (call.type == ScalarType::kHalf) return launch_tile<Half>(where, call);
  if (call.type == ScalarType::kBFloat16) return launch_tile<BFloat16>(where, call);
  throw std::runtime_error("segkernels: dilated_conv2d_weight: only float16 and bfloat16");
}

}  // namespace segkernels::dilated
