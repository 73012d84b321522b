// The product of two matrices on the CPU, compiled once per instruction set (SK_ISA). Parallel over
// tiles of the result, which do not depend on the number of threads. Each element is summed in
// order, within chunks of the inner dimension and then over chunks, which keeps rounding errors
// small.
#include <string.h>

#include "common/lanes.h"
#include "common/parallel_for.h"
#include "common/scalar.h"
#include "dense_crf/product.h"

namespace segkernels {
inline namespace SK_ISA {

template <class T>
struct ProductTile {
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  static constexpr int kCols = 2 * kLanes;  // columns a tile: two vectors
  static constexpr int kRows = 64;
  static constexpr int kChunk = 256;
  using V = Vec<T, kLanes>;

  const Product& p;

  static int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

  int64_t tiles() const { return parts(p.rows, kRows) * parts(p.cols, kCols); }

  void operator()(int, int64_t tile) const {
    const int64_t across = parts(p.cols, kCols);
    const int64_t row = tile / across * kRows, col = tile % across * kCols;
    const int64_t end = row + kRows < p.rows ? row + kRows : p.rows;
    const int64_t width = p.cols - col < kCols ? p.cols - col : kCols;
    T* out = static_cast<T*>(p.out) + col;
    for (int64_t r = row; r < end; ++r) memset(out + r * p.cols, 0, sizeof(T) * width);
    alignas(64) T b[kChunk * kCols] = {};  // a chunk of the tile's columns, padded with zeros
    for (int64_t first = 0; first < p.inner; first += kChunk) {
      const int64_t depth = p.inner - first < kChunk ? p.inner - first : kChunk;
      for (int64_t k = 0; k < depth; ++k) {
        const T* from = static_cast<const T*>(p.b) + (first + k) * p.cols + col;
        memcpy(b + k * kCols, from, sizeof(T) * width);
      }
      const T* a = static_cast<const T*>(p.a) + first * p.a_inner;
      int64_t r = row;
      for (; r + 8 <= end; r += 8) add<8>(a + r * p.a_row, b, depth, out + r * p.cols, width);
      for (; r < end; ++r) add<1>(a + r * p.a_row, b, depth, out + r * p.cols, width);
    }
  }

  // Adds the products of N rows and a chunk.
  template <int N>
  void add(const T* a, const T* b, int64_t depth, T* out, int64_t width) const {
    V sum[N][2]{};
    for (int64_t k = 0; k < depth; ++k) {
      const V left = load_lanes<kLanes>(b + k * kCols);
      const V right = load_lanes<kLanes>(b + k * kCols + kLanes);
      for (int n = 0; n < N; ++n) {
        const T scale = a[n * p.a_row + k * p.a_inner];
        sum[n][0] += scale * left;
        sum[n][1] += scale * right;
      }
    }
    for (int n = 0; n < N; ++n) {
      T* row = out + n * p.cols;
      for (int64_t i = 0; i < width; ++i) row[i] += sum[n][i / kLanes][i % kLanes];
    }
  }
};

template <class T>
void run(const Where& where, const Product& p) {
  const ProductTile<T> f{p};
  parallel_tiles(where, f.tiles(), p.inner >= 1024, f);
}

}  // namespace SK_ISA

template <Isa kIsa>
void product(const Where& where, const Product& p, bool is_double) {
  is_double ? run<double>(where, p) : run<float>(where, p);
}

template void product<Isa::SK_ISA>(const Where&, const Product&, bool);
}  // namespace segkernels
