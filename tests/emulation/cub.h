// CUB's collectives and thrust's iterators, as far as this project uses them. Block collectives
// keep CUB's contract: they write shared memory, then read it behind a barrier, with no barrier at
// the end, so that a caller who reuses the memory without __syncthreads() has a race. Sums are in
// CUB's order (in warps, then over warps). The device-wide workspace has at least CUB's size and is
// filled with garbage, so that one that is too small or shared shows.
#pragma once

namespace cub {

namespace emulated {

template <int kThreads>
void check_block(const char* what) {
  if (blockDim.x * blockDim.y * blockDim.z != kThreads)
    ::emulation::fail(std::string(what) + " for another size of block");
}

inline cudaError_t workspace(void* given, size_t& bytes, size_t needed) {
  if (given == nullptr) {
    bytes = needed;
    return cudaSuccess;
  }
  if (bytes < needed) return cudaErrorInvalidValue;
  memset(given, 0xA5, needed);
  return cudaSuccess;
}

}  // namespace emulated

template <class Key, int kThreads, int kItems, class Value>
class BlockRadixSort {
 public:
  struct TempStorage {
    Key keys[kThreads * kItems];
    Value values[kThreads * kItems];
  };
  explicit BlockRadixSort(TempStorage& s) : s_(s) {}

  void Sort(Key (&key)[kItems], Value (&value)[kItems], int begin = 0, int end = 8 * sizeof(Key)) {
    emulated::check_block<kThreads>("BlockRadixSort");
    if (begin < 0 || end > int(8 * sizeof(Key)) || begin >= end)
      ::emulation::fail("BlockRadixSort of such bits");
    const int base = int(threadIdx.x) * kItems;
    for (int i = 0; i < kItems; ++i) {
      s_.keys[base + i] = key[i];
      s_.values[base + i] = value[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) sort(begin, end);
    __syncthreads();
    for (int i = 0; i < kItems; ++i) {
      key[i] = s_.keys[base + i];
      value[i] = s_.values[base + i];
    }
  }

 private:
  void sort(int begin, int end) {
    ::emulation::pause_races(true);
    const uint64_t mask = ((uint64_t(1) << (end - begin)) - 1) << begin;
    std::vector<std::pair<Key, Value>> items(kThreads * kItems);
    for (size_t i = 0; i < items.size(); ++i) items[i] = {s_.keys[i], s_.values[i]};
    std::stable_sort(items.begin(), items.end(), [&](const auto& a, const auto& b) {
      return (uint64_t(a.first) & mask) < (uint64_t(b.first) & mask);
    });
    for (size_t i = 0; i < items.size(); ++i) {
      s_.keys[i] = items[i].first;
      s_.values[i] = items[i].second;
    }
    ::emulation::pause_races(false);
  }
  TempStorage& s_;
};

template <class T, int kThreads>
class BlockDiscontinuity {
 public:
  struct TempStorage {
    T last[kThreads];
  };
  explicit BlockDiscontinuity(TempStorage& s) : s_(s) {}

  template <int kItems, class Flag, class Op>
  void FlagHeads(Flag (&head)[kItems], T (&input)[kItems], Op op) {
    emulated::check_block<kThreads>("BlockDiscontinuity");
    s_.last[threadIdx.x] = input[kItems - 1];
    __syncthreads();
    head[0] = threadIdx.x == 0 ? Flag(1) : Flag(op(s_.last[threadIdx.x - 1], input[0]));
    for (int i = 1; i < kItems; ++i) head[i] = Flag(op(input[i - 1], input[i]));
  }

 private:
  TempStorage& s_;
};

template <class T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T of_thread[kThreads];
  };
  explicit BlockScan(TempStorage& s) : s_(s) {}

  template <int kItems, class Op>
  void InclusiveScan(T (&input)[kItems], T (&output)[kItems], Op op) {
    T unused;
    scan(input, output, op, unused);
  }
  template <int kItems>
  void InclusiveSum(T (&input)[kItems], T (&output)[kItems], T& all) {
    scan(input, output, [](T a, T b) { return a + b; }, all);
  }

