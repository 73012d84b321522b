"""Benchmarks of unpool_nearest, unpool_bed_of_nails and their gradients, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import measure
from peers import eager
from pooling import backward, check_equal, check_float64, each_shape, make_input
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import PoolShape
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
SHAPES = each_shape(lambda shape: shape.kernel == 2 and shape.height % 2 == 0)


def pooled(shape: PoolShape, device: torch.device) -> torch.Tensor:
    """The input of an unpooling whose output has `shape`."""
    return segkernels.max_pool2d(make_input(shape, device), 2)


def torch_nails(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(like)
    out[:, :, ::2, ::2] = x
    return out


@SHAPES
def test_unpool_nearest(
    benchmark: BenchmarkFixture, shape: PoolShape, device: torch.device
) -> None:
    x = pooled(shape, device)

    def peer() -> torch.Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")

    measure(
        benchmark,
        f"unpool_nearest {shape.name}",
        lambda: segkernels.unpool_nearest(x, 2),
        checked=check_equal(segkernels.unpool_nearest(x, 2), peer(), shape),
        peers=[eager(peer)],
        moved=5 * x.nbytes,
        source=shape.source,
    )


@SHAPES
def test_unpool_nearest_backward(
    benchmark: BenchmarkFixture, shape: PoolShape, device: torch.device
) -> None:
    x = pooled(shape, device).requires_grad_()
    call = backward(segkernels.unpool_nearest(x, 2), x)
    peer = backward(F.interpolate(x, scale_factor=2, mode="nearest"), x)
    wide = x.detach().double().requires_grad_()
    torch.manual_seed(1)
    grad = torch.randn_like(segkernels.unpool_nearest(x, 2))
    larger = F.interpolate(wide, scale_factor=2, mode="nearest")
    exact = torch.autograd.grad(larger, wide, grad.double())[0]
    measure(
        benchmark,
        f"unpool_nearest backward {shape.name}",
        call,
        checked=check_float64(call(), exact, shape),
        peers=[eager(peer)],
        moved=5 * x.nbytes,
        source=shape.source,
    )


@SHAPES
def test_unpool_bed_of_nails(
    benchmark: BenchmarkFixture, shape: PoolShape, device: torch.device
) -> None:
    x, like = pooled(shape, device), make_input(shape, device)
    measure(
        benchmark,
        f"unpool_bed_of_nails {shape.name}",
        lambda: segkernels.unpool_bed_of_nails(x, 2),
        checked=check_equal(segkernels.unpool_bed_of_nails(x, 2), torch_nails(x, like), shape),
        peers=[eager(lambda: torch_nails(x, like))],
        moved=5 * x.nbytes,
        source=shape.source,
    )


@SHAPES
def test_unpool_bed_of_nails_backward(
    benchmark: BenchmarkFixture, shape: PoolShape, device: torch.device
) -> None:
    x, like = pooled(shape, device).requires_grad_(), make_input(shape, device)
    call = backward(segkernels.unpool_bed_of_nails(x, 2), x)
    peer = backward(torch_nails(x, like), x)
    measure(
        benchmark,
        f"unpool_bed_of_nails backward {shape.name}",
        call,
        checked=check_equal(call(), peer(), shape),
        peers=[eager(peer)],
        moved=2 * x.nbytes,
        source=shape.source,
    )
