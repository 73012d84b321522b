"""How the Triton kernels cut a convolution into tiles: boxes, blocks, and parts of long loops.

All of it follows from the sizes and from what the device has, in plain Python, so it is tested
without a GPU. Time is counted in steps, each a product of a tile's pixels x block of channels x
block of what is summed over.

What decides: a tile is paid for in full, also where its box overhangs the output; its loop is as
long as its rectangle of taps; and tiles run in waves of as many as the device holds at once. Where
the last wave would leave most of the device idle, its tiles are cut along their loops, and a second
kernel adds the parts.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch

from segkernels.ops.dilated_conv2d.geometry import Geometry, tap_range

Box = tuple[int, int, int]  # pictures, rows, columns

# Launching the second kernel, and writing and reading the parts, in steps of the largest tile:
# about 8 microseconds on an H100, where such a step takes 0.7.
_CUT_COST = 12
_LEAST_STEPS = 8  # of a part


class Config(NamedTuple):
    """Compile-time choices of a kernel.

    Attributes:
        box: pictures, rows and columns of a tile, powers of two.
        block: output channels of a tile (of the weight's gradient: its first axis).
        step: channels summed over in a step (of the weight's gradient: its second axis).
        warps, stages: Triton's.
    """

    box: Box
    block: int
    step: int
    warps: int
    stages: int

    @property
    def pixels(self) -> int:
        """Pixels of the box."""
        return self.box[0] * self.box[1] * self.box[2]


class Device(NamedTuple):
    """What a device has: multiprocessors, and whether it reads boxes through descriptors."""

    multiprocessors: int
    descriptors: bool


class Tiles(NamedTuple):
    """The grid of a convolution.

    Attributes:
        pictures, rows, columns: boxes along each axis of the output.
        blocks: of output channels.
        order: whether rows (2) and columns (1) are taken from the ends inwards, for long tiles to
            come first.
        whole: tiles that one program does alone; the rest are cut.
        parts: that each of the rest is cut into.
    """

    pictures: int
    rows: int
    columns: int
    blocks: int
    order: int
    whole: int
    parts: int

    @property
    def of_a_branch(self) -> int:
        """Tiles of one branch."""
        return self.pictures * self.rows * self.columns * self.blocks


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _taps_along(g: Geometry, axis: int, extent: int) -> list[int]:
    """Taps that each box along an axis needs."""
    size, out = ((g.height, g.out_height), (g.width, g.out_width))[axis]
    found = []
    for start in range(0, out, extent):
        first, last = tap_range(
            start,
            min(extent, out - start),
            size,
            g.kernel[axis],
            g.dilation[axis],
            g.padding[axis],
        )
        found.append(max(0, last - first + 1))
    return found


@lru_cache(maxsize=4096)
def cut(
    batch: int,
    channels: int,
    out_channels: int,
    geometries: tuple[Geometry, ...],
    config: Config,
    multiprocessors: int,
) -> tuple[Tiles, float]:
    """The grid for one or several branches, and the steps that the busiest place takes.

    The grid's numbers are of one branch, but for `whole`, which counts all branches' tiles.
    """
    g = geometries[0]
    pictures = ceil_div(batch, config.box[0])
    blocks = ceil_div(out_channels, config.block)
    steps = ceil_div(channels, config.step)
    lengths: Counter[int] = Counter()
    for each in geometries:
        along = [_taps_along(each, axis, config.box[1 + axis]) for axis in (0, 1)]
        counts = [Counter(taps) for taps in along]
        for (a, many_a), (b, many_b) in product(counts[0].items(), counts[1].items()):
            lengths[a * b * steps] += many_a * many_b * pictures * blocks
    along = [_taps_along(g, axis, config.box[1 + axis]) for axis in (0, 1)]
    order = sum(
        bit
        for taps, bit in zip(along, (2, 1), strict=True)
        if taps and taps[len(taps) // 2] < max(taps)
    )
    count = sum(lengths.values())
    places = multiprocessors * (1 if config.pixels * config.block > 128 * 128 else 2)
    uncut = _waves(lengths, places, count)
    best, whole, parts = float(uncut), count, 1
    rest = count % places if count > places else count
    longest_of_rest = _longest_from(lengths, count - rest)
    most = min(places // rest if rest else 1, longest_of_rest // _LEAST_STEPS)
    if most > 1:
        steps_cut = _waves(lengths, places, count - rest) + ceil_div(longest_of_rest, most)
        weight = config.pixels * config.block * config.step / (128 * 256 * 64)
        if steps_cut + _CUT_COST / weight < uncut:
            best, whole, parts = steps_cut + _CUT_COST / weight, count - rest, most
    rows, columns = len(along[0]), len(along[1])
    return Tiles(pictures, rows, columns, blocks, order, whole, parts), best


def _waves(lengths: Counter[int], places: int, first: int) -> int:
    """Steps of the `first` longest tiles in waves of `places`: the sum of each wave's longest."""
    done = steps = 0
    for length in sorted(lengths, reverse=True):
        upto = min(done + lengths[length], first)
        # Times the waves that start within this run of tiles.
        steps += length * (ceil_div(upto, places) - ceil_div(done, places))
        done = upto
    return steps


def _longest_from(lengths: Counter[int], skipped: int) -> int:
    """The longest tile after the `skipped` longest."""
    seen = 0
    for length in sorted(lengths, reverse=True):
        seen += lengths[length]
        if seen > skipped:
            return length
    return 0


def _boxes(pixels: int, batch: int) -> list[Box]:
    """Boxes of that many pixels; of pictures no more than there are, rounded up."""
    found = []
    pictures = 1
    while pictures <= pixels and pictures < 2 * batch:
        rows = 1
        while rows * pictures <= pixels:
            columns = pixels // (pictures * rows)
            if rows <= 4 * columns and columns <= 16 * rows:
                found.append((pictures, rows, columns))
            rows *= 2
        pictures *= 2
    return found


def blocks_for(channels: int, out_channels: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Block of output channels, step, warps and stages."""
    step = 32 if dtype == torch.float32 else 64
    while step > 16 and step >= 2 * channels:
        step //= 2
    if out_channels > 128:
        return 256, step, 8, 3
    if out_channels > 64:
        return 128, step, 8, 3
    return (64 if out_channels > 32 else 32), step, 4, 4


def best_boxes(
    batch: int,
    channels: int,
    out_channels: int,
    geometry: Geometry,
    dtype: torch.dtype,
    multiprocessors: int,
) -> list[Box]:
    """Boxes of 128 pixels, that of the fewest steps first."""
    block, step, warps, stages = blocks_for(channels, out_channels, dtype)

    def cost(box: Box) -> tuple[float, int]:
        config = Config(box, block, step, warps, stages)
        steps = cut(batch, channels, out_channels, (geometry,), config, multiprocessors)[1]
        return steps, -box[2]  # between equals the longest rows of memory

    return sorted(_boxes(128, batch), key=cost)


@lru_cache(maxsize=1024)
def config_for(
    batch: int,
    channels: int,
    out_channels: int,
    geometry: Geometry,
    dtype: torch.dtype,
    multiprocessors: int,
) -> Config:
    """The configuration with the fewest steps."""
    box = best_boxes(batch, channels, out_channels, geometry, dtype, multiprocessors)[0]
    return Config(box, *blocks_for(channels, out_channels, dtype))


@lru_cache(maxsize=1024)
def weight_config_for(
    batch: int, channels: int, out_channels: int, geometry: Geometry, dtype: torch.dtype
) -> Config:
    """The configuration of the weight's gradient: a step is a box of 64 pixels (float32: 32)."""
    pixels = 32 if dtype == torch.float32 else 64
    boxes = _boxes(pixels, batch)

    def wasted(box: Box) -> tuple[int, int]:
        computed = 0
        for t in range(geometry.taps):
            many = ceil_div(batch, box[0])
            for axis in (0, 1):
                k = t // geometry.kernel[1] if axis == 0 else t % geometry.kernel[1]
                many *= ceil_div(_outputs_of_tap(geometry, axis, k), box[1 + axis])
            computed += many
        return computed, -box[2]

    def block(size: int) -> int:
        return 128 if size > 64 else 64 if size > 32 else 32

    first, second = block(out_channels), block(channels)
    if out_channels > 128:
        first = 256
    warps = 8 if first * second > 128 * 64 else 4
    return Config(min(boxes, key=wasted), first, second, warps, 3)


def _outputs_of_tap(g: Geometry, axis: int, k: int) -> int:
    """Outputs along an axis whose input through tap k lies inside the image."""
    size, out = ((g.height, g.out_height), (g.width, g.out_width))[axis]
    shift = k * g.dilation[axis] - g.padding[axis]
    return max(0, min(out, size - shift) - max(0, -shift))


@lru_cache(maxsize=1024)
def weight_parts(
    batch: int,
    channels: int,
    out_channels: int,
    geometry: Geometry,
    config: Config,
    multiprocessors: int,
) -> int:
    """Parts of the sum over pixels that fill the device."""
    blocks = ceil_div(out_channels, config.block) * ceil_div(channels, config.step)
    boxes = []
    for t in range(geometry.taps):
        rows = _outputs_of_tap(geometry, 0, t // geometry.kernel[1])
        columns = _outputs_of_tap(geometry, 1, t % geometry.kernel[1])
        boxes.append(
            ceil_div(batch, config.box[0])
            * ceil_div(rows, config.box[1])
            * ceil_div(columns, config.box[2])
        )
    longest = max(boxes, default=0)
    places = multiprocessors * (1 if config.block * config.step > 128 * 128 else 2)
    best = (float("inf"), 1)
    for parts in range(1, 17):
        if parts > 1 and longest // parts < _LEAST_STEPS:
            break
        lengths = Counter({0: 0})
        for many in boxes:
            lengths[ceil_div(many, parts)] += blocks * parts
        steps = _waves(lengths, places, sum(lengths.values()))
        best = min(best, (steps + (_CUT_COST + 4 * parts if parts > 1 else 0), parts))
    return best[1]
