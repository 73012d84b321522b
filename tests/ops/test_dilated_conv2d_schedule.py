"""The Hopper convolution's schedule, executed in plain torch on the CPU.

`python tests/ops/test_dilated_conv2d_schedule.py` prints the load balance for the papers' shapes.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from segkernels import _native

SEGMENT_WORDS, FIXUP_WORDS = 10, 6
MULTIPROCESSORS = 132  # of an H100


class Branch(NamedTuple):
    kernel: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    out_channels: int


class Segment(NamedTuple):  # see struct Segment in csrc/dilated_conv2d/schedule.h
    places: tuple[int, int]  # box indices
    branch: int
    column: int
    begin: int
    end: int
    slot: int
    first_tap: tuple[int, int]
    taps_across: int


class Fixup(NamedTuple):  # see struct Fixup there
    place: int  # box index
    branch: int
    column: int
    first: int
    stride: int
    count: int


class Schedule:
    """The result of `_C.dilated_conv2d_schedule`, unpacked."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.box, self.boxes = found["box"], found["boxes"]
        self.tile_channels, self.cluster = found["tile_channels"], found["cluster"]
        self.workers, self.max_load = found["workers"], found["max_load"]
        self.tile_steps, self.workspace_tiles = found["tile_steps"], found["workspace_tiles"]
        self.table = found["table"]
        words = torch.frombuffer(bytearray(self.table), dtype=torch.int32)
        counts = [
            self.workers + 1,
            found["segments"] * SEGMENT_WORDS,
            found["fixups"] * FIXUP_WORDS,
        ]
        start, segments, fixups = words.split(counts)
        self.start = start.tolist()
        self.segments = [
            Segment((s[0], s[1]), *s[2:7], (s[7], s[8]), s[9])
            for s in segments.view(-1, SEGMENT_WORDS).tolist()
        ]
        self.fixups = [Fixup(*f) for f in fixups.view(-1, FIXUP_WORDS).tolist()]

    def origin(self, place: int) -> tuple[int, int, int]:
        """First image, row and column of a box."""
        _, rows, columns = self.boxes
        n, y, x = place // (rows * columns), place // columns % rows, place % columns
        return n * self.box[0], y * self.box[1], x * self.box[2]

    def loads(self) -> list[int]:
        """Loop steps per worker."""
        pairs = itertools.pairwise(self.start)
        return [sum(s.end - s.begin for s in self.segments[a:b]) for a, b in pairs]

    def unevenness(self) -> float:
        """Load of the busiest worker divided by the mean load."""
        return self.max_load * self.workers * self.cluster / self.tile_steps


def out_sizes(size: tuple[int, int], branch: Branch) -> tuple[int, int]:
    reach = [d * (k - 1) for d, k in zip(branch.dilation, branch.kernel, strict=True)]
    return (
        size[0] + 2 * branch.padding[0] - reach[0],
        size[1] + 2 * branch.padding[1] - reach[1],
    )


