"""Benchmarks of interpolate, forward and backward, against F.interpolate."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
import upsampling
from budget import each
from measure import measure
from peers import deterministic, eager
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import UPSAMPLE, UpShape, of_kinds
from timing import clock

import segkernels
from segkernels.ops.interpolate import reference

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    each(of_kinds(UPSAMPLE, clock.device.type == "cuda")),
    pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"]),
]


@functools.cache
def checked(shape: UpShape, mode: str, device: torch.device) -> str:
    """Check result and gradient of two channels against the reference."""
    x = upsampling.maps(shape, device).requires_grad_()
    out = segkernels.interpolate(x, shape.high, mode=mode)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    part = x.detach()[:1, :2].double().requires_grad_()
    expected = reference.interpolate(part, shape.high, mode=mode, coordinates=torch.float32)
    (exact,) = torch.autograd.grad(expected, part, grad[:1, :2].double())
    rtol = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}[shape.kind.dtype]
    atol = 1e-5 if rtol < 1e-4 else rtol / 4  # cubic weights have both signs, so terms cancel
    torch.testing.assert_close(out[:1, :2].double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(found[:1, :2].double(), exact, rtol=rtol, atol=1e-3)
    return "the torch reference, 2 channels"


def test_forward(
    benchmark: BenchmarkFixture, shape: UpShape, mode: str, device: torch.device
) -> None:
    case = (shape, mode, device)
    peers = [eager(upsampling.forward(F.interpolate, *case))]
    peers += upsampling.compiled(shape, F.interpolate, lambda f: upsampling.forward(f, *case))
    measure(
        benchmark,
        f"interpolate {mode} {shape.name}",
        upsampling.forward(segkernels.interpolate, *case),
        checked=checked(*case),
        peers=peers,
        moved=upsampling.moved(shape),
        source=shape.source,
    )


def test_backward(
    benchmark: BenchmarkFixture, shape: UpShape, mode: str, device: torch.device
) -> None:
    case = (shape, mode, device)
    peer = upsampling.backward(F.interpolate, *case)
    peers = [eager(peer), deterministic(peer)]
    peers += upsampling.compiled(shape, F.interpolate, lambda f: upsampling.backward(f, *case))
    measure(
        benchmark,
        f"interpolate backward {mode} {shape.name}",
        upsampling.backward(segkernels.interpolate, *case),
        checked=checked(*case),
        peers=peers,
        moved=upsampling.moved(shape),
        source=shape.source,
    )
