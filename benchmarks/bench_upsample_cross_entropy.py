"""upsample_cross_entropy, forward and backward, against interpolation and loss."""

from __future__ import annotations

import functools

import pytest
import torch
import upsampling
from measure import measure
from memory import peak_bytes
from peers import Peer
from pytest_benchmark.fixture import BenchmarkFixture
from timing import clock
from upsampling import DTYPES, LAYOUTS, TAIL, UpShape

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.mark.parametrize("shape", [pytest.param(s, id=s.name) for s in TAIL])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upsample_cross_entropy(
    benchmark: BenchmarkFixture,
    shape: UpShape,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> None:
    case = (shape, dtype, layout, device)
    ours = upsampling.train(segkernels.upsample_cross_entropy, *case)()
    x = upsampling.maps(*case).float().requires_grad_()
    target = upsampling.labels(shape, device)
    (expected,) = torch.autograd.grad(upsampling.torch_loss(x, target), x)
    scale = expected.abs().max().item()
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours.float(), expected, rtol=rtol, atol=1e-4 * scale)
    peers = [upsampling.eager(upsampling.train(upsampling.torch_loss, *case))]
    if device.type == "cuda":
        fused = upsampling.train(upsampling.compiled(upsampling.torch_loss), *case)
        peers.append(Peer("inductor", "the same device", fused, on_device=True))
    # Logits are read twice, labels and kept values twice, the gradient is written.
    moved = 3 * ours.numel() * ours.element_size() + target.numel() * (2 * 8 + 2 * 4)
    measure(
        benchmark,
        f"upsample_cross_entropy forward + backward {shape.name} {str(dtype)[6:]} {layout}",
        upsampling.train(segkernels.upsample_cross_entropy, *case),
        checked="F.interpolate and F.cross_entropy, gradient",
        peers=peers,
        moved=moved,
        peak=functools.partial(peak_bytes, upsampling.ours_train, *case, device=device),
        source=shape.source,
    )
