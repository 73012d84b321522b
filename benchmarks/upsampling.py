"""Cases of interpolate and of ops on upsampled logits: sizes, inputs, calls, and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peers import Peer

import segkernels

Call = Callable[[], Any]


@dataclass(frozen=True)
class UpShape:
    """N maps of C channels (classes), from (h, w) to (H, W)."""

    batch: int
    channels: int
    low: tuple[int, int]
    high: tuple[int, int]
    source: str

    @property
    def name(self) -> str:
        low, high = ("x".join(map(str, size)) for size in (self.low, self.high))
        return f"N{self.batch}C{self.channels}-{low}-{high}"


_VOC = "PASCAL VOC crops of 513 at output stride 8: DeepLab's last layer"
_CITY = "Cityscapes, 19 classes"
UPSAMPLE = (
    UpShape(8, 21, (65, 65), (513, 513), _VOC),
    UpShape(8, 256, (33, 33), (129, 129), "DeepLabv3+'s decoder: features by 4"),
    UpShape(8, 256, (65, 65), (130, 130), "a U-Net's or FPN's step by 2"),
    UpShape(4, 19, (256, 512), (1024, 2048), _CITY),
    UpShape(8, 21, (513, 513), (129, 129), "downsampling"),
)
TAIL = (
    UpShape(8, 21, (65, 65), (513, 513), _VOC),
    UpShape(4, 19, (128, 256), (1024, 2048), _CITY),
    UpShape(2, 150, (128, 128), (512, 512), "ADE20K, 150 classes"),
)
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("NCHW", "NHWC")


def maps(shape: UpShape, dtype: torch.dtype, layout: str, device: torch.device) -> torch.Tensor:
    """Random logits; one image of the batch on the CPU."""
    generator = torch.Generator().manual_seed(0)
    batch = shape.batch if device.type == "cuda" else 1
    x = torch.randn(batch, shape.channels, *shape.low, generator=generator)
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    return x.to(dtype).to(device).contiguous(memory_format=memory_format)


def labels(shape: UpShape, device: torch.device) -> torch.Tensor:
    """Random labels, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(1)
    batch = shape.batch if device.type == "cuda" else 1
    found = torch.randint(shape.channels, (batch, *shape.high), generator=generator)
    found[torch.rand(found.shape, generator=generator) < 0.1] = -100
    return found.to(device)


def forward(
    function: Callable[..., Any],
    shape: UpShape,
    mode: str,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> Call:
    """`function`, interpolate of ours or torch's, forward."""
    x = maps(shape, dtype, layout, device)
    return lambda: function(x, shape.high, mode=mode)


def backward(
    function: Callable[..., Any],
    shape: UpShape,
    mode: str,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> Call:
    """Its backward alone."""
    x = maps(shape, dtype, layout, device).requires_grad_()
    out = function(x, shape.high, mode=mode)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


def moved(shape: UpShape, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of input and output, each counted once."""
    batch = shape.batch if device.type == "cuda" else 1
    pixels = shape.low[0] * shape.low[1] + shape.high[0] * shape.high[1]
    return batch * shape.channels * pixels * torch.finfo(dtype).bits // 8


def eager(run: Call) -> Peer:
    """torch's own operators as a peer."""
    return Peer(f"torch {torch.__version__}", "the same device", run, on_device=True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile's version of it: inductor fuses the upsampling into what follows."""
    torch.compiler.reset()
    return torch.compile(function)


def torch_loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What `upsample_cross_entropy` replaces."""
    return F.cross_entropy(F.interpolate(x, target.shape[-2:], mode="bilinear"), target)


def torch_argmax(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What `upsample_argmax` replaces."""
    return F.interpolate(x, size, mode="bilinear").argmax(1)


def train(
    function: Callable[..., Any],
    shape: UpShape,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> Call:
    """A loss, forward and backward."""
    x = maps(shape, dtype, layout, device).requires_grad_()
    target = labels(shape, device)
    return lambda: torch.autograd.grad(function(x, target), x)[0]


def predict(
    function: Callable[..., Any],
    shape: UpShape,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> Call:
    """A label map."""
    x = maps(shape, dtype, layout, device)
    return lambda: function(x, shape.high)


def ours_train(shape: UpShape, dtype: torch.dtype, layout: str, device: torch.device) -> Call:
    """`train` with ours; by name, for another process to measure memory."""
    return train(segkernels.upsample_cross_entropy, shape, dtype, layout, device)
