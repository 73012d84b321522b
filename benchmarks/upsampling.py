"""Inputs and calls of interpolate and the operators on upsampled logits, and torch equivalents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from inputs import normal
from peers import Peer, inductor
from shapes import UPSAMPLE, UpShape
from timing import Call, clock

import segkernels


def maps(shape: UpShape, device: torch.device) -> torch.Tensor:
    """Random logits [N, C, h, w]."""
    x = normal((shape.batch, shape.channels, *shape.low), device)
    x = x.to(shape.kind.torch_dtype)
    return x.contiguous(memory_format=shape.kind.memory_format)


def labels(shape: UpShape, device: torch.device) -> torch.Tensor:
    """Random labels [N, H, W], of which a tenth is ignored."""
    generator = torch.Generator(device).manual_seed(1)
    on = {"generator": generator, "device": device}
    found = torch.randint(shape.channels, (shape.batch, *shape.high), **on)
    found[torch.rand(found.shape, **on) < 0.1] = -100
    return found


def forward(function: Callable[..., Any], shape: UpShape, mode: str, device: torch.device) -> Call:
    """A call of `function`, interpolate from segkernels or torch."""
    x = maps(shape, device)
    return lambda: function(x, shape.high, mode=mode)


def backward(function: Callable[..., Any], shape: UpShape, mode: str, device: torch.device) -> Call:
    """A call of the backward of `function`, without its forward."""
    x = maps(shape, device).requires_grad_()
    out = function(x, shape.high, mode=mode)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


def moved(shape: UpShape) -> int:
    """Bytes to read the input once and write the output once."""
    pixels = shape.low[0] * shape.low[1] + shape.high[0] * shape.high[1]
    return shape.batch * shape.channels * pixels * torch.finfo(shape.kind.torch_dtype).bits // 8


def compiled(
    shape: UpShape, function: Callable[..., Any], prepare: Callable[[Callable[..., Any]], Call]
) -> list[Peer]:
    """torch.compile as a peer, only for one shape, because compilation takes seconds per case."""
    if (shape.low, shape.kind.name) != (UPSAMPLE[0].low, "bfloat16-NHWC") or (
        shape.batch == 1 and clock.device.type == "cuda"
    ):
        return []
    return [inductor(function, prepare)]


def torch_loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """torch's equivalent of `upsample_cross_entropy`."""
    return F.cross_entropy(F.interpolate(x, target.shape[-2:], mode="bilinear"), target)


def torch_argmax(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """torch's equivalent of `upsample_argmax`."""
    return F.interpolate(x, size, mode="bilinear").argmax(1)


def train(function: Callable[..., Any], shape: UpShape, device: torch.device) -> Call:
    """A call of a loss, forward and backward."""
    x = maps(shape, device).requires_grad_()
    target = labels(shape, device)
    return lambda: torch.autograd.grad(function(x, target), x)[0]


def predict(function: Callable[..., Any], shape: UpShape, device: torch.device) -> Call:
    """A call that computes a label map."""
    x = maps(shape, device)
    return lambda: function(x, shape.high)


# Module-level functions, which another process imports to measure memory.
def ours_train(shape: UpShape, device: torch.device) -> Call:
    """`train` with segkernels."""
    return train(segkernels.upsample_cross_entropy, shape, device)


def torch_train(shape: UpShape, device: torch.device) -> Call:
    """`train` with torch."""
    return train(torch_loss, shape, device)


def ours_predict(shape: UpShape, device: torch.device) -> Call:
    """`predict` with segkernels."""
    return predict(segkernels.upsample_argmax, shape, device)


def torch_predict(shape: UpShape, device: torch.device) -> Call:
    """`predict` with torch."""
    return predict(torch_argmax, shape, device)
