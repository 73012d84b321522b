"""The Triton kernels of the exact filter without a GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton: Any = pytest.importorskip("triton", reason="Triton is for Linux")

TOLERANCE = {"high": 2e-6, "default": 1e-3}

# Triton reads the variable when it is imported, so that a process of its own is needed.
INTERPRETED = """
import sys
import torch
from segkernels.ops.gaussian_filter import blocked, triton_kernels
from segkernels.ops.gaussian_filter.points import Points

dims, count, queries, channels = map(int, sys.argv[1:])
torch.manual_seed(0)
torch.set_num_threads(1)
keys = Points(torch.randn(2, dims, count) * (3 / dims**0.5) + 100)
at = Points(torch.randn(2, dims, queries) + 100) if queries else keys
values, left = torch.randn(2, channels, count), torch.randn(2, channels, at.count)
values[:, 0] *= 1e6  # beyond float16
values[0, -1] = 0
rows, pair = keys.rows(values), (at.rows(left / channels), keys.rows(values))
reach = 30.0 if count > 64 else 100.0
for precision in ("high", "default"):
    got = triton_kernels.apply(at, keys, rows, reach, precision == "high")
    want = blocked.apply(at, keys, rows, reach)
    scale = blocked.apply(at, keys, rows.abs(), reach).amax(dim=1, keepdim=True)
    print(precision, float(((got - want).abs() / (scale + 1e-30)).max()))
    got = triton_kernels.pull(at, keys, *pair, reach, precision == "high")
    want = blocked.pull(at, keys, *pair, reach)
    print("pull", float((got - want).abs().max() / (want.abs().max() + 1e-30)))
"""


@pytest.mark.parametrize(
    ("dims", "count", "queries", "channels"),
    [(1, 1, 0, 1), (5, 200, 0, 3), (3, 70, 130, 40), (16, 65, 0, 70)],
)
def test_interpreted_kernels_agree_with_blocks(dims, count, queries, channels, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, *map(str, (dims, count, queries, channels))],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in found] == ["high", "pull", "default", "pull"]
    for name, error in found:
        assert float(error) <= TOLERANCE.get(name, 2e-6), (name, error)
    # Products of float16 leave their mark, or they were not made.
    if count > 1:
        assert float(found[2][1]) > 1e-5


def test_interpreted_lists_are_the_tiles_within_reach(tmp_path):
    code = """
import torch
from segkernels.ops.gaussian_filter import blocked, triton_kernels
from segkernels.ops.gaussian_filter.points import TILE, Points

points = Points(torch.randn(1, 2, 10000) * 20)
low, high = points.boxes(TILE)
first, last = (box[:, :, 3:].contiguous() for box in points.boxes(triton_kernels.QUERIES))
tiles = first.shape[2]
near = torch.full((1, 4, low.shape[2]), -1, dtype=torch.int32)
count = torch.zeros(1, 4, dtype=torch.int32)
triton_kernels.near_kernel[(4, 1)](
    first, last, low, high, near, count, 2, tiles, low.shape[2], 9.0, DIMS=2, BLOCK=32
)
wanted = list(blocked.tiles_within(points, points, 9.0, triton_kernels.QUERIES, 0))
for entry in range(4):
    want = wanted[entry + 5].nonzero().view(-1)
    assert 1 < len(want) < low.shape[2] / 2
    assert near[0, entry, : count[0, entry]].tolist() == want.tolist()
    assert bool((near[0, entry, count[0, entry] :] == -1).all())
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "same\n", done.stderr


POINTERS = {
    **dict.fromkeys(("x", "y", "out", "a", "b", "first", "last", "low", "high"), "*fp32"),
    **dict.fromkeys(("near", "count"), "*i32"),
    "v": "*fp16",
    "reach": "fp32",
}


def _kernel(name: str, dims: int, precise: bool) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """A kernel, its types and constants, with as many channels as a program takes."""
    from segkernels.ops.gaussian_filter import triton_kernels
    from segkernels.ops.gaussian_filter.points import TILE

    types, block = dict(POINTERS), triton_kernels.block_of(1000, dims, precise)
    if name == "near":
        return triton_kernels.near_kernel, types, {"DIMS": dims, "BLOCK": 128}
    shape = {"DIMS": dims, "M": triton_kernels.QUERIES, "N": TILE}
    if name == "pull":
        rest = {"C": min(32, block), "D": triton.next_power_of_2(dims)}
        return triton_kernels.pull_kernel, types, {**shape, **rest, "PRECISION": "tf32x3"}
    if precise:
        types["v"] = "*fp32"
    rest = {"C": block, "SHIFT": 0.0 if precise else 15.0, "HALF": not precise, "WIDEN": False}
    return triton_kernels.apply_kernel, types, {**shape, **rest}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "dims", "precise"),
    [
        ("near", 5, False),
        ("apply", 5, False),
        ("apply", 6, True),
        ("apply", 16, False),
        ("apply", 16, True),
        ("pull", 5, True),
        ("pull", 16, True),
    ],
)
def test_compiles_without_spills(name, dims, precise, arch, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants = _kernel(name, dims, precise)
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, "i32")
        for argument in kernel.arg_names
    }
    # As a launch finds them: pointers of torch's allocator, and sizes that are padded.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument in ("queries", "keys", "channels")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4 if name == "near" else 8}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    report = ptxas(ptx, tmp_path)
    assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report
    if name == "apply":
        assert ("wgmma" if arch == 90 else "mma.sync") in ptx
        assert "ex2.approx.ftz.f32" in ptx


def ptxas(ptx: str, folder: Path) -> str:
    """ptxas's report on a kernel."""
    (folder / "kernel.ptx").write_text(ptx)
    # Of several the newest, whose name comes last, knows every version of PTX that Triton writes.
    tool = max(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    done = subprocess.run(
        [tool, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