def schedule(
    batch: int,
    channels: int,
    size: tuple[int, int],
    branches: list[Branch],
    multiprocessors: int = MULTIPROCESSORS,
    step: int = 64,
    **options: Any,
) -> Schedule:
    out = out_sizes(size, branches[0])
    return Schedule(
        _native.C().dilated_conv2d_schedule(
            batch, size, out, -(-channels // step), branches, multiprocessors, **options
        )
    )


def same(kernel: int, dilation: int, out_channels: int) -> Branch:
    """A branch with "same" padding."""
    pad = dilation * (kernel - 1) // 2
    return Branch((kernel, kernel), (dilation, dilation), (pad, pad), out_channels)


def taps_of(x: torch.Tensor, branch: Branch, out: tuple[int, int]) -> torch.Tensor:
    """The input of each tap at each output: [kh, kw, N, C, H, W]."""
    (kh, kw), (dh, dw), (ph, pw) = branch.kernel, branch.dilation, branch.padding
    pads = [
        (p, max(0, o + d * (k - 1) - p - s))
        for p, o, d, k, s in ((ph, out[0], dh, kh, x.size(2)), (pw, out[1], dw, kw, x.size(3)))
    ]
    padded = F.pad(x, (*pads[1], *pads[0]))
    rows = [
        torch.stack(
            [padded[:, :, i * dh : i * dh + out[0], j * dw : j * dw + out[1]] for j in range(kw)]
        )
        for i in range(kh)
    ]
    return torch.stack(rows)


def execute(
    s: Schedule, x: torch.Tensor, weights: list[torch.Tensor], branches: list[Branch], step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the concatenated convolutions from the segments and fix-ups of `s`.

    Returns the output, and how often each (output, tap, channel step) was multiplied:
    [CO, N, H, W, taps * steps].
    """
    out = out_sizes(x.shape[2:], branches[0])
    offsets = [0, *itertools.accumulate(b.out_channels for b in branches)]
    steps = -(-x.size(1) // step)
    taps = max(b.kernel[0] * b.kernel[1] for b in branches)
    y = torch.full((x.size(0), offsets[-1], *out), float("nan"), dtype=x.dtype)
    seen = torch.zeros(offsets[-1], x.size(0), *out, taps * steps, dtype=torch.int32)
    shifted = [taps_of(x, b, out) for b in branches]
    tile = (*s.box, s.tile_channels)
    workspace = torch.full((s.workspace_tiles, *tile), float("nan"), dtype=x.dtype)

    def region(place: int, branch: int, column: int) -> tuple[slice, ...]:
        n, h, w = s.origin(place)
        first = column * s.tile_channels
        last = min(first + s.tile_channels, branches[branch].out_channels)
        return (
            slice(n, n + s.box[0]),
            slice(offsets[branch] + first, offsets[branch] + last),
            slice(h, h + s.box[1]),
            slice(w, w + s.box[2]),
        )

    def put(place: int, branch: int, column: int, value: torch.Tensor) -> None:
        at = region(place, branch, column)
        target = y[at]
        assert target.isnan().all(), "a tile is written twice"
        n, c, h, w = target.shape
        target.copy_(value[:n, :h, :w, :c].permute(0, 3, 1, 2))

    for segment in s.segments:
        branch = branches[segment.branch]
        kw, weight = branch.kernel[1], weights[segment.branch]
        for rank in range(s.cluster):
            place = segment.places[rank]
            if place < 0:
                assert rank == 1
                continue
            n, c, h, w = region(place, segment.branch, segment.column)
            channels = slice(c.start - offsets[segment.branch], c.stop - offsets[segment.branch])
            sums = torch.zeros(tile, dtype=x.dtype)
            for i in range(segment.begin, segment.end):
                tap, k = divmod(i, steps)
                ky = segment.first_tap[0] + tap // segment.taps_across
                kx = segment.first_tap[1] + tap % segment.taps_across
                part = slice(k * step, (k + 1) * step)
                box = shifted[segment.branch][ky, kx][n, part, h, w]
                products = torch.einsum("ncyx,oc->nyxo", box, weight[channels, part, ky, kx])
                sums[tuple(map(slice, products.shape))] += products
                seen[c, n, h, w, (ky * kw + kx) * steps + k] += 1
            if segment.slot < 0:
                put(place, segment.branch, segment.column, sums)
            else:
                target = workspace[segment.slot * s.cluster + rank]
                assert target.isnan().all(), "a slot is written twice"
                target.copy_(sums)
    for fixup in s.fixups:
        total = torch.zeros(tile, dtype=x.dtype)
        for i in range(fixup.count):
            total += workspace[fixup.first + i * fixup.stride]
        put(fixup.place, fixup.branch, fixup.column, total)
    return y, seen


def check(
    batch: int,
    channels: int,
    size: tuple[int, int],
    branches: list[Branch],
    step: int,
    **options: Any,
) -> Schedule:
    s = schedule(batch, channels, size, branches, step=step, **options)
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    weights = [
        torch.randn(b.out_channels, channels, *b.kernel, dtype=torch.float64) for b in branches
    ]
    y, seen = execute(s, x, weights, branches, step)
    expected = [
        F.conv2d(x, w, None, 1, b.padding, b.dilation)
        for w, b in zip(weights, branches, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat(expected, 1))

    # (output, tap, channel step) inside the image: exactly once; else at most once.
    assert int(seen.max()) <= 1
    first = 0
    steps = -(-channels // step)
    for b in branches:
        inside = taps_of(torch.ones(batch, 1, *size), b, y.shape[2:]).flatten(0, 1)[:, :, 0] > 0
        count = seen[first : first + b.out_channels]
        wanted = inside.permute(1, 2, 3, 0).repeat_interleave(steps, -1)
        assert bool((count[..., : wanted.size(-1)][:, wanted] == 1).all())
        first += b.out_channels

    # Partial sums are added in the order of the loop.
    pieces: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for segment in s.segments:
        assert segment.begin < segment.end
        if segment.slot < 0:
            assert segment.begin == 0
            continue
        for rank in range(s.cluster):
            key = (segment.places[rank], segment.branch, segment.column)
            tile = segment.slot * s.cluster + rank
            pieces.setdefault(key, []).append((tile, segment.begin, segment.end))
    for fixup in s.fixups:
        tiles = [fixup.first + i * fixup.stride for i in range(fixup.count)]
        mine = sorted(pieces.get((fixup.place, fixup.branch, fixup.column), []))
        assert [tile for tile, _, _ in mine] == tiles
        ends = [0] + [end for _, _, end in mine]
        assert [begin for _, begin, _ in mine] == ends[:-1]
    assert max(s.loads()) == s.max_load
    return s


@given(data=st.data())
def test_segments_compute_the_convolution(data: st.DataObject) -> None:
    def draw(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    torch.manual_seed(0)
    kernel = (draw("kh", 1, 4), draw("kw", 1, 4))
    dilation = (draw("dh", 1, 7), draw("dw", 1, 7))
    padding = (draw("ph", 0, 9), draw("pw", 0, 9))
    size = tuple(
        max(draw(name, 1, 19), d * (k - 1) - 2 * p + 1)
        for name, d, k, p in zip("HW", dilation, kernel, padding, strict=True)
    )
    check(
        draw("N", 1, 5),
        draw("C", 1, 70),
        size,
        [Branch(kernel, dilation, padding, draw("CO", 1, 70))],
        16,
        multiprocessors=draw("multiprocessors", 1, 12),
        tile_channels=data.draw(st.sampled_from([0, 32, 64])),
        cluster=draw("cluster", 0, 2),
    )


@pytest.mark.parametrize("cluster", [1, 2])
def test_branches_of_aspp(cluster: int) -> None:
    branches = [same(1, 1, 24), *(same(3, d, 24) for d in (3, 6, 9))]
    s = check(2, 64, (17, 17), branches, 16, multiprocessors=10, cluster=cluster, tile_channels=32)
    assert {segment.branch for segment in s.segments} == {0, 1, 2, 3}


def test_both_tiles_of_a_cut_pair_are_summed() -> None:
    s = check(
        5, 136, (11, 13), [same(3, 1, 72)], 64, multiprocessors=10, cluster=2, tile_channels=64
    )
    assert {fixup.first % 2 for fixup in s.fixups} == {0, 1}


def test_tiles_without_taps_are_zero() -> None:
    # With this much padding the outermost outputs read no input.
    s = check(1, 16, (5, 5), [Branch((1, 1), (1, 1), (20, 20), 8)], 16, multiprocessors=4)
    assert any(fixup.count == 0 for fixup in s.fixups)


def test_negative_padding_crops_the_border() -> None:
    # The input gradient of a 1x1 convolution with padding 2 has padding -2.
    s = Schedule(
        _native.C().dilated_conv2d_schedule(
            1, (9, 9), (5, 5), 1, [((1, 1), (1, 1), (-2, -2), 8)], 4
        )
    )
    assert sum(segment.end - segment.begin for segment in s.segments) == s.tile_steps > 0


def taps_inside(
    s: Schedule, size: tuple[int, int], out: tuple[int, int], branch: Branch
) -> list[list[list[int]]]:
    """The taps through which a box of `s` reads the image, by axis and box of that axis."""
    found: list[list[list[int]]] = []
    for axis in (0, 1):
        kernel, dilation, padding = (field[axis] for field in branch[:3])
        extent, boxes = s.box[1 + axis], []
        for start in range(0, out[axis], extent):
            read = range(start - padding, min(start + extent, out[axis]) - padding)
            boxes.append(
                [k for k in range(kernel) if any(0 <= y + k * dilation < size[axis] for y in read)]
            )
        found.append(boxes)
    return found


@given(data=st.data())
def test_segments_have_the_taps_inside_the_image(data: st.DataObject) -> None:
    def draw(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    size = (draw("H", 1, 40), draw("W", 1, 40))
    b = Branch(
        (draw("kh", 1, 7), draw("kw", 1, 7)), (draw("dh", 1, 40), draw("dw", 1, 12)),
        (draw("ph", -3, 30), draw("pw", -3, 30)), 8,
    )  # fmt: skip
    out = (draw("OH", 1, 40), draw("OW", 1, 40))
    s = Schedule(_native.C().dilated_conv2d_schedule(2, size, out, 1, [b], 4))
    steps: dict[int, tuple[Any, ...]] = {
        segment.places[0]: (*segment.first_tap, segment.taps_across) for segment in s.segments
    }
    down, across = taps_inside(s, size, out, b)
    total = 0
    for place in range(s.boxes[0] * s.boxes[1] * s.boxes[2]):
        _, y, x = s.origin(place)
        rows, columns = down[y // s.box[1]], across[x // s.box[2]]
        needed = (rows[0], columns[0], len(columns)) if rows and columns else None
        assert steps.get(place) == needed
        total += len(rows) * len(columns)
    assert total == s.tile_steps


def weight_schedule(
    batch: int,
    channels: int,
    size: tuple[int, int],
    branch: Branch,
    multiprocessors: int = MULTIPROCESSORS,
) -> Schedule:
    out = out_sizes(size, branch)
    return Schedule(
        _native.C().dilated_conv2d_weight_schedule(
            batch, size, out, channels, branch, multiprocessors
        )
    )


@given(data=st.data())
def test_weight_gradient_reads_every_box_once(data: st.DataObject) -> None:
    def draw(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    kernel, dilation = draw("k", 1, 4), draw("d", 1, 9)
    padding = draw("p", 0, 12)
    size = tuple(max(draw(name, 1, 40), dilation * (kernel - 1) - 2 * padding + 1) for name in "HW")
    b = Branch((kernel,) * 2, (dilation,) * 2, (padding,) * 2, draw("CO", 1, 300))
    channels = draw("C", 1, 600)
    s = weight_schedule(draw("N", 1, 9), channels, size, b, draw("multiprocessors", 1, 20))
    out = out_sizes(size, b)
    down, across = taps_inside(s, size, out, b)
    tiles = (-(-b.out_channels // 128), kernel**2, -(-channels // s.tile_channels))
    seen = torch.zeros(*tiles, *s.boxes, dtype=torch.int32)
    for segment in s.segments:
        for i in range(segment.begin, segment.end):
            box, image = divmod(i, s.boxes[0])
            row = segment.first_tap[0] + box // segment.taps_across
            column = segment.first_tap[1] + box % segment.taps_across
            seen[segment.places[0], segment.branch, segment.column, image, row, column] += 1
    for row, column in itertools.product(range(s.boxes[1]), range(s.boxes[2])):
        for y, x in itertools.product(range(kernel), repeat=2):
            wanted = int(y in down[row] and x in across[column])
            assert bool((seen[:, y * kernel + x, :, :, row, column] == wanted).all())
    # One uncut segment, or one fix-up that adds its slots in order, writes each tile.
    writers = torch.zeros(tiles, dtype=torch.int32)
    slots = {segment.slot: segment for segment in s.segments if segment.slot >= 0}
    for segment in s.segments:
        if segment.slot < 0:
            writers[segment.places[0], segment.branch, segment.column] += 1
    for fixup in s.fixups:
        writers[fixup.place, fixup.branch, fixup.column] += 1
        pieces = [slots.pop(fixup.first + i) for i in range(fixup.count)]
        assert all(
            (p.places[0], p.branch, p.column) == (fixup.place, fixup.branch, fixup.column)
            for p in pieces
        )
        ends = [0] + [p.end for p in pieces]
        assert [p.begin for p in pieces] == ends[:-1]
    assert bool((writers == 1).all())
    assert not slots


def test_schedule_is_deterministic() -> None:
    first, second = (schedule(8, 2048, (65, 65), [same(3, 12, 256)]).table for _ in range(2))
    assert first == second


def test_boxes_fit_the_plane() -> None:
    # 33 rows make three boxes of 11, not five of 8; batch 1 makes no boxes of several images.
    s = schedule(1, 2048, (33, 33), [same(3, 6, 256)])
    assert s.box == [1, 11, 11]
    assert schedule(1, 64, (1, 300), [same(1, 1, 8)]).box[:2] == [1, 1]


@pytest.mark.parametrize(
    ("out_channels", "tile"), [(21, 32), (64, 64), (100, 128), (256, 256), (384, 128), (1024, 256)]
)
def test_tile_follows_the_output_channels(out_channels: int, tile: int) -> None:
    assert schedule(8, 512, (65, 65), [same(3, 12, out_channels)]).tile_channels == tile


# batch, channels, size, dilation of a 3x3 kernel, out channels, and the bound on the load of the
# busiest multiprocessor relative to the mean.
PAPER_SHAPES = [
    (8, 2048, (65, 65), 6, 256, 1.05),
    (8, 2048, (65, 65), 12, 256, 1.05),
    (8, 2048, (65, 65), 24, 256, 1.05),
    (8, 2048, (65, 65), 36, 256, 1.05),
    (8, 512, (41, 41), 12, 1024, 1.05),
    (8, 512, (65, 65), 4, 512, 1.05),
    (8, 256, (65, 65), 2, 256, 1.12),
    (8, 2048, (33, 33), 18, 256, 1.05),
    (1, 2048, (65, 65), 12, 256, 1.08),
    (1, 2048, (128, 256), 12, 256, 1.05),
    (8, 2048, (65, 65), 6, 21, 1.05),
    (8, 2048, (65, 65), 24, 21, 1.05),
]


def useful_share(
    s: Schedule, batch: int, channels: int, size: tuple[int, int], branch: Branch
) -> float:
    """(pixel, tap) pairs inside the image, relative to the work at the busiest one's load."""
    inside = taps_of(torch.ones(1, 1, *size), branch, out_sizes(size, branch)).sum().item()
    products = inside * batch * -(-channels // 64) * -(-branch.out_channels // s.tile_channels)
    return products / 128 / (s.max_load * s.workers * s.cluster)


@pytest.mark.parametrize(
    ("batch", "channels", "size", "dilation", "out_channels", "bound"), PAPER_SHAPES
)
def test_load_is_balanced(
    batch: int, channels: int, size: tuple[int, int], dilation: int, out_channels: int, bound: float
) -> None:
    s = schedule(batch, channels, size, [same(3, dilation, out_channels)])
    assert max(s.loads()) == s.max_load
    assert sum(s.loads()) * s.cluster >= s.tile_steps
    assert 1 <= s.unevenness() <= bound
    # At most 1.1 cut tiles per multiprocessor.
    assert len(s.fixups) <= 1.1 * MULTIPROCESSORS

    of_weight = weight_schedule(batch, channels, size, same(3, dilation, out_channels))
    assert max(of_weight.loads()) == of_weight.max_load
    assert 1 <= of_weight.unevenness() <= 1.06


def test_load_of_aspp_in_one_launch_is_balanced() -> None:
    branches = [same(1, 1, 256), *(same(3, d, 256) for d in (12, 24, 36))]
    assert schedule(8, 2048, (65, 65), branches).unevenness() <= 1.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branches": []}, "branches"),
        ({"branches": [((8, 1), (1, 1), (0, 0), 8)]}, "kernels of 1 to 7"),
        ({"branches": [((1, 1), (0, 1), (0, 0), 8)]}, "dilation"),
        ({"out_size": (0, 4)}, "31 bits"),
        ({"multiprocessors": 0}, "positive"),
        ({"box": (2, 8, 9)}, "128 pixels"),
        ({"batch": 2**30, "out_size": (4096, 4096)}, "split the batch"),
    ],
)
def test_invalid_shapes(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "batch": 1,
        "in_size": (4, 4),
        "out_size": (4, 4),
        "channel_steps": 1,
        "branches": [((1, 1), (1, 1), (0, 0), 8)],
        "multiprocessors": 4,
    }
    with pytest.raises(ValueError, match=message):
        _native.C().dilated_conv2d_schedule(**{**arguments, **change})


def main() -> None:
    print(
        "batch channels size dilation -> out: busiest/mean, useful share, box, cluster, cut tiles"
    )
    for batch, channels, size, dilation, out_channels, _ in PAPER_SHAPES:
        branch = same(3, dilation, out_channels)
        s = schedule(batch, channels, size, [branch])
        share = useful_share(s, batch, channels, size, branch)
        print(
            f"{batch} {channels} {size[0]}x{size[1]} d={dilation} -> {out_channels}: "
            f"{s.unevenness():.3f} {share:.3f} {s.box} {s.cluster} {len(s.fixups)}"
        )
        s = weight_schedule(batch, channels, size, branch)
        print(f"    weight's gradient: {s.unevenness():.3f} {s.box} {len(s.fixups)}")


if __name__ == "__main__":
    main()
