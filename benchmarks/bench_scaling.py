"""Scaling curves.

The dense CRF over pixels, classes and feature dimension; the convolution over its dilation; the
operators on upsampled logits over classes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cases
import checks
import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
import upsampling
from budget import full_only
from inputs import crf_inputs, feature_planes, probabilities
from measure import measure
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import CrfShape, Kind, UpShape, dilations
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
_CUDA = clock.device.type == "cuda"
_SIDE = 512 if _CUDA else 256
_LOW, _HIGH = ((65, 65), (513, 513)) if _CUDA else ((33, 33), (257, 257))
_BATCH = 8 if _CUDA else 1
_KIND = Kind(_CUDA, "bfloat16" if _CUDA else "float32", "NHWC" if _CUDA else "NCHW")


def points(name: str, values: Sequence[int], quick: Sequence[int]) -> pytest.MarkDecorator:
    """Parametrise `name` with `values`; quick mode runs those in `quick`."""
    return pytest.mark.parametrize(
        name, [pytest.param(v, marks=() if v in quick else full_only) for v in values]
    )


def curve(name: str, over: str, x: float) -> dict[str, Any]:
    """The fact that makes a case a point of a curve, for `measure`."""
    return {"name": name, "over": over, "x": x}


def crf(benchmark: BenchmarkFixture, shape: CrfShape, device: torch.device, **facts: Any) -> None:
    call = cases.crf(shape, device)
    images, probs = crf_inputs(shape, device)
    image = images[0].permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    peer = peers.pydensecrf(shape, image, probs[0].cpu().numpy())
    others = [peer, peers.monai(shape, images, probs)]
    checked = checks.crf(shape, call(), images, probs, peer)
    measure(
        benchmark,
        f"dense_crf {shape.name}",
        call,
        checked=checked,
        peers=others,
        moved=cases.crf_bytes(shape),
        **facts,
    )


@points("side", (128, 256, 512, 1024, *((2048,) if _CUDA else ())), quick=(128, 256, 512))
def test_crf_over_pixels(benchmark: BenchmarkFixture, side: int, device: torch.device) -> None:
    shape = CrfShape(side, side, 21, 5, "")
    facts = {"source": "21 classes, 5 iterations"}
    name = "Dense CRF over pixels"
    crf(benchmark, shape, device, curve=curve(name, "pixels", side * side), **facts)


@points("classes", (2, 4, 8, 16, 21, 32, 64, 150), quick=(2, 8, 21, 64))
def test_crf_over_classes(benchmark: BenchmarkFixture, classes: int, device: torch.device) -> None:
    shape = CrfShape(_SIDE, _SIDE, classes, 5, "")
    facts = {"source": f"{_SIDE} x {_SIDE}, 5 iterations"}
    name = "Dense CRF over classes"
    crf(benchmark, shape, device, curve=curve(name, "classes", classes), **facts)


@points("dims", (1, 2, 3, 5, 8, 12, 16), quick=(2, 5, 8, 12))
def test_crf_over_feature_dimension(
    benchmark: BenchmarkFixture, dims: int, device: torch.device
) -> None:
    side, classes, iterations = _SIDE, 21, 5
    features = torch.from_numpy(feature_planes(side, side, dims)).to(device)
    probs = torch.from_numpy(probabilities(side, side, classes)).to(device)

    def refine(planes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        term = segkernels.PairwiseTerm(planes, compat=4)
        refined: torch.Tensor = segkernels.dense_crf(
            None,
            scores,
            iterations=iterations,
            compat_gaussian=None,
            compat_bilateral=None,
            pairwise=[term],
        )
        return refined

    measure(
        benchmark,
        f"dense_crf {side}x{side}x{classes}, one term of {dims} features",
        lambda: refine(features, probs),
        checked=checks.term(refine, features, probs, iterations),
        peers=[peers.pydensecrf_term(features.cpu().numpy(), probs.cpu().numpy(), iterations)],
        moved=4 * side * side * (dims + 2 * classes),
        source=f"{side} x {side}, 21 classes, 5 iterations, one term",
        curve=curve("Dense CRF over feature dimension", "features", dims),
    )


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, id=s.name, marks=() if s.quick else full_only) for s in dilations(_CUDA)],
)
def test_conv_over_dilation(benchmark: BenchmarkFixture, shape: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    dtype, layout = shape.kind.torch_dtype, shape.kind.memory_format
    x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, device=device)
    w = torch.randn(shape.out_channels, shape.channels, 3, 3, device=device)
    w /= (9 * shape.channels) ** 0.5
    x, w = x.to(dtype, memory_format=layout), w.to(dtype, memory_format=layout)
    args = (None, 1, shape.padding, shape.dilation)
    ours = segkernels.dilated_conv2d(x, w, *args)
    exact = F.conv2d(x[:1].double(), w.double(), *args)
    measure(
        benchmark,
        f"dilated_conv2d {shape.name}",
        lambda: segkernels.dilated_conv2d(x, w, *args),
        checked=checks.check_float64(ours[:1], exact, checks.CONV_TOLERANCE, shape.name),
        peers=[peers.eager(lambda: F.conv2d(x, w, *args))],
        flops=shape.useful_flops(),
        flops_dtype=shape.kind.dtype,
        source=shape.source,
        curve=curve("Convolution over dilation", "dilation", shape.dilation),
    )


CLASSES = points("classes", (2, 4, 8, 19, 21, 40, 80, 150), quick=(2, 8, 21, 80))


def upsampled(classes: int) -> UpShape:
    source = f"{_BATCH} x C x {_LOW[0]} x {_LOW[1]} to {_HIGH[0]} x {_HIGH[1]}, {_KIND.name}"
    return UpShape(_BATCH, classes, _LOW, _HIGH, source, kind=_KIND)


@CLASSES
def test_loss_over_classes(benchmark: BenchmarkFixture, classes: int, device: torch.device) -> None:
    shape = upsampled(classes)
    ours, theirs = upsampling.ours_train(shape, device), upsampling.torch_train(shape, device)
    reference = upsampling.torch_train(replace(shape, kind=Kind(_CUDA, "float32", "NCHW")), device)
    expected = reference()
    worst = float((ours().float() - expected).abs().max() / expected.abs().max())
    if not worst <= 2**-6:
        raise checks.WrongResultError(
            f"{shape.name}: the gradient differs from torch's by {worst:g}"
        )
    measure(
        benchmark,
        f"upsample_cross_entropy forward + backward {shape.name}",
        ours,
        checked="gradient of F.interpolate and F.cross_entropy in float32",
        peers=[peers.eager(theirs)],
        source=shape.source,
        curve=curve("upsample_cross_entropy over classes", "classes", classes),
    )


@CLASSES
def test_argmax_over_classes(
    benchmark: BenchmarkFixture, classes: int, device: torch.device
) -> None:
    shape = upsampled(classes)
    x = upsampling.maps(shape, device)
    labels = upsampling.torch_argmax(x.float(), shape.high)
    agree = float((segkernels.upsample_argmax(x, shape.high) == labels).double().mean())
    if not agree > 0.9999:  # rounding decides between nearly equal logits
        raise checks.WrongResultError(f"{shape.name}: {1 - agree:.2%} of the labels differ")
    measure(
        benchmark,
        f"upsample_argmax {shape.name}",
        upsampling.ours_predict(shape, device),
        checked="F.interpolate and argmax",
        peers=[peers.eager(functools.partial(upsampling.torch_argmax, x, shape.high))],
        source=shape.source,
        curve=curve("upsample_argmax over classes", "classes", classes),
    )
