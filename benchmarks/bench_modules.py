"""Benchmarks of ConvBNAct and ContextModule in evaluation, against torch's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import each
from checks import LAYER_TOLERANCE, check_float64
from floors import convolution_flops
from inputs import normal
from measure import measure
from peers import Peer, eager, torch_layers
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import CONTEXT, ContextShape, ConvShape, Kind, convs, of_kinds
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
CUDA = clock.device.type == "cuda"
_BAND = 32  # rows


def to_kind(value: Any, kind: Kind, device: torch.device) -> Any:
    """Convert a module or tensor to the dtype and layout of `kind`."""
    return value.to(device, kind.torch_dtype).to(memory_format=kind.memory_format)


def no_grad(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], Any]:
    return torch.no_grad()(lambda: run(x))


@each(convs(CUDA))
def test_conv_bn_act(benchmark: BenchmarkFixture, shape: ConvShape, device: torch.device) -> None:
    torch.manual_seed(0)
    sizes = (shape.channels, shape.out_channels, shape.kernel)
    module = segkernels.ConvBNAct(*sizes, dilation=shape.dilation).eval()
    assert module.bn is not None
    torch.nn.init.uniform_(module.bn.running_var, 0.5, 2)
    x = normal((shape.batch, shape.channels, shape.height, shape.width), device)
    module, x = to_kind(module, shape.kind, device), to_kind(x, shape.kind, device)
    exact = no_grad(torch_layers(module).double(), x[:1].double())()
    measure(
        benchmark,
        f"ConvBNAct {shape.name}",
        no_grad(module, x),
        checked=check_float64(no_grad(module, x)()[:1], exact, LAYER_TOLERANCE, shape.name),
        peers=[eager(no_grad(torch_layers(module), x))],
        **convolution_flops(shape.useful_flops(), shape.kind.dtype),
        source=shape.source,
    )


@each(of_kinds(CONTEXT, CUDA))
def test_context_module(
    benchmark: BenchmarkFixture, shape: ContextShape, device: torch.device
) -> None:
    torch.manual_seed(0)
    module = segkernels.ContextModule(shape.classes).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(shape.batch, shape.classes, shape.height, shape.width)
    module, x = to_kind(module, shape.kind, device), to_kind(x, shape.kind, device)
    exact = no_grad(torch_layers(module).double(), x.double())()
    banded = no_grad(lambda x: in_bands(module, x), x)
    check_float64(banded(), exact, LAYER_TOLERANCE, f"{shape.name} in bands")
    measure(
        benchmark,
        f"ContextModule {shape.name}",
        no_grad(module, x),
        checked=check_float64(no_grad(module, x)(), exact, LAYER_TOLERANCE, shape.name),
        peers=[
            eager(no_grad(torch_layers(module), x)),
            Peer(f"{_BAND} rows at a time", str(device), banded, on_device=True),
        ],
        source=shape.source,
    )


def in_bands(module: segkernels.ContextModule, x: torch.Tensor) -> torch.Tensor:
    """Run the module's layers on one band of rows at a time, so that the maps stay in the cache.

    Each band recomputes its halo: 33 rows on each side at the input, fewer after each layer.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out, height = torch.empty_like(x), x.size(2)
    *dilated, last = module.convs
    for top in range(0, height, _BAND):
        bottom = min(top + _BAND, height)
        halo = sum(module.DILATIONS)
        start = max(top - halo, 0)
        band = x[:, :, start : min(bottom + halo, height)]
        for conv, reach in zip(dilated, module.DILATIONS, strict=True):
            halo -= reach
            first, end = max(top - halo, 0), min(bottom + halo, height)
            given = band[:, :, max(first - reach, 0) - start : min(end + reach, height) - start]
            zeros = (0, 0, max(reach - first, 0), max(end + reach - height, 0))
            padded = F.pad(given, zeros) if any(zeros) else given
            band = F.conv2d(padded, conv.weight, conv.bias, 1, (0, reach), reach).relu_()  # type: ignore[arg-type]
            start = first
        out[:, :, top:bottom] = last(band)
    return out
