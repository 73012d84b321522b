"""Inputs, calls and checks shared by the benchmarks of pooling and unpooling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from budget import each
from checks import WrongResultError
from shapes import POOL, PoolShape, of_kinds
from timing import clock


def each_shape(condition: Callable[[PoolShape], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Parametrise `shape` with the shapes of the run's device that fulfil a condition."""
    return each(filter(condition, of_kinds(POOL, clock.device.type == "cuda")))


def make_input(shape: PoolShape, device: torch.device) -> torch.Tensor:
    """Standard normal values of shape [N, C, H, W]."""
    torch.manual_seed(0)
    size = (shape.batch, shape.channels, shape.height, shape.width)
    x = torch.randn(size, device=device).to(shape.kind.torch_dtype)
    return x.contiguous(memory_format=shape.kind.memory_format)


def window(shape: PoolShape) -> tuple[int, int, int]:
    """kernel_size, stride and padding."""
    return shape.kernel, shape.stride, shape.padding


def backward(out: torch.Tensor, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A call of the backward of `out` to `x`, with a fixed gradient of `out`."""
    torch.manual_seed(1)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


def check_equal(result: torch.Tensor, expected: torch.Tensor, shape: PoolShape) -> str:
    """Check that `result` is equal to torch's.

    Returns:
        what the result was checked against, for the report.
    """
    if not torch.equal(result, expected):
        raise WrongResultError(f"{shape.name}: result differs from torch's")
    return "torch, bit for bit"


def check_float64(result: torch.Tensor, exact: torch.Tensor, shape: PoolShape) -> str:
    """Check `result` against torch's in float64, within the rounding of its dtype.

    Returns:
        what the result was checked against, for the report.
    """
    worst = float((result.double() - exact).abs().max() / exact.abs().max())
    if not worst <= torch.finfo(result.dtype).eps:
        raise WrongResultError(f"{shape.name}: error {worst:g} against torch in float64")
    return "torch in float64"


def exact_pool_gradient(x: torch.Tensor, grad: torch.Tensor, shape: PoolShape) -> torch.Tensor:
    """torch's gradient of max pooling in float64."""
    wide = x.detach().double().requires_grad_()
    return torch.autograd.grad(F.max_pool2d(wide, *window(shape)), wide, grad.double())[0]
