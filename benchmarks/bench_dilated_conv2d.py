"""dilated_conv2d and its gradients against torch: alone, and with the normalisation behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from budget import param
from checks import WrongResultError
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
# Of `auto` every kind, of a single backend one.
CASES = pytest.mark.parametrize(
    ("shape", "backend"),
    [
        param((shape, backend), f"{backend}-{shape.name}", shape.quick and backend == "auto")
        for shape in convs(CUDA)
        for backend in (BACKENDS if CUDA and shape.kind.name == "bfloat16-NHWC" else ("auto",))
    ],
)
# float32 may be tf32
_ACCURACY = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-3}


def tensors(shape: ConvShape, device: torch.device) -> dict[str, torch.Tensor]:
    """Input, weight, and a batch normalisation's scale and shift."""
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


def products(shape: ConvShape) -> dict[str, Any]:
    """The floor: useful FLOPs at the rate of the dtype; torch's convolutions use tf32."""
    dtype = shape.kind.dtype
    if dtype == "float32" and clock.device.type == "cuda":
        dtype = "tf32"
    return {"flops": shape.useful_flops(), "flops_dtype": dtype}


def as_close(ours: torch.Tensor, exact: torch.Tensor, shape: ConvShape) -> str:
    """Holds a picture's worth of `ours` against torch's in float64."""
    off = float((ours.double() - exact).norm() / exact.norm())
    if not off <= _ACCURACY[ours.dtype]:
        raise WrongResultError(f"{shape.name}: off torch in float64 by {off:g}")
    return "torch in float64"


def backward(out: torch.Tensor, leaf: torch.Tensor) -> Callable[[], torch.Tensor]:
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]


def untried() -> Any:
    """cuDNN without trying every algorithm: what is computed once need not be fast."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False)


def tried(call: Callable[[], torch.Tensor]) -> torch.Tensor:
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
        peers.append(replace(bias_and_relu, note="bias and ReLU, without the scale"))
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    with untried():
        exact = F.conv2d(wide[0][:1], *wide[1:])
    if fused:
        scale, shift = t["scale"].double()[:, None, None], t["shift"].double()[:, None, None]
        exact = F.relu(exact * scale + shift)
    measure(
        benchmark,
        f"dilated_conv2d {backend} {'fused ' if fused else ''}{shape.name}",
        call,
        checked=as_close(tried(call)[:1], exact, shape),
        peers=peers,
        **products(shape),
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
    call = backward(tried(lambda: segkernels.dilated_conv2d(*args, backend=backend)), t[of])
    torch.manual_seed(1)
    theirs = F.conv2d(*args)
    run = backward(theirs, t[of])
    peer = eager(run)
    if (
        shape.kind.dtype == "bfloat16"
        and of == "w"
        and device.type == "cpu"
        and shape.channels < 32
    ):
        peers = [Peer(peer.name, peer.where, missing="crashes in oneDNN for so few channels")]
    else:
        peers = [peer, deterministic(run)]
    torch.manual_seed(1)
    grad = torch.randn_like(theirs).double()
    wide = {name: t[name].detach().double() for name in ("x", "w")}
    wide[of].requires_grad_()
    with untried():
        exact = torch.autograd.grad(F.conv2d(wide["x"], wide["w"], *args[2:]), wide[of], grad)[0]
    measure(
        benchmark,
        f"dilated_conv2d backward of {of} {backend} {shape.name}",
        call,
        checked=as_close(call(), exact, shape),
        peers=peers,
        **products(shape),
        source=shape.source,
    )
