"""Triton kernels of the exact Gaussian filter: values, and compiles ahead of time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from emulation import interpreter
from ops import triton_tools
from ops.triton_tools import triton

from segkernels.ops.gaussian_filter import blocked
from segkernels.ops.gaussian_filter.points import TILE, Points


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("dims", "count", "queries", "channels"),
    [(3, 70, 130, 40), (1, 1, 0, 1), (5, 300, 0, 3), (16, 65, 0, 70)],
)
def test_agrees_with_blocked_torch(dims, count, queries, channels):
    from segkernels.ops.gaussian_filter import triton_kernels

    keys = Points(torch.randn(2, dims, count) * (3 / dims**0.5) + 100)
    at = Points(torch.randn(2, dims, queries) + 100) if queries else keys
    values, left = torch.randn(2, channels, count), torch.randn(2, channels, at.count)
    values[:, 0] *= 1e6  # out of float16's range
    values[0, -1] = 0
    rows, pair = keys.rows(values), (at.rows(left / channels), keys.rows(values))
    reach = 30.0 if count > 64 else 100.0
    want = blocked.apply(at, keys, rows, reach)
    scale = blocked.apply(at, keys, rows.abs(), reach).amax(dim=1, keepdim=True)
    gradient = blocked.query_gradient(at, keys, *pair, reach)
    for precise, tolerance in ((True, 2e-6), (False, 1e-3)):
        got = triton_kernels.apply(at, keys, rows, reach, precise)
        error = float(((got - want).abs() / (scale + 1e-30)).max())
        assert error <= tolerance
        # The error shows that the products really are in float16.
        assert precise or count == 1 or error > 1e-5
        got = triton_kernels.query_gradient(at, keys, *pair, reach, precise)
        assert float((got - gradient).abs().max() / (gradient.abs().max() + 1e-30)) <= 2e-6


@interpreter.on_triton
def test_lists_hold_the_tiles_within_reach(device):
    from segkernels.ops.gaussian_filter import triton_kernels

    points = Points(torch.randn(1, 2, 10000, device=device) * 20)
    low, high = points.boxes(TILE)
    first, last = (box[:, :, 3:].contiguous() for box in points.boxes(triton_kernels.QUERIES))
    tiles = first.shape[2]
    near = torch.full((1, 4, low.shape[2]), -1, dtype=torch.int32, device=device)
    count = torch.zeros(1, 4, dtype=torch.int32, device=device)
    triton_kernels.tile_list_kernel[(4, 1)](
        first, last, low, high, near, count, 2, tiles, low.shape[2], 9.0, DIMS=2, BLOCK=32
    )
    wanted = list(blocked.tiles_within(points, points, 9.0, triton_kernels.QUERIES, 0))
    for entry in range(4):
        want = wanted[entry + 5].nonzero().view(-1)
        assert 1 < len(want) < low.shape[2] / 2
        assert near[0, entry, : count[0, entry]].tolist() == want.tolist()
        assert bool((near[0, entry, count[0, entry] :] == -1).all())


POINTERS = {
    **dict.fromkeys(("x", "y", "out", "a", "b", "first", "last", "low", "high"), "*fp32"),
    **dict.fromkeys(("tile_list", "list_length"), "*i32"),
    "v": "*fp16",
    "reach": "fp32",
}


def _kernel(name: str, dims: int, precise: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """A kernel with its types and constants, for the most channels that a program handles."""
    from segkernels.ops.gaussian_filter import triton_kernels

    types, block = dict(POINTERS), triton_kernels.block_of(1000, dims, precise)
    if name == "tile_list":
        return triton_kernels.tile_list_kernel, types, {"DIMS": dims, "BLOCK": 128}
    shape = {"DIMS": dims, "M": triton_kernels.QUERIES, "N": TILE}
    if name == "query_gradient":
        rest = {"C": min(32, block), "D": triton.next_power_of_2(dims)}
        return triton_kernels.query_gradient_kernel, types, {**shape, **rest, "PRECISION": "tf32x3"}
    if precise:
        types["v"] = "*fp32"
    rest = {"C": block, "SHIFT": 0.0 if precise else 15.0, "HALF": not precise}
    return triton_kernels.apply_kernel, types, {**shape, **rest}


# Bytes that a kernel may spill, by (Triton version, name, dimensions, precise, architecture).
SPILLS = {((3, 8), "apply", 6, True, 90): 8}


@pytest.mark.compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "dims", "precise"),
    [
        ("tile_list", 5, False),
        ("apply", 5, False),
        ("apply", 6, True),
        ("apply", 16, False),
        ("apply", 16, True),
        ("query_gradient", 5, True),
        ("query_gradient", 16, True),
    ],
)
@pytest.mark.nightly
def test_compiles_without_spills(name, dims, precise, arch, tmp_path):
    from segkernels.ops.gaussian_filter import triton_kernels

    kernel, types, constants = _kernel(name, dims, precise)
    warps, stages = 4 if name == "tile_list" else 8, 3
    if name == "apply":
        stages = triton_kernels.stages_of(precise)
    made = triton_tools.compiled(kernel, types, constants, arch, warps, stages)
    report = triton_tools.ptxas(made.asm["ptx"], tmp_path)
    assert report.spilled <= SPILLS.get((triton_tools.TRITON, name, dims, precise, arch), 0), report
    if name == "apply":
        assert ("wgmma" if arch == 90 else "mma.sync") in made.asm["ptx"]
        assert "ex2.approx.ftz.f32" in made.asm["ptx"]


def test_other_sizes_do_not_recompile(monkeypatch):
    from segkernels.ops.gaussian_filter import triton_kernels

    compiles = triton_tools.note_compiles(monkeypatch)
    for count in (1, 16, 63, 64, 65, 128, 200, 1000, 1024, 4097):
        points = Points(torch.randn(1, 5, count))
        rows = points.rows(torch.randn(1, 3 + count % 9, count))
        triton_kernels.apply(points, points, rows, 100.0, False)
        triton_kernels.query_gradient(points, points, rows, rows, 100.0, False)
    found = Counter(name for name, _ in set(compiles))
    assert found == {"tile_list_kernel": 1, "apply_kernel": 1, "query_gradient_kernel": 1}
