// Kernels with one fault each, and some without. test_faults.py compiles this file and checks what
// the emulation prints.
#include <cuda_runtime.h>
#include <stdio.h>

#include <cub/block/block_reduce.cuh>
#include <cub/device/device_scan.cuh>

__global__ void barrier(float* out) {
  __shared__ float held[64];
  held[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = held[63 - threadIdx.x];
}
__global__ void missing_barrier(float* out) {
  __shared__ float held[64];
  held[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = held[63 - threadIdx.x];
}
__global__ void lanes_missing(float* out) {
  float v = float(threadIdx.x);
  if (threadIdx.x < 20) v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
  __syncthreads();
  out[threadIdx.x] = v;
}
__global__ void lane_gone(float* out) {
  if (threadIdx.x % 32 == 31) return;
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, float(threadIdx.x), 1);
}
__global__ void outside_its_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, float(threadIdx.x), 1);
}
__global__ void storage_reused(float* out) {
  using Sum = cub::BlockReduce<float, 64>;
  __shared__ typename Sum::TempStorage memory;
  const float a = Sum(memory).Sum(1.0f);
  const float b = Sum(memory).Sum(2.0f);  // no barrier between
  if (threadIdx.x == 0) out[0] = a, out[1] = b;
}
__global__ void past_shared(float* out) {
  extern __shared__ float memory[];
  memory[threadIdx.x + 1] = 1;  // one past the last
  __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x];
}
__global__ void blocks_collide(float* out) { out[threadIdx.x] = float(blockIdx.x); }
__global__ void same_value(float* out) { out[0] = 1; }
__global__ void not_initialised(float* out) {
  __shared__ float held[64];
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x];
}
__global__ void early_exit(float* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void past_global(float* out, int count) {
  for (int i = threadIdx.x; i <= count; i += blockDim.x) out[i] = 1;
}
__global__ void misaligned(float* out) {
  struct alignas(16) Four {
    float v[4];
  };
  *reinterpret_cast<Four*>(out + 1) = Four{};
}
struct Large {
  char bytes[4100];
};
__global__ void large_parameter(Large, float*) {}

template <class F>
void attempt(const char* name, const F& f) {
  float* const out = static_cast<float*>(aligned_alloc(64, 64 * sizeof(float)));
  for (int i = 0; i < 64; ++i) out[i] = -1;
  try {
    f(out);
    const cudaError_t error = cudaGetLastError();
    printf("%s: %s, %g\n", name, cudaGetErrorString(error), out[0]);
  } catch (const std::exception& e) {
    printf("%s: %s\n", name, e.what());
  }
  fflush(stdout);
  free(out);
}

int main(int count, char** names) {
  const std::string only = count > 1 ? names[1] : "";
  const auto run = [&](const char* name, const auto& f) {
    if (only == name) attempt(name, f);
  };
  run("barrier", [](float* out) { barrier<<<1, 64>>>(out); });
  run("missing_barrier", [](float* out) { missing_barrier<<<1, 64>>>(out); });
  run("lanes_missing", [](float* out) { lanes_missing<<<1, 64>>>(out); });
  run("lane_gone", [](float* out) { lane_gone<<<1, 64>>>(out); });
  run("outside_its_mask", [](float* out) { outside_its_mask<<<1, 64>>>(out); });
  run("storage_reused", [](float* out) { storage_reused<<<1, 64>>>(out); });
  run("past_shared", [](float* out) { past_shared<<<1, 64, 256>>>(out); });
  run("blocks_collide", [](float* out) { blocks_collide<<<2, 64>>>(out); });
  run("same_value", [](float* out) { same_value<<<2, 64>>>(out); });
  run("not_initialised", [](float* out) { not_initialised<<<1, 64>>>(out); });
  run("early_exit", [](float* out) { early_exit<<<1, 64>>>(out); });
  run("past_global", [](float* out) { past_global<<<1, 32>>>(out, 64); });
  run("misaligned", [](float* out) { misaligned<<<1, 1>>>(out); });
  run("no_blocks", [](float* out) { barrier<<<0, 64>>>(out); });
  run("2048_threads", [](float* out) { barrier<<<1, 2048>>>(out); });
  run("64_kb", [](float* out) { past_shared<<<1, 63, 65536>>>(out); });
  run("large_parameter", [](float* out) { large_parameter<<<1, 1>>>(Large{}, out); });
  run("small_workspace", [](float* out) {
    int counts[100] = {};
    size_t bytes = 0;
    cub::DeviceScan::ExclusiveSum(nullptr, bytes, counts, counts, 100);
    bytes -= 1;
    std::vector<char> memory(bytes);
    const auto error = cub::DeviceScan::ExclusiveSum(memory.data(), bytes, counts, counts, 100);
    throw std::runtime_error(std::string(cudaGetErrorString(error)) + std::to_string(out[0] > 0));
  });
  run("another_stream", [](float* out) {
    emulation_expect(0, reinterpret_cast<void*>(16));
    barrier<<<1, 64>>>(out);
  });
  run("synchronises", [](float*) {
    emulation_capture(1);
    throw std::runtime_error(cudaGetErrorString(cudaDeviceSynchronize()));
  });
  return 0;
}
