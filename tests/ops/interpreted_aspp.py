"""aspp's Triton path in Triton's interpreter; test_aspp_triton.py runs this.

Triton reads TRITON_INTERPRET when it is imported, so these tests need a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import segkernels
from segkernels.ops.aspp import branches, reference, triton_path
from segkernels.ops.dilated_conv2d import launch
from segkernels.ops.dilated_conv2d import triton_path as triton_of_one

assert os.environ["TRITON_INTERPRET"] == "1"
torch.set_num_threads(1)

# The interpreter cuts bfloat16 off where a GPU rounds.
ACCURACY = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}
DTYPES = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=[] if d == torch.float32 else [pytest.mark.nightly]) for d in ACCURACY],
    ids=str,
)


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    assert ours.shape == exact.shape
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many branches each launch took; fails where torch convolves instead."""
    found: list[int] = []
    side_by_side, summed = triton_of_one.branches, triton_path.summed

    def note(run: Any) -> Any:
        def noted(x: torch.Tensor, weights: Sequence[torch.Tensor], *args: Any, **kw: Any) -> Any:
            found.append(len(weights))
            return run(x, weights, *args, **kw)

        return noted

    def never(*args: Any) -> Any:
        raise AssertionError("a branch was convolved alone")

    monkeypatch.setattr(triton_of_one, "branches", note(side_by_side))
    monkeypatch.setattr(triton_path, "summed", note(summed))
    monkeypatch.setattr(branches.backends, "forward", never)
    return found


def made(
    dtype: torch.dtype, channels: int, out_channels: int, kernels: Sequence[int], size: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    weights = [torch.randn(out_channels, channels, k, k).to(dtype) for k in kernels]
    return torch.randn(2, channels, *size).to(dtype), weights


@DTYPES
@pytest.mark.parametrize(
    ("channels", "channels_last"), [(16, True), (21, False)], ids=["descriptors", "pointers, NCHW"]
)
def test_side_by_side(
    channels_last: bool, channels: int, dtype: torch.dtype, launches: list[int]
) -> None:
    x, weights = made(dtype, channels, 24, (1, 3, 3, 3), (7, 9))
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    wide = dtype if dtype == torch.float32 else torch.float32
    kwargs = {
        "scale": torch.rand(96, dtype=wide) + 0.5,
        "shift": torch.randn(96, dtype=wide),
        "pooled": torch.randn(2, 5, 1, 1).to(dtype),
        "activation": "relu",
    }
    rates = (1, 2, 4, 12)
    ours = segkernels.aspp(x, weights, rates, **kwargs, backend="triton")
    assert launches == [1, 3]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert ours.is_contiguous(memory_format=layout)
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    exact = reference.aspp(x.double(), [w.double() for w in weights], rates, **doubled)
    assert distance(ours, exact) <= ACCURACY[dtype]


@DTYPES
@pytest.mark.parametrize(
    ("channels", "out_channels"), [(48, 21), (21, 70)], ids=["descriptors", "pointers"]
)
def test_summed(out_channels: int, channels: int, dtype: torch.dtype, launches: list[int]) -> None:
    x, weights = made(dtype, channels, out_channels, (3, 3, 3, 3), (9, 8))
    shift, rates = torch.randn(out_channels).to(dtype), (1, 3, 6, 30)
    ours = segkernels.aspp(
        x, weights, rates, shift=shift, activation="relu", form="v2", backend="triton"
    )
    assert launches == [4]
    exact = reference.aspp(
        x.double(),
        [w.double() for w in weights],
        rates,
        shift=shift.double(),
        activation="relu",
        form="v2",
    )
    assert distance(ours, exact) <= ACCURACY[dtype]


def test_summed_in_parts(monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    """One small picture: every branch's loop is cut too."""
    x, weights = made(torch.float32, 512, 21, (3, 3), (4, 4))
    seen = []
    cuts = triton_path.cuts
    monkeypatch.setattr(triton_path, "cuts", lambda *args: seen.append(cuts(*args)) or seen[-1])
    monkeypatch.setattr(launch, "_MULTIPROCESSORS_INTERPRETED", 24)
    ours = segkernels.aspp(x, weights, (1, 2), form="v2", backend="triton")
    assert seen[0] > 1
    exact = reference.aspp(x.double(), [w.double() for w in weights], (1, 2), form="v2")
    assert distance(ours, exact) <= 2e-6


def test_empty_batch(launches: list[int]) -> None:
    x, weights = made(torch.float32, 16, 24, (3, 3), (5, 5))
    for form, channels in (("v3", 48), ("v2", 24)):
        out = segkernels.aspp(x[:0], weights, (1, 2), form=form, backend="triton")
        assert out.shape == (0, channels, 5, 5)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x, weights = made(torch.float32, 8, 8, (3, 3), (5, 6))
    found = []
    for backend in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        out = segkernels.aspp(leaves[0], leaves[1:], (1, 4), activation="relu", backend=backend)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert distance(ours, theirs) <= 1e-6
