"""The ASPP module against torch's layers, in evaluation and in training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from budget import each
from checks import WrongResultError
from inputs import normal
from measure import measure
from peers import eager
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import AsppShape, aspps
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
SHAPES = each(aspps(clock.device.type == "cuda"))
# float32 may be tf32
_ACCURACY = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}


def built(shape: AsppShape, device: torch.device) -> segkernels.ASPP:
    """The module, with statistics that are not the trivial ones."""
    torch.manual_seed(0)
    form = shape.form
    made = segkernels.ASPP(shape.channels, shape.out_channels, shape.rates, form=form, dropout=0)  # type: ignore[arg-type]
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    made = made.to(device, shape.kind.torch_dtype)
    return made.to(memory_format=shape.kind.memory_format)


def maps(shape: AsppShape, device: torch.device) -> torch.Tensor:
    """Standard normal values."""
    size = (shape.batch, shape.channels, shape.height, shape.width)
    x = normal(size, device, 1).to(shape.kind.torch_dtype)
    return x.contiguous(memory_format=shape.kind.memory_format)


def plain(module: segkernels.ASPP) -> segkernels.ASPP:
    """The same from torch's layers."""
    other = copy.deepcopy(module)
    other.backend = "torch"
    return other


def products(shape: AsppShape, times: int = 1) -> dict[str, Any]:
    """The floor: useful FLOPs at the rate of the dtype; torch's convolutions use tf32."""
    dtype = shape.kind.dtype
    if dtype == "float32" and clock.device.type == "cuda":
        dtype = "tf32"
    return {"flops": times * shape.useful_flops(), "flops_dtype": dtype}


def as_close(ours: torch.Tensor, exact: torch.Tensor, shape: AsppShape) -> str:
    """Holds `ours` against torch's layers in float64."""
    off = float((ours.double() - exact).norm() / exact.norm())
    if not off <= _ACCURACY[ours.dtype]:
        raise WrongResultError(f"{shape.name}: off torch in float64 by {off:g}")
    return "torch in float64"


@SHAPES
def test_aspp(benchmark: BenchmarkFixture, shape: AsppShape, device: torch.device) -> None:
    module, x = built(shape, device).eval(), maps(shape, device)
    theirs = plain(module)

    def no_grad(layers: segkernels.ASPP) -> Callable[[], torch.Tensor]:
        return torch.no_grad()(lambda: layers(x))

    exact = torch.no_grad()(plain(module).double())(x[:1].double())
    measure(
        benchmark,
        f"ASPP {shape.name}",
        no_grad(module),
        checked=as_close(no_grad(module)()[:1], exact, shape),
        peers=[eager(no_grad(theirs))],
        **products(shape),
        source=shape.source,
    )


@SHAPES
def test_aspp_training(benchmark: BenchmarkFixture, shape: AsppShape, device: torch.device) -> None:
    if shape.kind.dtype != "float32" and device.type == "cpu":
        pytest.skip("on a CPU one trains in float32")
    module, x = built(shape, device).train(), maps(shape, device)
    if shape.batch == 1 and shape.form == "v3":
        module.convs[-1][2].eval()  # one value a channel has no statistics
    theirs, exactly = plain(module), plain(module).double()

    def gradient(layers: segkernels.ASPP, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x = x.detach().requires_grad_()
        weights = torch.linspace(-1, 1, shape.out_channels, device=x.device, dtype=x.dtype)
        params = [x, *layers.parameters()]

        def call() -> torch.Tensor:
            out = (layers(x) * weights[:, None, None]).sum()
            return torch.autograd.grad(out, params)[0]

        return call

    exact = gradient(exactly, x.double())()
    measure(
        benchmark,
        f"ASPP training {shape.name}",
        gradient(module, x),
        checked=as_close(gradient(module, x)(), exact, shape),
        peers=[eager(gradient(theirs, x))],
        **products(shape, 3),
        source=shape.source,
    )
