// See schedule.h.
#include "dilated_conv2d/schedule.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>
#include <tuple>

namespace segkernels::dilated {
namespace {

// A shorter segment of a loop costs more in its epilogue than it balances.
constexpr int64_t kShortestSegment = 8;
// Slowdown of a step without a cluster that shares weights; 1 to 6% with tiles of 256 channels.
constexpr double kClusterGain = 1.03;
// An estimate, not measured: writing and summing a slot of the workspace costs kSlotCost *
// tile_channels / (128 + tile_channels) steps.
constexpr double kSlotCost = 12;
constexpr size_t kBoxesTried = 3;
constexpr double kMostTiles = 1 << 24;

// One or two tiles with the same loop: a worker's unit of work.
struct Unit {
  Segment whole;
  int64_t steps;
};

struct TapRange {
  int first, last;  // empty: last < first
};

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// The taps of one axis through which outputs start .. start + extent - 1 read the image. Tap k
// reads `extent` inputs from start + k * dilation - padding on, so those that read an input in 0 ..
// size - 1 are a contiguous range.
TapRange tap_range(int64_t start, int64_t extent, int64_t size, int kernel, int dilation,
                   int padding) {
  const int64_t first = ceil_div(padding - start - extent + 1, dilation);
  const int64_t last = floor_div(size - 1 + padding - start, dilation);
  return {int(std::clamp<int64_t>(first, 0, kernel)),
          int(std::clamp<int64_t>(last, -1, kernel - 1))};
}

// The tap range of each box along one axis.
std::vector<TapRange> ranges(const Shape& s, const Branch& b, int axis, int extent) {
  std::vector<TapRange> found;
  for (int64_t start = 0; start < s.out[axis]; start += extent) {
    found.push_back(tap_range(start, std::min<int64_t>(extent, s.out[axis] - start), s.in[axis],
                              b.kernel[axis], b.dilation[axis], b.padding[axis]));
  }
  return found;
}

int64_t taps_in(TapRange r) { return std::max(0, r.last - r.first + 1); }

int64_t taps_in(const std::vector<TapRange>& ranges) {
  int64_t sum = 0;
  for (TapRange r : ranges) sum += taps_in(r);
  return sum;
}

// Groups tiles by branch, channels and tap rectangle, and makes units of them. Tiles without taps
// become fix-ups without slots.
std::vector<Unit> make_units(const Shape& s, Schedule& out) {
  std::vector<Unit> units;
  const int64_t rows = out.boxes[1], columns = out.boxes[2];
  for (int branch = 0; branch < int(s.branches.size()); ++branch) {
    const Branch& b = s.branches[branch];
    const std::vector<TapRange> down = ranges(s, b, 0, out.box[1]);
    const std::vector<TapRange> across = ranges(s, b, 1, out.box[2]);
    std::map<std::array<int, 4>, std::vector<int32_t>> classes;
    for (int64_t tile_row = 0; tile_row < out.boxes[0] * rows * columns; ++tile_row) {
      const TapRange y = down[tile_row / columns % rows], x = across[tile_row % columns];
      classes[{y.first, y.last, x.first, x.last}].push_back(int32_t(tile_row));
    }
    const int32_t tile_columns = int32_t(ceil_div(b.out_channels, out.tile_channels));
    for (const auto& [taps, places] : classes) {
      const int64_t across_taps = taps_in({taps[2], taps[3]});
      const int64_t steps = taps_in({taps[0], taps[1]}) * across_taps * s.channel_steps;
      if (steps > std::numeric_limits<int32_t>::max()) {
        throw std::invalid_argument("dilated_conv2d: too many input channels");
      }
      out.tile_steps += steps * int64_t(places.size()) * tile_columns;
      for (int32_t column = 0; column < tile_columns; ++column) {
        for (size_t i = 0; i < places.size(); i += steps ? out.cluster : 1) {
          if (steps == 0) {
            out.fixups.push_back({places[i], branch, column, 0, 1, 0});
            continue;
          }
          const int32_t second =
              out.cluster == 2 && i + 1 < places.size() ? places[i + 1] : int32_t(-1);
          units.push_back({{{places[i], second},
                            branch,
                            column,
                            0,
                            int32_t(steps),
                            -1,
                            {taps[0], taps[2]},
                            int32_t(across_taps)},
                           steps});
        }
      }
    }
  }
  return units;
}

// The length of the next segment of a loop with `left` steps to go, in a gap; 0 if the gap is too
// small. No segment is shorter than kShortestSegment, unless the loop is.
int64_t segment_length(int64_t left, int64_t gap) {
  if (left <= gap) return left;
  const int64_t length = std::min(gap, left - kShortestSegment);
  return length < kShortestSegment ? 0 : length;
}

struct Assigned {
  std::vector<std::vector<Segment>> of_worker;
  std::vector<Fixup> fixups;
  int64_t slots = 0, max_load = 0;
};

// Assigns whole units, which come longest first, to the least busy worker while they fit under
// `limit`, then cuts the rest into segments that fill the gaps, largest gap first. False if they do
// not fit.
bool assign(const std::vector<Unit>& units, int workers, int cluster, int64_t limit,
            Assigned& out) {
  using Load = std::pair<int64_t, int>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> idle;
  for (int w = 0; w < workers; ++w) idle.push({0, w});
  out = Assigned{};
  out.of_worker.resize(workers);
  std::vector<int64_t> load(workers, 0);
  std::vector<const Unit*> rest;
  for (const Unit& unit : units) {
    const auto [busy, worker] = idle.top();
    if (busy + unit.steps > limit) {
      rest.push_back(&unit);
      continue;
    }
    idle.pop();
    out.of_worker[worker].push_back(unit.whole);
    load[worker] += unit.steps;
    idle.push({load[worker], worker});
  }
  std::vector<int> by_gap(workers);
  std::iota(by_gap.begin(), by_gap.end(), 0);
  std::stable_sort(by_gap.begin(), by_gap.end(), [&](int a, int b) { return load[a] < load[b]; });
  size_t next = 0;
  for (const Unit* unit : rest) {
    const int64_t first_slot = out.slots;
    for (int64_t done = 0; done < unit->steps;) {
      int64_t length = 0;
      while (next < by_gap.size() &&
             (length = segment_length(unit->steps - done, limit - load[by_gap[next]])) == 0) {
        ++next;
      }
      if (next == by_gap.size()) return false;
      Segment segment = unit->whole;
      segment.begin = int32_t(done);
      segment.end = int32_t(done + length);
      segment.slot = int32_t(out.slots++);
      out.of_worker[by_gap[next]].push_back(segment);
      load[by_gap[next]] += length;
      done += length;
    }
    const int32_t count = int32_t(out.slots - first_slot);
    if (count == 1) {  // it fitted into one gap
      out.of_worker[by_gap[next]].back().slot = -1;
      out.slots = first_slot;
      continue;
    }
    for (int rank = 0; rank < cluster && unit->whole.tile_row[rank] >= 0; ++rank) {
      out.fixups.push_back({unit->whole.tile_row[rank], unit->whole.branch, unit->whole.column,
                            int32_t(first_slot * cluster + rank), cluster, count});
    }
  }
  out.max_load = *std::max_element(load.begin(), load.end());
  return true;
}

void check(const Shape& s, int multiprocessors) {
  const auto refuse = [](const char* why) {
    throw std::invalid_argument(std::string("dilated_conv2d: ") + why);
  };
  if (s.branches.empty() || s.branches.size() > kMaxBranches) refuse("1 to 8 branches");
  if (multiprocessors < 1 || s.channel_steps < 1) refuse("sizes must be positive");
  for (const Branch& b : s.branches) {
    for (int axis = 0; axis < 2; ++axis) {
      if (b.kernel[axis] < 1 || b.kernel[axis] > kMaxKernel) refuse("kernels of 1 to 7 taps");
      if (b.dilation[axis] < 1) refuse("dilation must be positive");
    }
    if (b.out_channels < 1) refuse("output channels must be positive");
  }
  for (const int64_t size : {s.batch, s.in[0], s.in[1], s.out[0], s.out[1]}) {
    if (size < 1 || size > std::numeric_limits<int32_t>::max()) refuse("sizes must fit 31 bits");
  }
}

void check_tiles(const Shape& s, const Schedule& out) {
  double tiles = 0;
  for (const Branch& b : s.branches) tiles += double(ceil_div(b.out_channels, out.tile_channels));
  for (const int64_t boxes : out.boxes) tiles *= double(boxes);
  if (tiles > kMostTiles) {
    throw std::invalid_argument("dilated_conv2d: more than 2^24 tiles; split the batch");
  }
}

// The estimated time, in loop steps of a worker.
double cost_of(const Schedule& s, int64_t max_load, int64_t slots) {
  const double slot_steps = kSlotCost * s.tile_channels / (kTilePixels + s.tile_channels);
  return double(max_load) * (s.cluster == 2 ? 1 : kClusterGain) +
         slot_steps * double(slots) / s.workers;
}

// Assigns the units to workers and fills in the rest of `out`.
void distribute(std::vector<Unit> units, Schedule& out) {
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.steps > b.steps; });
  int64_t total = 0;
  for (const Unit& unit : units) total += unit.steps;
  // A looser limit splits fewer tiles.
  Assigned best, tried;
  out.cost = std::numeric_limits<double>::infinity();
  for (int64_t limit = std::max<int64_t>(1, ceil_div(total, out.workers));
       best.of_worker.empty() || (best.slots > 0 && double(limit) < out.cost);
       limit += 1 + limit / 128) {
    if (!assign(units, out.workers, out.cluster, limit, tried)) continue;
    const double cost = cost_of(out, tried.max_load, tried.slots);
    if (cost < out.cost) {
      out.cost = cost;
      std::swap(best, tried);
    }
  }
  out.start.push_back(0);
  for (const std::vector<Segment>& segments : best.of_worker) {
    out.segments.insert(out.segments.end(), segments.begin(), segments.end());
    out.start.push_back(int32_t(out.segments.size()));
  }
  out.fixups.insert(out.fixups.end(), best.fixups.begin(), best.fixups.end());
  out.workspace_tiles = best.slots * out.cluster;
  out.max_load = best.max_load;
}

