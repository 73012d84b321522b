"""Benchmarks of dilated_conv2d, with and without scale, shift and ReLU, and of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import param
from checks import CONV_TOLERANCE, check_float64
from floors import convolution_flops
from inputs import normal
from measure import measure
from peers import Peer, cudnn_relu, deterministic, eager
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import ConvShape, convs
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
BACKENDS = ("auto", "sm90")
CUDA = clock.device.type == "cuda"
# "auto" is measured for every kind, "sm90" for one.
CASES = pytest.mark.parametrize(
    ("shape", "backend"),
    [
        param((shape, backend), f"{backend}-{shape.name}", shape.quick and backend == "auto")
        for shape in convs(CUDA)
        for backend in (BACKENDS if CUDA and shape.kind.name == "bfloat16-NHWC" else ("auto",))
    ],
)


def tensors(shape: ConvShape, device: torch.device) -> dict[str, torch.Tensor]:
    """Input "x", weight "w", and "scale" and "shift" of a folded batch normalisation."""
    fan = shape.channels * shape.kernel**2
    window = (shape.out_channels, shape.channels, shape.kernel, shape.kernel)
    made = {
        "x": normal((shape.batch, shape.channels, shape.height, shape.width), device, 0),
        "w": normal(window, device, 1) / fan**0.5,
        "scale": normal([shape.out_channels], device, 2).abs() + 0.5,
        "shift": normal([shape.out_channels], device, 3),
    }
    layout = {"memory_format": shape.kind.memory_format}
    return {
        name: t.to(shape.kind.torch_dtype, **layout if t.dim() == 4 else {})
        for name, t in made.items()
    }


def backward(out: torch.Tensor, leaf: torch.Tensor) -> Callable[[], torch.Tensor]:
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]


def no_cudnn_benchmark() -> Any:
    """Context without cuDNN's algorithm search, for results that are computed only once."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False)


def run_or_skip(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Return the result of `call`; skip the test where the backend does not support it."""
    try:
        return call()
    except ValueError as error:
        pytest.skip(str(error))


@CASES
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "scaled-relu"])
def test_dilated_conv2d(
    benchmark: BenchmarkFixture,
    shape: ConvShape,
    backend: str,
    fused: bool,
    device: torch.device,
) -> None:
    t = tensors(shape, device)
    args = (t["x"], t["w"], None, 1, shape.padding, shape.dilation)
    extra = {"scale": t["scale"], "shift": t["shift"], "activation": "relu"} if fused else {}
    mean, var = torch.zeros_like(t["scale"]), torch.ones_like(t["scale"])

    def call() -> torch.Tensor:
        return segkernels.dilated_conv2d(*args, **extra, backend=backend)

    def peer() -> torch.Tensor:
        out = F.conv2d(*args)
        if fused:
            out = F.relu(F.batch_norm(out, mean, var, t["scale"], t["shift"], eps=0.0))
        return out

    peers = [eager(peer)]
    if fused:
        sizes = ((1, 1), (shape.padding,) * 2, (shape.dilation,) * 2)
        bias_and_relu = cudnn_relu(t["x"], t["w"], t["shift"], *sizes)
        peers.append(replace(bias_and_relu, note="bias and ReLU, no scale"))
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    with no_cudnn_benchmark():
        exact = F.conv2d(wide[0][:1], *wide[1:])
    if fused:
        scale, shift = t["scale"].double()[:, None, None], t["shift"].double()[:, None, None]
        exact = F.relu(exact * scale + shift)
    measure(
        benchmark,
        f"dilated_conv2d {backend} {'fused ' if fused else ''}{shape.name}",
        call,
        checked=check_float64(run_or_skip(call)[:1], exact, CONV_TOLERANCE, shape.name),
        peers=peers,
        **convolution_flops(shape.useful_flops(), shape.kind.dtype),
        source=shape.source,
    )


@CASES
@pytest.mark.parametrize("of", ["x", "w"], ids=["input-gradient", "weight-gradient"])
def test_dilated_conv2d_backward(
    benchmark: BenchmarkFixture,
    shape: ConvShape,
    backend: str,
    of: str,
    device: torch.device,
) -> None:
    t = tensors(shape, device)
    t[of].requires_grad_()
    args = (t["x"], t["w"], None, 1, shape.padding, shape.dilation)
    torch.manual_seed(1)
    call = backward(run_or_skip(lambda: segkernels.dilated_conv2d(*args, backend=backend)), t[of])
    torch.manual_seed(1)
    out = F.conv2d(*args)
    run = backward(out, t[of])
    peer = eager(run)
    if (
        shape.kind.dtype == "bfloat16"
        and of == "w"
        and device.type == "cpu"
        and shape.channels < 32
    ):
        peers = [Peer(peer.name, peer.where, missing="oneDNN crashes for fewer than 32 channels")]
    else:
        peers = [peer, deterministic(run)]
    torch.manual_seed(1)
    grad = torch.randn_like(out).double()
    wide = {name: t[name].detach().double() for name in ("x", "w")}
    wide[of].requires_grad_()
    with no_cudnn_benchmark():
        exact = torch.autograd.grad(F.conv2d(wide["x"], wide["w"], *args[2:]), wide[of], grad)[0]
    measure(
        benchmark,
        f"dilated_conv2d backward of {of} {backend} {shape.name}",
        call,
        checked=check_float64(call(), exact, CONV_TOLERANCE, shape.name),
        peers=peers,
        **convolution_flops(shape.useful_flops(), shape.kind.dtype),
        source=shape.source,
    )
