// Layout of wgmma's operands in shared memory and of its accumulators in registers (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Instructions"). Plain arithmetic, which the CPU's model of
// the kernels shares (tests/emulation).
#pragma once

#include "common/hd.h"

namespace segkernels::hopper {

// An operand has rows of 128 bytes. TMA writes row r of a box at r * 128 and XORs the index of each
// 16-byte chunk with r % 8 (128-byte swizzle). Tiles start at multiples of 1024 bytes.
constexpr int kRowBytes = 128;
constexpr int kSwizzleBytes = 1024;

inline namespace SK_NS {

SK_HD uint32_t swizzled(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// K-major operand: its rows run along the summed axis. Fields: start address, stride of groups of 8
// rows, 128-byte swizzle. The next 16 (tf32: 8) values of the sum start 32 bytes later.
SK_HD uint64_t k_major_descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 |
         uint64_t(kSwizzleBytes >> 4) << 32 | uint64_t(1) << 62;
}

// MN-major operand of 16-bit values: its rows run across the summed axis. A row of 128 bytes holds
// 64 neighbours for one value of the sum; the next 64 neighbours are `block` bytes further. The
// next 16 values of the sum start 16 rows later.
SK_HD uint64_t mn_major_descriptor(uint32_t address, uint32_t block) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(block >> 4) << 16 |
         uint64_t(kSwizzleBytes >> 4) << 32 | uint64_t(1) << 62;
}

// Row and column of accumulator i of thread t in the 64 rows of a warpgroup.
SK_HD int accumulator_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
SK_HD int accumulator_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

}  // namespace SK_NS
}  // namespace segkernels::hopper