Schedule schedule_for(const Shape& s, int multiprocessors, int tile_channels, int cluster,
                      std::array<int, 3> box) {
  Schedule out{};
  out.box = box;
  out.boxes = {ceil_div(s.batch, box[0]), ceil_div(s.out[0], box[1]), ceil_div(s.out[1], box[2])};
  out.tile_channels = tile_channels;
  out.cluster = cluster;
  out.workers = std::max(1, multiprocessors / cluster);
  check_tiles(s, out);
  distribute(make_units(s, out), out);
  return out;
}

// For every tap of an axis, the boxes (first, last) that it reads inside the image.
std::vector<TapRange> boxes_of_taps(const Shape& s, int axis, int extent) {
  const Branch& b = s.branches[0];
  std::vector<TapRange> found(b.kernel[axis], {0, -1});
  const std::vector<TapRange> taps = ranges(s, b, axis, extent);
  for (int box = 0; box < int(taps.size()); ++box) {
    for (int tap = taps[box].first; tap <= taps[box].last; ++tap) {
      if (found[tap].last < 0) found[tap].first = box;
      found[tap].last = box;
    }
  }
  return found;
}

// Tiles of the weight gradient: for each tap, every block of output and of input channels.
std::vector<Unit> make_weight_units(const Shape& s, int64_t channels, Schedule& out) {
  std::vector<Unit> units;
  const Branch& b = s.branches[0];
  const std::vector<TapRange> down = boxes_of_taps(s, 0, out.box[1]);
  const std::vector<TapRange> across = boxes_of_taps(s, 1, out.box[2]);
  const int32_t rows = int32_t(ceil_div(b.out_channels, kTileRows));
  const int32_t columns = int32_t(ceil_div(channels, out.tile_channels));
  for (int32_t tap = 0; tap < b.kernel[0] * b.kernel[1]; ++tap) {
    const TapRange y = down[tap / b.kernel[1]], x = across[tap % b.kernel[1]];
    const int64_t steps = taps_in(y) * taps_in(x) * out.boxes[0];
    if (steps > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("dilated_conv2d: too many pixels; split the batch");
    }
    out.tile_steps += steps * rows * columns;
    for (int32_t row = 0; row < rows; ++row) {
      for (int32_t column = 0; column < columns; ++column) {
        if (steps == 0) {
          out.fixups.push_back({row, tap, column, 0, 1, 0});
          continue;
        }
        units.push_back({{{row, -1},
                          tap,
                          column,
                          0,
                          int32_t(steps),
                          -1,
                          {y.first, x.first},
                          int32_t(taps_in(x))},
                         steps});
      }
    }
  }
  return units;
}

}  // namespace

