"""Benchmarks of max_unpool2d from codes and from indices, and of its gradient, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import measure
from peers import deterministic, eager
from pooling import backward, check_equal, each_shape, make_input, window
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import PoolShape
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
KINDS = pytest.mark.parametrize("kind", ["return_codes", "return_indices"])


@each_shape()
@KINDS
def test_max_unpool2d(
    benchmark: BenchmarkFixture, shape: PoolShape, kind: str, device: torch.device
) -> None:
    x, sizes = make_input(shape, device), window(shape)
    values, positions = segkernels.max_pool2d(x, *sizes, **{kind: True})
    indices = F.max_pool2d(x, *sizes, return_indices=True)[1]

    def call() -> torch.Tensor:
        return segkernels.max_unpool2d(values, positions, *sizes, output_size=x.shape)

    def peer() -> torch.Tensor:
        return F.max_unpool2d(values, indices, *sizes, output_size=x.shape)

    measure(
        benchmark,
        f"max_unpool2d {kind} {shape.name}",
        call,
        checked=check_equal(call(), peer(), shape),
        peers=[eager(peer), deterministic(peer)],
        moved=x.nbytes + values.nbytes + positions.nbytes,
        source=shape.source,
    )


@each_shape()
@KINDS
def test_max_unpool2d_backward(
    benchmark: BenchmarkFixture, shape: PoolShape, kind: str, device: torch.device
) -> None:
    x, sizes = make_input(shape, device), window(shape)
    values, positions = segkernels.max_pool2d(x, *sizes, **{kind: True})
    indices = F.max_pool2d(x, *sizes, return_indices=True)[1]
    values.requires_grad_()
    call = backward(segkernels.max_unpool2d(values, positions, *sizes, output_size=x.shape), values)
    peer = backward(F.max_unpool2d(values, indices, *sizes, output_size=x.shape), values)
    measure(
        benchmark,
        f"max_unpool2d backward {kind} {shape.name}",
        call,
        checked=check_equal(call(), peer(), shape),
        peers=[eager(peer)],
        moved=x.nbytes + values.nbytes + positions.nbytes,
        source=shape.source,
    )
