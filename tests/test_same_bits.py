"""Bitwise determinism: a hundred runs on one device give equal bits, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import segkernels

Call = tuple[Callable[..., torch.Tensor], list[torch.Tensor]]
RUNS = 100


def dense_crf() -> Call:
    img, logits = 255 * torch.rand(2, 3, 61, 83), torch.randn(2, 21, 61, 83)
    return lambda i, s: segkernels.dense_crf(i, logits=s, iterations=3), [img, logits]


def cross_entropy() -> Call:
    target = torch.randint(0, 21, (2, 65, 97), device="cuda")
    return lambda x: segkernels.upsample_cross_entropy(x, target), [torch.randn(2, 21, 17, 25)]


def binary_cross_entropy() -> Call:
    target = torch.rand(2, 1, 65, 97, device="cuda")
    low = torch.randn(2, 1, 17, 25)
    return lambda x: segkernels.upsample_binary_cross_entropy(x, target), [low]


def bicubic() -> Call:
    return lambda x: segkernels.interpolate(x, (65, 97), mode="bicubic"), [
        torch.randn(2, 21, 9, 13)
    ]


def pooling() -> Call:
    def trip(x: torch.Tensor) -> torch.Tensor:
        values, indices = segkernels.max_pool2d(x, 3, 2, 1, return_indices=True)
        return segkernels.max_unpool2d(values, indices, 3, 2, 1, output_size=x.shape[-2:])

    return trip, [torch.randn(2, 16, 33, 48)]


def backend() -> str:
    """Our own kernel where the GPU has one, else the default."""
    return "sm90" if torch.cuda.get_device_capability() == (9, 0) else "auto"


def convolution() -> Call:
    x, weight = (
        torch.randn(8, 256, 41, 41).bfloat16(),
        (torch.randn(256, 256, 3, 3) / 48).bfloat16(),
    )
    inputs = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]
    kept: dict[str, Any] = {"padding": 12, "dilation": 12, "backend": backend()}
    return lambda a, b: segkernels.dilated_conv2d(a, b, **kept), inputs


def branches() -> Call:
    x = torch.randn(8, 256, 33, 33).bfloat16().contiguous(memory_format=torch.channels_last)
    weights = [(torch.randn(256, 256, k, k) / (16 * k)).bfloat16() for k in (1, 3, 3)]
    rates = (1, 12, 24)
    return lambda a, *w: segkernels.aspp(a, list(w), rates, backend=backend()), [x, *weights]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make",
    [dense_crf, cross_entropy, binary_cross_entropy, bicubic, pooling, convolution, branches],
)
def test_hundred_runs_give_the_same_bits(make: Callable[[], Call]) -> None:
    function, inputs = make()
    leaves = [t.cuda().requires_grad_() for t in inputs]
    weight = None

    def run() -> list[torch.Tensor]:
        nonlocal weight
        out = function(*leaves)
        weight = torch.randn_like(out) if weight is None else weight
        return [out, *torch.autograd.grad((out * weight).sum(), leaves)]

    first = run()
    assert all(t.isfinite().all() for t in first)
    for _ in range(RUNS - 1):
        # Shift the allocations: old memory contents must not matter.
        held = torch.full((1 << 20,), float("nan"), device="cuda")
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)
        del held
