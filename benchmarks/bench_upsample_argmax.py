"""Benchmarks of upsample_argmax, against interpolation and argmax, eager and compiled."""

from __future__ import annotations

import functools

import pytest
import torch
import upsampling
from budget import each
from measure import measure
from memory import peak_bytes
from peers import eager
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import TAIL, UpShape, of_kinds
from timing import clock

import segkernels

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    each(of_kinds(TAIL, clock.device.type == "cuda")),
]


def test_upsample_argmax(benchmark: BenchmarkFixture, shape: UpShape, device: torch.device) -> None:
    case = (shape, device)
    x = upsampling.maps(*case)
    ours = segkernels.upsample_argmax(x, shape.high)
    # Rounding decides between nearly equal logits.
    agree = (ours == upsampling.torch_argmax(x.float(), shape.high)).double().mean().item()
    assert agree > 0.9999
    peak = functools.partial(peak_bytes, device=device)
    measure(
        benchmark,
        f"upsample_argmax {shape.name}",
        upsampling.ours_predict(*case),
        checked="F.interpolate and argmax",
        peers=[
            eager(
                upsampling.torch_predict(*case),
                functools.partial(peak, upsampling.torch_predict, *case),
            ),
            *upsampling.compiled(
                shape, upsampling.torch_argmax, lambda f: upsampling.predict(f, *case)
            ),
        ],
        moved=x.nbytes + ours.nbytes,
        peak=functools.partial(peak, upsampling.ours_predict, *case),
        source=shape.source,
    )