 private:
  template <int kItems, class Op>
  void scan(T (&input)[kItems], T (&output)[kItems], Op op, T& all) {
    emulated::check_block<kThreads>("BlockScan");
    output[0] = input[0];
    for (int i = 1; i < kItems; ++i) output[i] = op(output[i - 1], input[i]);
    s_.of_thread[threadIdx.x] = output[kItems - 1];
    __syncthreads();
    all = s_.of_thread[0];
    T before = all;
    for (int i = 1; i < kThreads; ++i) {
      if (i == int(threadIdx.x)) before = all;
      all = op(all, s_.of_thread[i]);
    }
    if (threadIdx.x == 0) return;
    for (int i = 0; i < kItems; ++i) output[i] = op(before, output[i]);
  }
  TempStorage& s_;
};

template <class T, int kThreads>
class BlockReduce {
 public:
  struct TempStorage {
    T warps[(kThreads + 31) / 32];
  };
  explicit BlockReduce(TempStorage& s) : s_(s) {}

  // Valid in thread 0 only; the others get arbitrary values.
  T Sum(T value) {
    emulated::check_block<kThreads>("BlockReduce");
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    for (int step = 1; step < 32; step *= 2) {
      const T other = __shfl_down_sync(0xFFFFFFFFu, value, step);
      if (lane + step < 32) value = value + other;
    }
    if (lane == 0) s_.warps[warp] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < (kThreads + 31) / 32; ++i) value = value + s_.warps[i];
    }
    return value;
  }

 private:
  TempStorage& s_;
};

struct DeviceScan {
  template <class In, class Out, class N>
  static cudaError_t ExclusiveSum(void* memory, size_t& bytes, In in, Out out, N count,
                                  cudaStream_t stream = nullptr) {
    const bool query = memory == nullptr;
    const size_t tiles = (size_t(count) + 1919) / 1920;
    if (const auto e = emulated::workspace(memory, bytes, 767 + 16 * (tiles + 32))) return e;
    if (query) return cudaSuccess;
    ::emulation::check_stream(stream, "DeviceScan");
    std::decay_t<decltype(*in)> sum = 0;
    for (N i = 0; i < count; ++i) {
      const auto value = in[i];
      out[i] = sum;
      sum += value;
    }
    return cudaSuccess;
  }
};

struct DeviceRadixSort {
  template <class K, class V, class N>
  static cudaError_t SortPairs(void* memory, size_t& bytes, const K* keys, K* keys_out,
                               const V* values, V* values_out, N count, int begin = 0,
                               int end = 8 * sizeof(K), cudaStream_t stream = nullptr) {
    const bool query = memory == nullptr;
    if (begin < 0 || end > int(8 * sizeof(K)) || begin >= end) return cudaErrorInvalidValue;
    const size_t passes = (size_t(end - begin) + 7) / 8;
    const size_t needed = 1024 + passes * 1024 + size_t(count) * (sizeof(K) + sizeof(V));
    if (const auto e = emulated::workspace(memory, bytes, needed)) return e;
    if (query) return cudaSuccess;
    ::emulation::check_stream(stream, "DeviceRadixSort");
    if (overlap(keys, keys_out, count) || overlap(values, values_out, count))
      return cudaErrorInvalidValue;
    const uint64_t mask = ((uint64_t(1) << (end - begin)) - 1) << begin;
    const auto bits = [&](K k) {
      const uint64_t all = uint64_t(std::make_unsigned_t<K>(k));
      return (std::is_signed_v<K> ? all ^ uint64_t(1) << (8 * sizeof(K) - 1) : all) & mask;
    };
    std::vector<N> order(count);
    for (N i = 0; i < count; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(),
                     [&](N a, N b) { return bits(keys[a]) < bits(keys[b]); });
    for (N i = 0; i < count; ++i) {
      keys_out[i] = keys[order[i]];
      values_out[i] = values[order[i]];
    }
    return cudaSuccess;
  }

 private:
  template <class T, class N>
  static bool overlap(const T* a, const T* b, N count) {
    return a < b + count && b < a + count;
  }
};

}  // namespace cub

namespace thrust {

template <class T>
struct counting_iterator {
  T first;
  explicit counting_iterator(T first) : first(first) {}
  template <class N>
  T operator[](N i) const {
    return first + T(i);
  }
};

template <class F, class I>
struct transform_iterator {
  I of;
  F f;
  template <class N>
  auto operator[](N i) const {
    return f(of[i]);
  }
  auto operator*() const { return f(of[0]); }
};

template <class F, class I>
transform_iterator<F, I> make_transform_iterator(I of, F f) {
  return {of, f};
}

}  // namespace thrust
