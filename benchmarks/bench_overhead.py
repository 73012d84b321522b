"""Benchmarks of call overhead: the smallest inputs, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from checks import WrongResultError
from measure import measure
from pytest_benchmark.fixture import BenchmarkFixture
from timing import Call, clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
_SOURCE = "smallest valid input: the time is the overhead of the call"
Pair = tuple[Call, Call]


def gradient(function: Callable[..., Any], x: torch.Tensor) -> Call:
    """Forward and backward of `function`, including the overhead of autograd."""
    x = x.detach().requires_grad_()
    grad = torch.ones_like(function(x))
    return lambda: torch.autograd.grad(function(x), x, grad)[0]


def pool(x: torch.Tensor) -> Pair:
    return lambda: segkernels.max_pool2d(x, 2), lambda: F.max_pool2d(x, 2)


def unpool(x: torch.Tensor) -> Pair:
    values, codes = segkernels.max_pool2d(x, 2, return_codes=True)
    indices = F.max_pool2d(x, 2, return_indices=True)[1]
    return (
        lambda: segkernels.max_unpool2d(values, codes, 2),
        lambda: F.max_unpool2d(values, indices, 2),
    )


def nearest(x: torch.Tensor) -> Pair:
    return (
        lambda: segkernels.unpool_nearest(x, 2),
        lambda: F.interpolate(x, scale_factor=2, mode="nearest"),
    )


def bilinear(x: torch.Tensor) -> Pair:
    return (
        lambda: segkernels.interpolate(x, (4, 4), mode="bilinear"),
        lambda: F.interpolate(x, (4, 4), mode="bilinear"),
    )


def bilinear_training(x: torch.Tensor) -> Pair:
    return (
        gradient(lambda t: segkernels.interpolate(t, (4, 4), mode="bilinear"), x),
        gradient(lambda t: F.interpolate(t, (4, 4), mode="bilinear"), x),
    )


def argmax(x: torch.Tensor) -> Pair:
    return (
        lambda: segkernels.upsample_argmax(x, (4, 4)),
        lambda: F.interpolate(x, (4, 4), mode="bilinear").argmax(1),
    )


def loss(x: torch.Tensor) -> Pair:
    target = torch.zeros(1, 4, 4, dtype=torch.int64, device=x.device)
    return (
        gradient(lambda t: segkernels.upsample_cross_entropy(t, target), x),
        gradient(lambda t: F.cross_entropy(F.interpolate(t, (4, 4), mode="bilinear"), target), x),
    )


def conv(x: torch.Tensor) -> Pair:
    weight = torch.randn(2, x.shape[1], 3, 3, device=x.device)
    return (
        lambda: segkernels.dilated_conv2d(x, weight, padding=2, dilation=2),
        lambda: F.conv2d(x, weight, padding=2, dilation=2),
    )


OPS = {
    "max_pool2d": pool,
    "max_unpool2d": unpool,
    "unpool_nearest": nearest,
    "interpolate": bilinear,
    "interpolate forward + backward": bilinear_training,
    "upsample_argmax": argmax,
    "upsample_cross_entropy forward + backward": loss,
    "dilated_conv2d": conv,
}


@pytest.mark.parametrize("op", OPS)
def test_overhead(benchmark: BenchmarkFixture, op: str, device: torch.device) -> None:
    torch.manual_seed(0)
    ours, theirs = OPS[op](torch.randn(1, 2, 2, 2, device=device))
    found, expected = ours(), theirs()
    if not torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-4):
        raise WrongResultError(f"{op} of 2 x 2: result differs from torch's")
    measure(
        benchmark,
        f"overhead of {op}",
        ours,
        checked="torch",
        peers=[peers.eager(theirs)],
        source=_SOURCE,
    )


def test_overhead_of_a_crf(benchmark: BenchmarkFixture, device: torch.device) -> None:
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device=device)
    probs = torch.full((1, 2, 2, 2), 0.5, device=device)
    refined = segkernels.dense_crf(image, probs, iterations=1)
    if not torch.allclose(refined, probs):
        raise WrongResultError("dense_crf changed equal probabilities on an image of one colour")
    measure(
        benchmark,
        "overhead of dense_crf, 1 iteration",
        lambda: segkernels.dense_crf(image, probs, iterations=1),
        checked="symmetry: equal probabilities stay equal",
        source=_SOURCE,
    )
