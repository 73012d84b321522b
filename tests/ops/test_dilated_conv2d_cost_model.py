"""The rule of backend="auto" on CUDA: torch or the Hopper kernel."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from segkernels import _native
from segkernels.ops.dilated_conv2d import hopper
from segkernels.ops.dilated_conv2d.call import Problem

KINDS = ("forward", "input_gradient", "weight_gradient")
CUDA = torch.device("cuda", 0)
Sizes = dict[str, Any]


def same(size: int, dilation: int, kernel: int = 3) -> Sizes:
    """Fields of a Problem with "same" padding."""
    pad = dilation * (kernel - 1) // 2
    return {
        "in_size": (size, size),
        "out_size": (size, size),
        "kernel": (kernel, kernel),
        "padding": (pad, pad),
        "dilation": (dilation, dilation),
    }


def problem(
    batch: int,
    channels: int,
    out_channels: int,
    sizes: Sizes,
    dtype: torch.dtype = torch.bfloat16,
) -> Problem:
    return Problem(
        batch, channels, out_channels, stride=(1, 1), groups=1, dtype=dtype, device=CUDA, **sizes
    )


def chooses_hopper(kind: str, *problems: Problem) -> bool:
    return hopper.chosen(kind, "auto", *problems)


@pytest.fixture(autouse=True)
def mocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU (compute capability 9.0)."""

    class Module:
        has_sm90a = True

    monkeypatch.setattr(_native, "C", Module)
    monkeypatch.setattr(hopper, "_capability", lambda index: (9, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_chooses_hopper_from_some_rate_on(kind: str, dtype: torch.dtype) -> None:
    """The larger the rate, the more products cuDNN computes with padding."""
    chosen = [
        chooses_hopper(kind, problem(8, 2048, 256, same(65, rate), dtype)) for rate in range(1, 64)
    ]
    if (kind, dtype) == ("weight_gradient", torch.float32):
        assert not any(chosen)
        return
    first = chosen.index(True)
    assert first > 0
    assert all(chosen[first:])


# Batch, channels, out channels, size, rate; the Hopper kernel's speed relative to cuDNN's, measured
# by benchmarks/cuda_grid.py on an H200: forward, input gradient, weight gradient.
MEASURED = [
    (8, 2048, 256, 65, 6, 1.02, 0.78, 0.96),
    (8, 2048, 256, 65, 10, 2.03, 0.82, 2.00),
    (8, 2048, 256, 65, 12, 2.03, 1.54, 2.03),
    (8, 512, 512, 65, 4, 0.86, 0.77, 1.02),
    (8, 512, 512, 65, 12, 1.87, 1.62, 1.73),
    (8, 256, 256, 65, 12, 1.46, 0.91, 1.93),
    (8, 512, 1024, 41, 12, 1.85, 1.55, 2.52),
    (8, 2048, 256, 33, 18, 3.21, 1.38, 3.10),
    (1, 2048, 256, 65, 12, 2.31, 0.92, 1.75),
    (8, 2048, 21, 65, 24, 1.49, 0.72, 1.31),
    (4, 1280, 256, 33, 12, 2.30, 0.88, 2.11),
    (8, 21, 21, 64, 8, 0.90, 0.67, 0.94),
]


@pytest.mark.parametrize("measured", MEASURED, ids=str)
def test_auto_chooses_the_faster_backend(measured: Any) -> None:
    *sizes, size, rate = measured[:5]
    for kind, ratio in zip(KINDS, measured[5:], strict=True):
        if not 0.95 <= ratio <= 1.1:
            assert chooses_hopper(kind, problem(*sizes, same(size, rate))) == (ratio > 1), kind


def test_auto_sums_the_branches_of_a_launch() -> None:
    near, *far = [problem(8, 2048, 256, same(33, rate)) for rate in (6, 12, 18)]
    assert not chooses_hopper("forward", near)
    assert chooses_hopper("forward", near, *far)
    assert not chooses_hopper("forward", near, *far, near._replace(channels=21))
    assert not chooses_hopper("forward")


CHANGES: list[Sizes] = [
    {"dtype": torch.float64},
    {"out_channels": 8},
    {"channels": 2044},
    {"channels": 32},
    {"batch": 1, **same(9, 4)},
    {"stride": (2, 2)},
    {"groups": 2},
    {"device": torch.device("cpu")},
    same(65, 1),
    same(65, 24, kernel=1),
    same(65, 24, kernel=9),
]
# Only the channels that are summed over must be many.
MAY_BE_NARROW = {("forward", "out_channels"), ("input_gradient", "channels")}


@pytest.mark.parametrize(
    ("kind", "change"),
    [(k, c) for k in KINDS for c in CHANGES if (k, next(iter(c))) not in MAY_BE_NARROW],
    ids=str,
)
def test_auto_chooses_torch_for_other_problems(kind: str, change: Sizes) -> None:
    good = problem(8, 2048, 256, same(65, 24))
    assert chooses_hopper(kind, good)
    assert not chooses_hopper(kind, good._replace(**change))


def test_auto_chooses_torch_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_capability", lambda index: (8, 0))
    assert not chooses_hopper("forward", problem(8, 2048, 256, same(65, 24)))


def test_useful_share_counts_the_products_inside_the_image() -> None:
    rng = random.Random(0)

    def two(low: int, high: int) -> tuple[int, int]:
        return rng.randint(low, high), rng.randint(low, high)

    for _ in range(200):
        sizes = {
            "in_size": two(1, 20),
            "out_size": two(1, 20),
            "kernel": two(1, 5),
            "padding": two(-3, 30),
            "dilation": two(1, 12),
        }
        p = problem(1, 1, 1, sizes)
        inside = [0, 0]
        for axis in (0, 1):
            for out, tap in itertools.product(range(p.out_size[axis]), range(p.kernel[axis])):
                read = out + tap * p.dilation[axis] - p.padding[axis]
                inside[axis] += 0 <= read < p.in_size[axis]
        share = inside[0] * inside[1] / (p.out_size[0] * p.out_size[1] * p.taps)
        assert p.useful_share() == pytest.approx(share, abs=1e-12)
