"""Benchmarks of max_pool2d with codes and with indices, and of its gradient, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import measure
from peers import deterministic, eager
from pooling import (
    backward,
    check_equal,
    check_float64,
    each_shape,
    exact_pool_gradient,
    make_input,
    window,
)
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import PoolShape
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)


@each_shape()
@pytest.mark.parametrize("kind", ["return_codes", "return_indices"])
def test_max_pool2d(
    benchmark: BenchmarkFixture, shape: PoolShape, kind: str, device: torch.device
) -> None:
    x, sizes = make_input(shape, device), window(shape)
    values, positions = segkernels.max_pool2d(x, *sizes, **{kind: True})
    expected, indices = F.max_pool2d(x, *sizes, return_indices=True)
    checked = check_equal(values, expected, shape)
    if kind == "return_indices":
        check_equal(positions, indices, shape)
    measure(
        benchmark,
        f"max_pool2d {kind} {shape.name}",
        lambda: segkernels.max_pool2d(x, *sizes, **{kind: True}),
        checked=checked,
        peers=[eager(lambda: F.max_pool2d(x, *sizes, return_indices=True))],
        moved=x.nbytes + values.nbytes + positions.nbytes,
        source=shape.source,
    )


@each_shape()
def test_max_pool2d_backward(
    benchmark: BenchmarkFixture, shape: PoolShape, device: torch.device
) -> None:
    x, sizes = make_input(shape, device).requires_grad_(), window(shape)
    values = segkernels.max_pool2d(x, *sizes)
    call = backward(values, x)
    peer = backward(F.max_pool2d(x, *sizes), x)
    torch.manual_seed(1)
    exact = exact_pool_gradient(x, torch.randn_like(values), shape)
    measure(
        benchmark,
        f"max_pool2d backward {shape.name}",
        call,
        checked=check_float64(call(), exact, shape),
        peers=[eager(peer), deterministic(peer)],
        moved=x.nbytes + values.nbytes + values.numel(),
        source=shape.source,
    )
