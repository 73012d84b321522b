"""Benchmarks of upsample_cross_entropy, forward and backward, against interpolation and loss."""

from __future__ import annotations

import functools

import pytest
import torch
import upsampling
from budget import each
from measure import measure
from memory import peak_bytes
from peers import deterministic, eager
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import TAIL, UpShape, of_kinds
from timing import clock

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    each(of_kinds(TAIL, clock.device.type == "cuda")),
]


def checked(shape: UpShape, device: torch.device) -> str:
    """Check the gradient against torch's in float32."""
    ours = upsampling.ours_train(shape, device)()
    x = upsampling.maps(shape, device).float().requires_grad_()
    target = upsampling.labels(shape, device)
    (expected,) = torch.autograd.grad(upsampling.torch_loss(x, target), x)
    scale = expected.abs().max().item()
    rtol = {"float32": 1e-4, "float16": 2**-9, "bfloat16": 2**-7}[shape.kind.dtype]
    # In float16, gradients of a mean over many pixels are subnormal.
    atol = 1e-4 * scale + (2**-24 if shape.kind.dtype == "float16" else 0)
    torch.testing.assert_close(ours.float(), expected, rtol=rtol, atol=atol)
    return "gradient of F.interpolate and F.cross_entropy in float32"


def test_upsample_cross_entropy(
    benchmark: BenchmarkFixture, shape: UpShape, device: torch.device
) -> None:
    case = (shape, device)
    x, target = upsampling.maps(*case), upsampling.labels(*case)
    peer = upsampling.torch_train(*case)
    peak = functools.partial(peak_bytes, device=device)
    measure(
        benchmark,
        f"upsample_cross_entropy forward + backward {shape.name}",
        upsampling.ours_train(*case),
        checked=checked(*case),
        peers=[
            eager(peer, functools.partial(peak, upsampling.torch_train, *case)),
            deterministic(peer),
            *upsampling.compiled(
                shape, upsampling.torch_loss, lambda f: upsampling.train(f, *case)
            ),
        ],
        # Forward and backward read logits and labels and write and read the saved values; then the
        # gradient is written.
        moved=3 * x.nbytes + target.numel() * (2 * 8 + 2 * 4),
        peak=functools.partial(peak, upsampling.ours_train, *case),
        source=shape.source,
    )
