// Where Hopper's matrix instructions (wgmma) look for their operands in shared memory and leave
// their sums in registers: plain arithmetic, so that the CPU tests run it too. PTX ISA,
// "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include "common/hd.h"

namespace segkernels::hopper {

// Operands lie in rows of 128 bytes. The copy engine writes row r of a box at r * 128 and swaps its
// pieces of 16 bytes by r % 8; tiles start at multiples of 1024 bytes.
constexpr int kRowBytes = 128;
constexpr int kSwizzleBytes = 1024;

inline namespace SK_NS {

SK_HD uint32_t swizzled(uint32_t address) { return address ^ ((address >> 3) & 0x70); }

// An operand whose rows run along the summed axis (K-major): start, distance of groups of 8 rows,
// 128-byte swizzle. The next 16 (tf32: 8) values to sum start 32 bytes later.
SK_HD uint64_t k_major_descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 |
         uint64_t(kSwizzleBytes >> 4) << 32 | uint64_t(1) << 62;
}

// An operand whose rows run across it (MN-major), 16-bit values: a row of 128 bytes holds 64
// neighbours for one summed value; the next 64 neighbours lie `block` bytes further. The next 16
// values to sum start 16 rows later.
SK_HD uint64_t mn_major_descriptor(uint32_t address, uint32_t block) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(block >> 4) << 16 |
         uint64_t(kSwizzleBytes >> 4) << 32 | uint64_t(1) << 62;
}

// Row and column, in the 64 rows of a warpgroup, of sum i of thread t.
SK_HD int accumulator_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
SK_HD int accumulator_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

}  // namespace SK_NS
}  // namespace segkernels::hopper
