"""Benchmarks of the ASPP module in evaluation and in training, against torch's layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from budget import each
from checks import LAYER_TOLERANCE, check_float64
from floors import convolution_flops
from inputs import normal
from measure import measure
from peers import eager, torch_layers
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import AsppShape, aspps
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
SHAPES = each(aspps(clock.device.type == "cuda"))


def make_module(shape: AsppShape, device: torch.device) -> segkernels.ASPP:
    """The module, with random running variances."""
    torch.manual_seed(0)
    form = shape.form
    made = segkernels.ASPP(shape.channels, shape.out_channels, shape.rates, form=form, dropout=0)  # type: ignore[arg-type]
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    made = made.to(device, shape.kind.torch_dtype)
    return made.to(memory_format=shape.kind.memory_format)


def make_input(shape: AsppShape, device: torch.device) -> torch.Tensor:
    """Standard normal values of shape [N, C, H, W]."""
    size = (shape.batch, shape.channels, shape.height, shape.width)
    x = normal(size, device, 1).to(shape.kind.torch_dtype)
    return x.contiguous(memory_format=shape.kind.memory_format)


@SHAPES
def test_aspp(benchmark: BenchmarkFixture, shape: AsppShape, device: torch.device) -> None:
    module, x = make_module(shape, device).eval(), make_input(shape, device)
    torch_module = torch_layers(module)

    def no_grad(layers: segkernels.ASPP) -> Callable[[], torch.Tensor]:
        return torch.no_grad()(lambda: layers(x))

    exact = torch.no_grad()(torch_layers(module).double())(x[:1].double())
    measure(
        benchmark,
        f"ASPP {shape.name}",
        no_grad(module),
        checked=check_float64(no_grad(module)()[:1], exact, LAYER_TOLERANCE, shape.name),
        peers=[eager(no_grad(torch_module))],
        **convolution_flops(shape.useful_flops(), shape.kind.dtype),
        source=shape.source,
    )


@SHAPES
def test_aspp_training(benchmark: BenchmarkFixture, shape: AsppShape, device: torch.device) -> None:
    if shape.kind.dtype != "float32" and device.type == "cpu":
        pytest.skip("on the CPU only float32 training is measured")
    module, x = make_module(shape, device).train(), make_input(shape, device)
    if shape.batch == 1 and shape.form == "v3":
        module.convs[-1][2].eval()  # batch statistics need more than one value per channel
    torch_module, float64_module = torch_layers(module), torch_layers(module).double()

    def gradient(layers: segkernels.ASPP, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        x = x.detach().requires_grad_()
        weights = torch.linspace(-1, 1, shape.out_channels, device=x.device, dtype=x.dtype)
        params = [x, *layers.parameters()]

        def call() -> torch.Tensor:
            out = (layers(x) * weights[:, None, None]).sum()
            return torch.autograd.grad(out, params)[0]

        return call

    exact = gradient(float64_module, x.double())()
    measure(
        benchmark,
        f"ASPP training {shape.name}",
        gradient(module, x),
        checked=check_float64(gradient(module, x)(), exact, LAYER_TOLERANCE, shape.name),
        peers=[eager(gradient(torch_module, x))],
        **convolution_flops(3 * shape.useful_flops(), shape.kind.dtype),
        source=shape.source,
    )
