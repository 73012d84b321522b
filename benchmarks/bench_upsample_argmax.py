"""upsample_argmax against interpolation and argmax, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import upsampling
from measure import measure
from peers import Peer
from pytest_benchmark.fixture import BenchmarkFixture
from timing import clock
from upsampling import DTYPES, LAYOUTS, TAIL, UpShape

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.mark.parametrize("shape", [pytest.param(s, id=s.name) for s in TAIL])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upsample_argmax(
    benchmark: BenchmarkFixture,
    shape: UpShape,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> None:
    case = (shape, dtype, layout, device)
    x = upsampling.maps(*case)
    ours = segkernels.upsample_argmax(x, shape.high)
    # Rounding decides between logits that are almost equal.
    agree = (ours == upsampling.torch_argmax(x.float(), shape.high)).double().mean().item()
    assert agree > 0.9999
    peers = [upsampling.eager(upsampling.predict(upsampling.torch_argmax, *case))]
    if device.type == "cuda":
        fused = upsampling.predict(upsampling.compiled(upsampling.torch_argmax), *case)
        peers.append(Peer("inductor", "the same device", fused, on_device=True))
    measure(
        benchmark,
        f"upsample_argmax {shape.name} {str(dtype)[6:]} {layout}",
        upsampling.predict(segkernels.upsample_argmax, *case),
        checked="F.interpolate and argmax",
        peers=peers,
        moved=x.numel() * x.element_size() + ours.numel() * ours.element_size(),
        source=shape.source,
    )
