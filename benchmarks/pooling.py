"""What the benchmarks of pooling and unpooling share: inputs, checks, and the torch peer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from budget import each
from checks import WrongResultError
from shapes import POOL, PoolShape, of_kinds
from timing import clock


def each_shape(shapes: Callable[[PoolShape], bool] = lambda _: True) -> pytest.MarkDecorator:
    """Parametrises over the shapes of the run's device."""
    return each(filter(shapes, of_kinds(POOL, clock.device.type == "cuda")))


def plane(shape: PoolShape, device: torch.device) -> torch.Tensor:
    """Standard normal values."""
    torch.manual_seed(0)
    size = (shape.batch, shape.channels, shape.height, shape.width)
    x = torch.randn(size, device=device).to(shape.kind.torch_dtype)
    return x.contiguous(memory_format=shape.kind.memory_format)


def window(shape: PoolShape) -> tuple[int, int, int]:
    """kernel_size, stride and padding."""
    return shape.kernel, shape.stride, shape.padding


def backward(out: torch.Tensor, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The gradient of `x` for a fixed one of `out`, as a call."""
    torch.manual_seed(1)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


def same(ours: torch.Tensor, theirs: torch.Tensor, shape: PoolShape) -> str:
    """Holds `ours` against torch's, bit for bit.

    Returns:
        What it was held against, for the report.
    """
    if not torch.equal(ours, theirs):
        raise WrongResultError(f"{shape.name}: not torch's values")
    return "torch, bit for bit"


def as_close(ours: torch.Tensor, exact: torch.Tensor, shape: PoolShape) -> str:
    """Holds `ours` against torch's in float64, within its dtype's rounding.

    Returns:
        What it was held against, for the report.
    """
    worst = float((ours.double() - exact).abs().max() / exact.abs().max())
    if not worst <= torch.finfo(ours.dtype).eps:
        raise WrongResultError(f"{shape.name}: off torch in float64 by {worst:g}")
    return "torch in float64"


def exact_pool_gradient(x: torch.Tensor, grad: torch.Tensor, shape: PoolShape) -> torch.Tensor:
    """The pooling's gradient by torch in float64."""
    wide = x.detach().double().requires_grad_()
    return torch.autograd.grad(F.max_pool2d(wide, *window(shape)), wide, grad.double())[0]
