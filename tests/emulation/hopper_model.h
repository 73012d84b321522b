// Models of Hopper's hardware for the emulation on the CPU: TMA, swizzled shared memory, and wgmma
// with its accumulators.
#pragma once

#include <string.h>

#include <stdexcept>
#include <vector>

#include "dilated_conv2d/dilated_conv2d.h"

namespace segkernels::dilated::model {

constexpr uint32_t kShared = 1024;  // base address of shared memory

// A wgmma operand in shared memory with the 128-byte swizzle, as PTX defines it: the descriptor's
// fields, and the address of (row of the tile, summed index).
struct Operand {
  uint32_t start, block_stride, group_stride;

  explicit Operand(uint64_t descriptor)
      : start(uint32_t(descriptor & 0x3FFF) << 4),
        block_stride(uint32_t(descriptor >> 16 & 0x3FFF) << 4),
        group_stride(uint32_t(descriptor >> 32 & 0x3FFF) << 4) {
    if (descriptor >> 62 != 1) throw std::runtime_error("not the 128-byte swizzle");
  }

  // K-major: lines of 128 bytes run along the sum, and 8 lines are 8 rows of the tile.
  uint32_t k_major(int row, int summed, int size) const {
    return swizzled(start + uint32_t(row / 8) * group_stride + uint32_t(row % 8) * 128 +
                    uint32_t(summed * size));
  }

  // MN-major: lines of 128 bytes run along the tile, and 8 lines are 8 summed values.
  uint32_t mn_major(int row, int summed, int size) const {
    const int line = 128 / size;
    return swizzled(start + uint32_t(row / line) * block_stride +
                    uint32_t(summed / 8) * group_stride + uint32_t(summed % 8) * 128 +
                    uint32_t(row % line * size));
  }

  static uint32_t swizzled(uint32_t plain) {
    const uint32_t chunk = plain / 16 % 8, line = plain / 128 % 8;
    return plain - 16 * chunk + 16 * (chunk ^ line);
  }
};

// One pipeline stage of one block. Bytes that no load has written are NaN.
template <class T>
struct Stage {
  std::vector<uint8_t> bytes;

  explicit Stage(int channels) : bytes(kPixelBytes + channels * kStepBytes, 0xFF) {}

  T at(uint32_t address) const {
    const size_t at = address - kShared;
    if (at + sizeof(T) > bytes.size()) throw std::out_of_range("an operand beyond its stage");
    T value;
    memcpy(&value, bytes.data() + at, sizeof(T));
    return value;
  }

  // TMA load of a box at `from`; `sizes` has the last axis first. Zeros outside the tensor.
  void tma_load(uint32_t to, const T* tensor, const std::vector<int64_t>& sizes,
                const std::vector<int64_t>& from, const std::vector<int>& box) {
    // Tensor maps need addresses and strides that are multiples of 16 bytes.
    if (uintptr_t(tensor) % 16 != 0 || sizes[0] * int64_t(sizeof(T)) % 16 != 0) {
      throw std::runtime_error("a tensor that the copy engine cannot read");
    }
    int64_t count = 1;
    for (const int extent : box) count *= extent;
    for (int64_t i = 0; i < count; ++i) {
      int64_t offset = 0, stride = 1, rest = i;
      bool inside = true;
      for (size_t axis = 0; axis < sizes.size(); ++axis) {
        const int64_t index = from[axis] + rest % box[axis];
        rest /= box[axis];
        inside = inside && index >= 0 && index < sizes[axis];
        offset += index * stride;
        stride *= sizes[axis];
      }
      const T value = inside ? tensor[offset] : T{};
      const uint32_t address = hopper::swizzled(to + uint32_t(i) * sizeof(T));
      memcpy(bytes.data() + (address - kShared), &value, sizeof(T));
    }
  }
};

inline float as_tf32(float value) {
  const uint32_t bits = uint32_t(bits_of<int32_t>(value));
  const uint32_t rounded = (bits + 0xFFFu + ((bits >> 13) & 1u)) & ~0x1FFFu;
  return (bits & 0x7F800000u) == 0x7F800000u ? value : bits_of<float>(int32_t(rounded));
}

inline float multiplied(float value) { return as_tf32(value); }
inline float multiplied(Half value) { return widen(value); }
inline float multiplied(BFloat16 value) { return widen(value); }

// One warpgroup's wgmma on a stage, added to sums[row][column].
template <class T, bool kMnMajor>
void wgmma(const Stage<T>& stage, uint64_t a, uint64_t b, int columns, float* sums) {
  constexpr int kSize = int(sizeof(T)), kDepth = 32 / kSize;
  const auto values = [&stage](const Operand& operand, int rows) {
    std::vector<float> found(size_t(rows) * kDepth);
    for (int i = 0; i < rows * kDepth; ++i) {
      const int row = i / kDepth, k = i % kDepth;
      found[i] = multiplied(
          stage.at(kMnMajor ? operand.mn_major(row, k, kSize) : operand.k_major(row, k, kSize)));
    }
    return found;
  };
  const std::vector<float> left = values(Operand(a), kGroupPixels);
  const std::vector<float> right = values(Operand(b), columns);
  for (int row = 0; row < kGroupPixels; ++row) {
    for (int column = 0; column < columns; ++column) {
      float sum = sums[row * columns + column];
      for (int k = 0; k < kDepth; ++k) sum += left[row * kDepth + k] * right[column * kDepth + k];
      sums[row * columns + column] = sum;
    }
  }
}

// The thread and register of each accumulator (PTX's figure of wgmma's D fragment).
template <int kChannels>
void to_registers(const float* sums, float (*registers)[kChannels / 2]) {
  for (int row = 0; row < kGroupPixels; ++row) {
    for (int column = 0; column < kChannels; ++column) {
      const int thread = row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
      const int at = column / 8 * 4 + row % 16 / 8 * 2 + column % 2;
      registers[thread][at] = sums[row * kChannels + column];
    }
  }
}

}  // namespace segkernels::dilated::model