int choose_tile_channels(const Shape& shape) {
  // Relative cost of a product: narrower tiles load more bytes to shared memory.
  constexpr std::pair<int, double> kCosts[] = {{256, 1.0}, {128, 1.15}, {64, 1.5}, {32, 2.2}};
  int best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [channels, factor] : kCosts) {
    double cost = 0;
    for (const Branch& b : shape.branches) {
      cost += factor * double(ceil_div(b.out_channels, channels) * channels) * b.kernel[0] *
              b.kernel[1];
    }
    if (cost < least) std::tie(best, least) = std::make_pair(channels, cost);
  }
  return best;
}

std::vector<std::array<int, 3>> best_boxes(const Shape& shape, size_t count, int pixels,
                                           int multiple) {
  // Taps of all boxes along an axis, by the boxes' extent.
  const auto taps_by_extent = [&](const Branch& b, int axis) {
    std::vector<int64_t> taps(pixels + 1);
    for (int extent = 1; extent <= pixels; ++extent) {
      taps[extent] = taps_in(ranges(shape, b, axis, extent));
    }
    return taps;
  };
  std::vector<std::array<std::vector<int64_t>, 2>> taps;
  for (const Branch& b : shape.branches) {
    taps.push_back({taps_by_extent(b, 0), taps_by_extent(b, 1)});
  }
  using Ranked = std::pair<std::array<int64_t, 4>, std::array<int, 3>>;
  std::vector<Ranked> ranked;
  const auto rank = [&](int images, int rows, int columns) {
    const int64_t layers = ceil_div(shape.batch, images);
    int64_t steps = 0;
    for (size_t i = 0; i < taps.size(); ++i) {
      steps += layers * taps[i][0][rows] * taps[i][1][columns] * shape.branches[i].out_channels;
    }
    const int64_t boxes = layers * ceil_div(shape.out[0], rows) * ceil_div(shape.out[1], columns);
    // Ties: fewest boxes, then the longest contiguous rows.
    ranked.push_back({{steps, boxes, -columns, -rows}, {images, rows, columns}});
  };
  // A full box may need more images than there are.
  const int64_t most = multiple > 1 ? pixels : std::min<int64_t>(pixels, shape.batch);
  for (int images = 1; images <= most; ++images) {
    for (int rows = 1; images * rows <= pixels; ++rows) {
      for (int columns = 1; images * rows * columns <= pixels; ++columns) {
        if (images * rows * columns % multiple == 0) rank(images, rows, columns);
      }
    }
  }
  const size_t kept = std::min(ranked.size(), count);
  std::partial_sort(ranked.begin(), ranked.begin() + kept, ranked.end());
  std::vector<std::array<int, 3>> boxes;
  for (size_t i = 0; i < kept; ++i) boxes.push_back(ranked[i].second);
  return boxes;
}

