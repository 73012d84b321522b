"""max_unpool2d: the shared suite, torch's results, round trips, duplicates, invalid positions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulation import ON_CUDA
from lattice_points import raises_in_call
from ops import suite
from ops.suite import Error, Float, Sample, same_bits

import segkernels
from segkernels.ops import _windows
from segkernels.ops.max_pool2d import reference as pool_reference
from segkernels.ops.max_unpool2d import reference


def codes_of(shape: tuple[int, ...], *args: Any, **kwargs: Any) -> suite.Make:
    """Codes from pooling standard normal values of `shape`."""
    return lambda g: pool_reference.max_pool2d(
        torch.randn(shape, generator=g), *args, return_codes=True, **kwargs
    )[1]


def indices_of(shape: tuple[int, ...], *args: Any) -> suite.Make:
    return lambda g: pool_reference.max_pool2d(
        torch.randn(shape, generator=g), *args, return_indices=True
    )[1]


def anywhere(shape: tuple[int, ...], places: int) -> suite.Make:
    """Random indices into a plane of `places` pixels, with duplicates."""
    return lambda g: torch.randint(0, places, shape, generator=g)


def distinct(shape: tuple[int, ...], places: int) -> suite.Make:
    return lambda g: torch.stack(
        [torch.randperm(places, generator=g)[: shape[2] * shape[3]] for _ in range(6)]
    ).reshape(shape)


def unpool_error(
    indices: Callable[[torch.Tensor], Any] = lambda i: i, *args: Any, **kwargs: Any
) -> Callable[[str], Any]:
    def call(device: str) -> Any:
        x = torch.zeros(2, 3, 4, 4, device=device)
        codes = torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device=device)
        return segkernels.max_unpool2d(x, indices(codes), *(args or (2,)), **kwargs)

    return call


class TestMaxUnpool2d(suite.OpSuite):
    function = staticmethod(segkernels.max_unpool2d)
    reference = staticmethod(reference.max_unpool2d)
    same_bits_as_cpu = True
    samples = [
        Sample("2x2", (Float(2, 8, 3, 8), codes_of((2, 8, 6, 16), 2), 2), grad=True, compile=True),
        Sample(
            "2x2, larger output",
            (Float(2, 3, 3, 4), codes_of((2, 3, 7, 9), 2), 2, None, 0, (7, 9)),
            grad=True,
        ),
        Sample(
            "2x2, one more row",
            (Float(1, 3, 3, 8), codes_of((1, 3, 7, 16), 2), 2, None, 0, (1, 3, 7, 16)),
            grad=True,
        ),
        Sample(
            "2x2, smaller output",
            (Float(1, 3, 4, 5), codes_of((1, 3, 7, 9), 2, ceil_mode=True), 2, None, 0, (7, 9)),
            grad=True,
        ),
        Sample("3x3", (Float(1, 5, 3, 4), codes_of((1, 5, 9, 12), 3), 3), grad=True),
        Sample("1x2", (Float(1, 4, 3, 4), codes_of((1, 4, 3, 8), (1, 2)), (1, 2)), grad=True),
        Sample(
            "overlap",
            (Float(1, 6, 5, 4), codes_of((1, 6, 9, 7), 3, 2, 1), 3, 2, 1),
            compile=True,
        ),
        Sample("stride 1", (Float(1, 3, 5, 6), codes_of((1, 3, 5, 6), 3, 1, 1), 3, 1, 1)),
        Sample("gaps", (Float(1, 3, 3, 3), codes_of((1, 3, 8, 8), 2, 3), 2, 3), grad=True),
        Sample(
            "dilated",
            (Float(1, 3, 4, 4), codes_of((1, 3, 9, 6), 2, (2, 1), 0, (2, 2)), 2, (2, 1)),
            {"dilation": 2, "output_size": (9, 6)},
        ),
        Sample("16x16", (Float(1, 2, 2, 3), codes_of((1, 2, 32, 48), 16), 16)),
        Sample("1x1 plane", (Float(2, 3, 1, 1), codes_of((2, 3, 1, 1), 1), 1), grad=True),
        Sample("many channels", (Float(1, 133, 2, 3), codes_of((1, 133, 4, 6), 2), 2)),
        Sample(
            "indices",
            (Float(2, 3, 3, 4), indices_of((2, 3, 6, 8), 2), 2),
            grad=True,
            compile=True,
        ),
        Sample("indices anywhere", (Float(2, 3, 3, 4), distinct((2, 3, 3, 4), 48), 2), grad=True),
        Sample("duplicate indices", (Float(1, 70, 3, 4), anywhere((1, 70, 3, 4), 48), 2)),
    ]
    errors = [
        Error("dtype", unpool_error(torch.Tensor.int), RuntimeError, "indices.*torch.int32"),
        Error("shape", unpool_error(lambda i: i[:1]), RuntimeError, r"indices.*\[1, 3, 4, 4\]"),
        Error("no tensor", unpool_error(lambda i: None), TypeError, "'indices' must be Tensor"),
        Error("kernel 0", unpool_error(lambda i: i, 0, 1), RuntimeError, "kernel size should be"),
        Error("stride 0", unpool_error(lambda i: i, 2, 0), RuntimeError, "stride should be"),
        Error("padding < 0", unpool_error(lambda i: i, 2, 2, -1), RuntimeError, "pad must be"),
        Error("cells", unpool_error(lambda i: i, 17), ValueError, "256 cells.*17"),
        Error(
            "negative size", unpool_error(lambda i: i, 2, 2, 5), ValueError, r"output_size\[0\]=-2"
        ),
        Error(
            "output_size, elements",
            unpool_error(output_size=(9,)),
            ValueError,
            "2 or 4 elements.*length of '1'",
        ),
        Error(
            "output_size, far",
            unpool_error(output_size=(10, 9)),
            ValueError,
            r"invalid output_size.*dim 0 must be between 6 and 10",
        ),
        Error(
            "output_size, float",
            unpool_error(output_size=(8.0, 8.0)),
            TypeError,
            "'output_size' must be tuple of ints",
        ),
        Error(
            "dims",
            lambda device: segkernels.max_unpool2d(
                torch.zeros(4, 4, device=device),
                torch.zeros(4, 4, dtype=torch.uint8, device=device),
                2,
            ),
            RuntimeError,
            "3d or 4d Tensor.*2 dimensions",
        ),
        Error(
            "empty",
            lambda device: segkernels.max_unpool2d(
                torch.zeros(2, 0, 4, 4, device=device),
                torch.zeros(2, 0, 4, 4, dtype=torch.uint8, device=device),
                2,
            ),
            RuntimeError,
            r"\[2, 0, 4, 4\] with dimension 1 being empty",
        ),
        Error(
            "device",
            unpool_error(lambda i: i.to("meta")),
            RuntimeError,
            "same device.*indices on meta",
        ),
    ]


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", suite.OpSuite.dtypes, ids=str)
@pytest.mark.parametrize("case", [(2,), (3,), (2, 3), ((1, 4), (2, 4))], ids=str)
@pytest.mark.parametrize("size", [(12, 24), (13, 25)], ids=str)
def test_equals_torch(size: Any, case: Any, dtype: torch.dtype, layout: str, device: str) -> None:
    x = suite.with_layout(torch.randn(2, 5, *size).to(dtype), layout).to(device)
    values, indices = F.max_pool2d(x, *case, return_indices=True)
    _, codes = segkernels.max_pool2d(x, *case, return_codes=True)
    theirs = F.max_unpool2d(values, indices, *case, output_size=size)
    for positions in (codes, indices):
        ours = segkernels.max_unpool2d(values, positions, *case, output_size=size)
        assert same_bits(ours, theirs)
        assert ours.is_contiguous(
            memory_format=torch.channels_last
            if layout == "channels_last"
            else torch.contiguous_format
        )


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [(2,), (3, 2, 1), (2, 3), (3, 1, 1), (2, 2, 0, 2)], ids=str)
def test_round_trip_keeps_the_maxima(case: Any, layout: str, device: str) -> None:
    x = suite.with_layout(torch.randn(2, 6, 13, 16), layout).to(device)
    values, codes = segkernels.max_pool2d(x, *case, return_codes=True)
    _, indices = segkernels.max_pool2d(x, *case, return_indices=True)
    is_maximum = torch.zeros(2, 6, 13 * 16, dtype=torch.bool, device=device)
    is_maximum.scatter_(2, indices.flatten(2), True)
    masked = torch.where(is_maximum.view_as(x), x, 0)
    gap = case[3] if len(case) > 3 else 1
    for positions in (codes, indices):
        restored = segkernels.max_unpool2d(
            values, positions, *case[:3], output_size=x.shape, dilation=gap
        )
        assert torch.equal(restored, masked)


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_last_duplicate_in_row_order_wins(dtype: torch.dtype, layout: str, device: str) -> None:
    # 3x3 windows with stride 2: cell (2, 2) of one window is cell (0, 0) of its diagonal neighbour.
    x = torch.arange(1.0, 10).reshape(1, 1, 3, 3).repeat(1, 7, 1, 1).to(device)
    x = suite.with_layout(x, layout)
    codes = torch.tensor([[8, 6, 6], [2, 0, 0], [2, 0, 0]], dtype=torch.uint8, device=device)
    starts = torch.arange(0, 6, 2, device=device)
    m, n = codes.long() // 3, codes.long() % 3
    indices = (starts[:, None] + m) * 7 + starts + n
    positions = (codes if dtype == torch.uint8 else indices).expand(1, 7, 3, 3)
    out = segkernels.max_unpool2d(x, positions, 3, 2)
    expected = torch.zeros(7, 7, device=device)
    expected[2, 2], expected[2, 4], expected[4, 2], expected[4, 4] = 5, 6, 8, 9
    assert torch.equal(out, expected.expand(1, 7, 7, 7))


def unpooling(kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """Values, indices of the given kind and arguments of an unpooling to the size of `x`."""
    generator = torch.Generator().manual_seed(0)
    if kind in ("tiles", "overlaps", "padded", "far"):
        args = {"tiles": (2, 2, 0), "overlaps": (3, 2, 0), "padded": (3, 2, 1), "far": (7, 2, 2)}
        return *F.max_pool2d(x, *args[kind], return_indices=True), args[kind]
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    if kind == "anywhere":
        indices = torch.randint(0, x[0, 0].numel(), indices.shape, generator=generator)
    elif kind == "one place":
        indices = torch.full_like(indices, 777)
    elif kind == "upside down":
        indices = indices.flip(2)
    elif kind == "one astray":
        indices[-1, 3, -1, 5] = 3
    return values, indices.contiguous(memory_format=torch.channels_last), (2, 2, 0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "kind",
    ["tiles", "overlaps", "padded", "far", "anywhere", "one place", "upside down", "one astray"],
)
def test_order_of_writes_in_channels_last(kind: str, threads: int) -> None:
    # Several blocks of lines per image, regular and irregular indices (csrc/pooling/scatter_cpu.h).
    shape = (2, 96, 131, 70)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = x.contiguous(memory_format=torch.channels_last)
    values, indices, args = unpooling(kind, x)
    torch.set_num_threads(threads)
    out = segkernels.max_unpool2d(values, indices, *args, output_size=shape[2:])
    rows, values = indices.flatten(2), values.flatten(2)
    last = torch.full((2, 96, shape[2] * shape[3]), -1)
    last.scatter_reduce_(2, rows, torch.arange(rows.size(2)).expand_as(rows), "amax")
    expected = values.gather(2, last.clamp_min(0)).where(last >= 0, 0.0)
    assert torch.equal(out, expected.view(shape))


def test_duplicate_indices_all_get_the_gradient() -> None:
    x = torch.ones(1, 1, 1, 3, requires_grad=True)
    out = segkernels.max_unpool2d(x, torch.tensor([[[[1, 1, 0]]]]), (1, 2))
    out.backward(torch.arange(6.0).reshape(1, 1, 1, 6))
    assert x.grad is not None
    assert x.grad.tolist() == [[[[1, 1, 0]]]]


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("positions", ["codes", "indices"])
def test_twice_differentiable(positions: str, device: str) -> None:
    make = {
        "codes": codes_of((1, 2, 6, 8), 2),
        "indices": distinct((2, 3, 3, 4), 48),
    }[positions]
    where = make(torch.Generator().manual_seed(0)).to(device)
    x = torch.randn(where.shape, dtype=torch.float64, device=device, requires_grad=True)

    def squared(values: torch.Tensor) -> torch.Tensor:
        return segkernels.max_unpool2d(values, where, 2) ** 2

    assert torch.autograd.gradcheck(squared, x)
    assert torch.autograd.gradgradcheck(squared, x)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Allocate every output between guards of NaN (7 for integers), which must not be written."""
    guards: list[torch.Tensor] = []

    def empty(x: torch.Tensor, size: Any, w: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = (x.size(0), x.size(1), *size)
        count, guard = x.size(0) * x.size(1) * size[0] * size[1], 4096
        fill = 7 if dtype is not None and not dtype.is_floating_point else float("nan")
        buffer = torch.full((count + 2 * guard,), fill, dtype=dtype or x.dtype, device=x.device)
        guards.extend((buffer[:guard], buffer[guard + count :]))
        inside = buffer[guard : guard + count]
        if w.channels_last:
            return inside.view(shape[0], *size, shape[1]).permute(0, 3, 1, 2)
        return inside.view(shape)

    monkeypatch.setattr(_windows, "empty", empty)
    yield
    assert guards
    assert all(bool(((guard == 7) | guard.isnan()).all()) for guard in guards)


def out_of_range(dtype: torch.dtype) -> list[int]:
    return [4, 9, 255] if dtype == torch.uint8 else [-1, 88, 2**31, 2**32 + 3, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [(2, 2, 0), (3, 2, 1), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.usefixtures("guarded")
def test_invalid_positions_raise_and_write_nothing(
    dtype: torch.dtype,
    case: Any,
    layout: str,
    device: str,
) -> None:
    x = suite.with_layout(torch.ones(1, 16, 3, 4, device=device), layout)
    name = "codes" if dtype == torch.uint8 else "indices"
    for bad in out_of_range(dtype):
        if case[0] == 3 and bad == 4:
            continue
        for place in ((0, 0, 0, 0), (0, 15, 2, 3), (0, 7, 1, 1)):
            positions = torch.zeros(1, 16, 3, 4, dtype=dtype, device=device)
            positions[0, :, 0] = 4 if case[2] and dtype == torch.uint8 else 0
            positions[0, :, :, 0] = 4 if case[2] and dtype == torch.uint8 else 0
            segkernels.max_unpool2d(x, positions, *case)
            positions[place] = bad
            with raises_in_call(f": {name} must be"):
                segkernels.max_unpool2d(x, positions, *case)


def test_code_outside_the_output_raises() -> None:
    x, codes = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="max_unpool2d: codes"):
        segkernels.max_unpool2d(x, codes, 3, 2, 1)
    codes.fill_(3)
    with pytest.raises(ValueError, match="max_unpool2d: codes"):
        segkernels.max_unpool2d(x, codes, 2, 2, 0, (3, 3))


@pytest.mark.parametrize("device", ON_CUDA)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_invalid_positions_are_skipped_and_reported_by_check(
    dtype: torch.dtype, layout: str, device: str
) -> None:
    segkernels.check()
    x = suite.with_layout(torch.ones(1, 16, 3, 4, device=device), layout)
    positions = torch.zeros(1, 16, 3, 4, dtype=dtype, device=device)
    if dtype == torch.int64:
        positions += torch.arange(12, device=device).view(3, 4)
    good = segkernels.max_unpool2d(x, positions, 2)
    segkernels.check()
    for bad in out_of_range(dtype):
        wrong = positions.clone()
        wrong[0, 3, 1, 2] = bad
        out = segkernels.max_unpool2d(x, wrong, 2)
        assert out.sum() == good.sum() - 1
        with pytest.raises(ValueError, match="must be"):
            segkernels.check()


SANITIZED = """
import torch, segkernels
for layout in (torch.contiguous_format, torch.channels_last):
    for kernel, stride, padding in ((2, 2, 0), (3, 2, 1), (3, 3, 0), (2, 3, 0)):
        for channels, size in ((3, (13, 15)), (16, (12, 16))):
            x = torch.randn(2, channels, *size, device="cuda").to(memory_format=layout)
            x.requires_grad_()
            for kind in ("return_codes", "return_indices"):
                values, where = segkernels.max_pool2d(x, kernel, stride, padding, **{kind: True})
                for shift in (0, 100, -100):
                    wrong = (where.long() + shift).to(where.dtype)
                    out = segkernels.max_unpool2d(
                        values, wrong, kernel, stride, padding, output_size=size
                    )
                    out.sum().backward(retain_graph=True)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.slow
def test_compute_sanitizer_finds_nothing(tmp_path: Path) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(tool, os.X_OK):
        pytest.skip("no compute-sanitizer here")
    script = tmp_path / "sanitized.py"
    script.write_text(SANITIZED)
    command = [tool, "--error-exitcode", "9", sys.executable, str(script)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
