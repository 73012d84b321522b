// Scatter and scatter-add on the CPU, by source: the last value in row order stays, or values are
// summed. Parallel over contiguous planes, and over blocks of lines of channels_last images.
// Included by *.simd.cpp files only.
#pragma once

#include <string.h>

#include "common/lanes.h"
#include "pooling/code_decoder.h"
#include "pooling/scatter_gather.h"

namespace segkernels::pooling {
inline namespace SK_NS {

// f(window, offset in the plane) for the lines [begin, end) of windows of a contiguous plane, in
// order. Reports invalid positions.
template <class P, class F>
SK_HD void each_place(const Windows& w, const CodeDecoder& decoder, int32_t begin, int32_t end,
                      const P* __restrict positions, int32_t* status, const F& f) {
  bool bad = false;
  if constexpr (sizeof(P) == 1) {
    if (CodeDecoder::supports(w)) {
      decoder.each(begin, end, positions, [&](const CodeDecoder::Batch& batch) {
        for (int32_t i = 0; i < batch.n && !batch.bad; ++i) f(batch.window + i, batch.place[i]);
        for (int32_t i = 0; i < batch.n && batch.bad; ++i) {
          if (batch.place[i] >= 0) f(batch.window + i, batch.place[i]);
        }
        bad |= batch.bad;
      });
    } else {
      for (int64_t i = int64_t(begin) * w.pooled[1]; i < int64_t(end) * w.pooled[1]; ++i) {
        const int32_t y = int32_t(i / w.pooled[1]), x = int32_t(i % w.pooled[1]);
        const int64_t place = offset_of_position(w, {0, y, x, 0}, positions[i]);
        place < 0 ? void(bad = true) : f(i, place);
      }
    }
  } else {
    const int64_t places = int64_t(w.full[0]) * w.full[1];
    const int64_t last = int64_t(end) * w.pooled[1];
    for (int64_t i = int64_t(begin) * w.pooled[1]; i < last; ++i) {
      const int64_t index = positions[i];
      uint64_t(index) < uint64_t(places) ? f(i, index) : void(bad = true);
    }
  }
  if (bad) report(status, fault_of(P(0)));
}

// Contiguous planes, any windows: clears each plane and writes its sources in row order.
template <class T, class P, bool kSum>
void scatter_planes(const Where& where, const Windows& w, const T* input, const P* positions,
                    T* output, int32_t* status, const char* name) {
  const CodeDecoder decoder(w);
  const int64_t places = int64_t(w.full[0]) * w.full[1];
  const int64_t sources = int64_t(w.pooled[0]) * w.pooled[1];
  parallel_for(
      where, w.planes,
      [&](int64_t i) {
        T* __restrict plane = output + i * places;
        const T* __restrict values = input + i * sources;
        memset(static_cast<void*>(plane), 0, sizeof(T) * places);
        each_place(w, decoder, 0, w.pooled[0], positions + i * sources, status,
                   [&](int64_t from, int64_t place) {
                     plane[place] = kSum ? T(plane[place] + values[from]) : values[from];
                   });
      },
      name);
}

// As scatter_planes with kSum, in a float plane of each thread, rounded once at the end.
template <class T, class P>
void scatter_sums(const Where& where, const Windows& w, const T* input, const P* positions,
                  T* output, float* sums) {
  const CodeDecoder decoder(w);
  const int64_t places = int64_t(w.full[0]) * w.full[1];
  const int64_t sources = int64_t(w.pooled[0]) * w.pooled[1];
  parallel_chunks(where, w.planes, [&](int worker, Pieces& pieces) {
    float* __restrict plane = sums + worker * places;
    while (pieces.next()) {
      for (int64_t i = pieces.begin; i < pieces.end; ++i) {
        const T* __restrict values = input + i * sources;
        memset(plane, 0, sizeof(float) * places);
        each_place(w, decoder, 0, w.pooled[0], positions + i * sources, nullptr,
                   [&](int64_t from, int64_t place) { plane[place] += widen_one(values[from]); });
        narrow_line(plane, output + i * places, places);
      }
    }
  });
}

// Bytes that one task of scatter_channels writes.
constexpr int64_t kBlockBytes = 1 << 20;

// Cuts the lines of sources into blocks, and the lines of the plane into one range a block: those
// that the block reaches and earlier blocks do not. The ranges are a guess from one line of
// indices. The first lines of a block may also write to the range of the block before.
struct LineBlocks {
  int32_t sources, full, step, lines, blocks;
  int64_t reach = 0;   // end of what a line of sources reaches, minus step times its number
  int32_t shared = 0;  // lines of a block that may write to the range before

  LineBlocks(const Windows& w, int64_t line_bytes, const int64_t* indices)
      : sources(w.pooled[0]), full(w.full[0]) {
    const int64_t rounded = sources > 0 ? (int64_t(full) + sources / 2) / sources : 1;
    step = int32_t(rounded > 1 ? rounded : 1);
    const int64_t bytes = line_bytes * step;
    lines = int32_t(bytes < 1 ? kBlockBytes : bytes < kBlockBytes ? kBlockBytes / bytes : 1);
    blocks = sources <= lines ? 1 : (sources - 1) / lines + 1;
    if (blocks == 1) return;
    const int64_t n = w.pooled[1] * w.channels, places = int64_t(full) * w.full[1];
    const int64_t line = first(blocks / 2) - 1;
    int64_t nearest = places - 1, farthest = 0;
    for (int64_t i = line * n; i < (line + 1) * n; ++i) {
      if (uint64_t(indices[i]) >= uint64_t(places)) continue;
      nearest = indices[i] < nearest ? indices[i] : nearest;
      farthest = indices[i] > farthest ? indices[i] : farthest;
    }
    reach = farthest / w.full[1] + 1 - line * step;
    const int64_t extent = farthest / w.full[1] - nearest / w.full[1];
    shared = int32_t(extent > 0 ? extent / step : 0);
  }

  int32_t first(int32_t block) const { return block < blocks ? block * lines : sources; }
  int32_t reaching_back(int32_t block) const {
    const int64_t some = int64_t(first(block)) + shared, end = first(block + 1);
    return int32_t(some < end ? some : end);
  }
  int32_t begin(int32_t block) const {
    if (block <= 0 || block >= blocks) return block <= 0 ? 0 : full;
    const int64_t at = int64_t(first(block) - 1) * step + reach;
    return int32_t(at < 0 ? 0 : at < full ? at : full);
  }
};

struct Missed {
  bool before, elsewhere, outside;
};

// channels_last: scatters lines [first, last) of an image's sources to places [begin, end), in
// order. Returns whether some point to [back, begin), elsewhere in the plane, or outside it.
template <class T>
Missed scatter_lines(const Windows& w, int32_t first, int32_t last, int64_t back, int64_t begin,
                     int64_t end, const T* __restrict input, const int64_t* __restrict indices,
                     T* __restrict output) {
  const uint64_t places = uint64_t(w.full[0]) * w.full[1], span = end - begin;
  const int64_t channels = w.channels;
  Missed missed{false, false, false};
  for (int64_t i = int64_t(first) * w.pooled[1]; i < int64_t(last) * w.pooled[1]; ++i) {
    const T* __restrict values = input + i * channels;
    const int64_t* __restrict index = indices + i * channels;
    bool all = true;
    for (int64_t c = 0; c < channels; ++c) {
      const bool inside = uint64_t(index[c] - begin) < span;
      inside ? void(output[index[c] * channels + c] = values[c]) : void(all = false);
    }
    for (int64_t c = 0; c < channels && !all; ++c) {
      const bool outside = uint64_t(index[c]) >= places;
      missed.outside |= outside;
      missed.before |= index[c] >= back && index[c] < begin;
      missed.elsewhere |= !outside && (index[c] < back || index[c] >= end);
    }
  }
  return missed;
}

// channels_last with indices: as scatter_planes. A task clears the range of its block and scatters
// to it, in cache. Writes to the range before follow after a barrier. Where an index points
// elsewhere, the guess was wrong, and every image is done again by one thread in order.
template <class T>
void scatter_channels(const Where& where, const Windows& w, const T* input, const int64_t* indices,
                      T* output, int32_t* status, const char* name) {
  const int64_t sources = int64_t(w.pooled[0]) * w.pooled[1] * w.channels;
  const int64_t line = w.full[1] * w.channels, image = w.full[0] * line;
  if (w.planes == 0) return;
  const LineBlocks t(w, line * int64_t(sizeof(T)), indices);
  const auto scatter = [&](int64_t plane, int32_t first, int32_t last, int64_t back, int64_t begin,
                           int64_t end) {
    return scatter_lines(w, first, last, back * w.full[1], begin * w.full[1], end * w.full[1],
                         input + plane * sources, indices + plane * sources,
                         output + plane * image);
  };
  const auto clear = [&](int64_t plane, int32_t begin, int32_t end) {
    memset(static_cast<void*>(output + plane * image + begin * line), 0,
           sizeof(T) * (end - begin) * line);
  };
  bool before = false, elsewhere = false;
  const auto set = [](bool& flag) { __atomic_store_n(&flag, true, __ATOMIC_RELAXED); };
  parallel_for(
      where, w.planes * t.blocks,
      [&](int64_t task) {
        const int64_t plane = task / t.blocks;
        const int32_t block = int32_t(task % t.blocks), middle = t.reaching_back(block);
        const int32_t back = t.begin(block - 1), begin = t.begin(block), end = t.begin(block + 1);
        clear(plane, begin, end);
        const Missed some = scatter(plane, t.first(block), middle, back, begin, end);
        const Missed rest = scatter(plane, middle, t.first(block + 1), begin, begin, end);
        if (some.before) set(before);
        if (some.elsewhere || rest.elsewhere) set(elsewhere);
        if (some.outside || rest.outside) report(status, kIndexOutOfRange);
      },
      name);
  if (elsewhere) {
    parallel_for(
        where, w.planes,
        [&](int64_t plane) {
          clear(plane, 0, w.full[0]);
          scatter(plane, 0, w.pooled[0], 0, 0, w.full[0]);
        },
        name);
  } else if (before) {
    parallel_for(
        where, w.planes * t.blocks,
        [&](int64_t task) {
          const int64_t plane = task / t.blocks;
          const int32_t block = int32_t(task % t.blocks);
          const int32_t back = t.begin(block - 1);
          scatter(plane, t.first(block), t.reaching_back(block), back, back, t.begin(block));
        },
        name);
  }
}

}  // namespace SK_NS
}  // namespace segkernels::pooling