Schedule make_schedule(const Shape& shape, int multiprocessors, int tile_channels, int cluster,
                       std::array<int, 3> box) {
  check(shape, multiprocessors);
  if (tile_channels == 0) tile_channels = choose_tile_channels(shape);
  std::vector<std::array<int, 3>> boxes{box};
  if (box[0] == 0) boxes = best_boxes(shape, kBoxesTried, kTilePixels, 1);
  for (const std::array<int, 3>& b : boxes) {
    if (*std::min_element(b.begin(), b.end()) < 1 || int64_t(b[0]) * b[1] * b[2] > kTilePixels) {
      throw std::invalid_argument("dilated_conv2d: a box must hold 1 to 128 pixels");
    }
  }
  std::vector<int> clusters{cluster};
  if (cluster == 0) {
    clusters = {1};
    if (tile_channels >= 128 && multiprocessors >= 2) clusters.push_back(2);
  }
  Schedule best{};
  best.cost = std::numeric_limits<double>::infinity();
  for (const std::array<int, 3>& b : boxes) {
    for (const int c : clusters) {
      Schedule made = schedule_for(shape, multiprocessors, tile_channels, c, b);
      if (made.cost < best.cost) best = std::move(made);
    }
  }
  return best;
}

Schedule make_weight_schedule(const Shape& shape, int64_t channels, int multiprocessors) {
  check(shape, multiprocessors);
  if (shape.branches.size() != 1 || channels < 1) {
    throw std::invalid_argument("dilated_conv2d: the weight gradient needs one branch");
  }
  Schedule out{};
  out.box = best_boxes(shape, 1, kStepPixels, kStepPixels)[0];
  out.boxes = {ceil_div(shape.batch, out.box[0]), ceil_div(shape.out[0], out.box[1]),
               ceil_div(shape.out[1], out.box[2])};
  out.tile_channels = channels <= 64 ? 64 : channels <= 128 ? 128 : 256;
  out.cluster = 1;
  out.workers = multiprocessors;
  distribute(make_weight_units(shape, channels, out), out);
  return out;
}

}  // namespace segkernels::dilated
