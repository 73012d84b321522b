"""interpolate, forward and backward, against F.interpolate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import upsampling
from measure import measure
from pytest_benchmark.fixture import BenchmarkFixture
from timing import clock
from upsampling import DTYPES, LAYOUTS, UPSAMPLE, UpShape

import segkernels
from segkernels.ops.interpolate import reference

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    pytest.mark.parametrize("shape", [pytest.param(s, id=s.name) for s in UPSAMPLE]),
    pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"]),
    pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"]),
    pytest.mark.parametrize("layout", LAYOUTS),
]


def checked(
    shape: UpShape, mode: str, dtype: torch.dtype, layout: str, device: torch.device
) -> str:
    """Holds result and gradient of a few channels against the reference."""
    x = upsampling.maps(shape, dtype, layout, device).requires_grad_()
    out = segkernels.interpolate(x, shape.high, mode=mode)
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, x, grad)
    part = x.detach()[:1, :2].double().requires_grad_()
    expected = reference.interpolate(part, shape.high, mode=mode, coordinates=torch.float32)
    (theirs,) = torch.autograd.grad(expected, part, grad[:1, :2].double())
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out[:1, :2].double(), expected, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(ours[:1, :2].double(), theirs, rtol=rtol, atol=1e-3)
    return "the reference, 2 channels"


def test_forward(
    benchmark: BenchmarkFixture,
    shape: UpShape,
    mode: str,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> None:
    case = (shape, mode, dtype, layout, device)
    measure(
        benchmark,
        f"interpolate {mode} {shape.name} {str(dtype)[6:]} {layout}",
        upsampling.forward(segkernels.interpolate, *case),
        checked=checked(*case),
        peers=[upsampling.eager(upsampling.forward(F.interpolate, *case))],
        moved=upsampling.moved(shape, dtype, device),
        source=shape.source,
    )


def test_backward(
    benchmark: BenchmarkFixture,
    shape: UpShape,
    mode: str,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> None:
    case = (shape, mode, dtype, layout, device)
    measure(
        benchmark,
        f"interpolate backward {mode} {shape.name} {str(dtype)[6:]} {layout}",
        upsampling.backward(segkernels.interpolate, *case),
        checked=checked(*case),
        peers=[upsampling.eager(upsampling.backward(F.interpolate, *case))],
        moved=upsampling.moved(shape, dtype, device),
        source=shape.source,
    )
