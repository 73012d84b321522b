"""Yu and Koltun: Multi-Scale Context Aggregation by Dilated Convolutions, ICLR 2016."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Box, Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, max_pool, op_backend, scaled
from segkernels.models._registry import Architecture
from segkernels.nn import ContextModule, ConvBNAct
from segkernels.ops._operator import surely

# Pixels that the unpadded convolutions of the front end need on each side of the image: with a
# receptive field of 380 and a stride of 8, (380 - 8) / 2.
MARGIN = 186


class DilatedNet(SegmentationModel):
    """VGG16 without pool4 and pool5, with dilations 2 and 4 in their place, and a context module.

    ``padding="reflect"`` is the paper's (section 4): the image is padded by 186 reflected pixels on
    each side, and the convolutions of the front end are not padded. A small image is reflected
    several times. ``padding="zeros"`` pads each convolution instead and computes less: the front
    end takes 1,221 GFLOPs instead of 1,541 at 513 x 513, and far less on small images. The context
    module pads with zeros and starts as the identity (section 3).

    Any size fits: the image is padded to multiples of 8 in the same way, and the output is cropped.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        context: `multiplier` of the `ContextModule`; None for the front end alone.
        padding: "reflect" or "zeros".
        width: factor on the paper's numbers of channels in the front end.
        dropout: probability after fc6 and fc7.
    """

    load_backbone = _vgg.load_vgg16_with_fc

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        context: int | tuple[int, ...] | None = 1,
        padding: Literal["reflect", "zeros"] = "reflect",
        width: float = 1.0,
        dropout: float = 0.5,
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        if padding not in ("reflect", "zeros"):
            raise ValueError(f'dilatednet: padding must be "reflect" or "zeros", got {padding!r}')
        self.padding = padding
        same = padding == "zeros"
        fc, ops = scaled(4096, width), op_backend(backend)
        self.vgg = _vgg.VGG16(
            in_channels,
            width=width,
            dilation=(1, 1, 1, 1, 2),
            padding="same" if same else "valid",
            backend=backend,
        )
        pad = 12 if same else 0
        before = self.vgg.channels[4]
        self.fc6 = ConvBNAct(before, fc, 7, padding=pad, dilation=4, norm=False, backend=ops)
        self.fc7 = ConvBNAct(fc, fc, 1, norm=False, backend=ops)
        self.dropout = nn.Dropout(dropout)
        self.final = nn.Conv2d(fc, num_classes, 1)
        he_init_(self)
        self.context = (
            ContextModule(num_classes, multiplier=context, backend=ops)
            if context is not None
            else None
        )

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at stride 8."""
        height, width = input.shape[-2:]
        below, right = -height % 8, -width % 8
        if self.padding == "reflect":
            x = _mirror(input, -2, MARGIN, MARGIN + below)
            x = _mirror(x, -1, MARGIN, MARGIN + right)
        else:
            x = nn.functional.pad(input, (0, right, 0, below))
        for number, stage in enumerate(self.vgg):
            x = stage(x)
            if number < 3:
                x = max_pool(x, backend=self.backend)
        x = self.dropout(self.fc6(x))
        x = self.final(self.dropout(self.fc7(x)))
        if self.context is not None:
            x = self.context(x)
        whole = surely(below == 0) and surely(right == 0)
        box = None if whole else Box(0, 0, height, width)
        return Scores(x, (height + below, width + right), box)


def _mirror(x: torch.Tensor, dim: int, before: int, after: int) -> torch.Tensor:
    """Reflection padding along one axis; the padding may exceed the size of `x`."""
    size = x.size(dim)
    period = max(1, 2 * size - 2)
    start = -before % period
    place = torch.arange(start, start + before + size + after, device=x.device)
    place = place - place // period * period  # not %, which has no ONNX form for a dynamic period
    return x.index_select(dim, torch.where(place < size, place, period - place))


_dilatednet = Architecture(
    DilatedNet, "Yu and Koltun 2016", 8, ("dilated_conv2d", "interpolate", "max_pool2d")
)


@_dilatednet.variant(parameters=134_346_581, flops=1_541_478_974_976, context=None)
def dilatednet_frontend() -> None:
    """DilatedNet's front end alone."""


@_dilatednet.variant(parameters=134_374_973, flops=1_541_717_467_776, context=1)
def dilatednet() -> None:
    """DilatedNet: the front end and the Basic context module."""


@_dilatednet.variant(parameters=141_149_720, flops=1_598_948_286_876, context=ContextModule.LARGE)
def dilatednet_large() -> None:
    """DilatedNet: the front end and the Large context module."""
