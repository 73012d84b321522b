"""Yu and Koltun: Multi-Scale Context Aggregation by Dilated Convolutions, ICLR 2016."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Box, Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, max_pool, op_backend, scaled
from segkernels.models._registry import register
from segkernels.nn import ContextModule, ConvBNAct

_PAPER = "Yu and Koltun 2016"
_OPS = ("dilated_conv2d", "interpolate", "max_pool2d")
# Pixels around the image that the front end's unpadded convolutions need: (380 - 8) / 2 of its
# receptive field of 380, in steps of 8.
MARGIN = 186


class DilatedNet(SegmentationModel):
    """VGG16 without pool4 and pool5, dilated by 2 and 4 after them, and a context module.

    ``padding="reflect"`` is the paper's (section 4): no convolution of the front end is padded, the
    image is, by 186 mirrored pixels on each side (as often mirrored as a small image needs).
    ``padding="zeros"`` pads each convolution instead, which computes less: at 513 x 513 the front
    end 1,221 GFLOPs instead of 1,541, and on small images far less.
    The context module pads with zeros and starts as the identity (section 3).

    Any size fits: it is padded to multiples of 8 in the same way, and the output cropped.

    Args:
        context: channels of the context module's layers, in classes; None for the front end alone.
        num_classes: C.
        in_channels: of the images.
        padding: "reflect" or "zeros".
        width: times the paper's channels of the front end.
        dropout: after fc6 and fc7.
        backend: see `SegmentationModel`.
    """

    def __init__(
        self,
        context: int | tuple[int, ...] | None,
        num_classes: int,
        in_channels: int,
        *,
        padding: Literal["reflect", "zeros"],
        width: float,
        dropout: float,
        backend: Backend,
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
        box = Box(0, 0, height, width) if below or right else None
        return Scores(x, (height + below, width + right), box)

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load torchvision's vgg16: its convolutions, and fc6 and fc7 convolutionalised."""
        _vgg.load_vgg16(self, state_dict, self.name)


def _mirror(x: torch.Tensor, dim: int, before: int, after: int) -> torch.Tensor:
    """Reflection padding, also by more than the size."""
    size = x.size(dim)
    period = max(1, 2 * size - 2)
    place = torch.arange(-before, size + after, device=x.device).remainder(period)
    return x.index_select(dim, torch.where(place < size, place, period - place))


@register(_PAPER, 8, _OPS)
def dilatednet_frontend(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padding: Literal["reflect", "zeros"] = "reflect",
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """DilatedNet's front end alone. 134,346,581 parameters.

    See `DilatedNet` for the arguments.
    """
    return DilatedNet(
        None,
        num_classes,
        in_channels,
        padding=padding,
        width=width,
        dropout=dropout,
        backend=backend,
    )


@register(_PAPER, 8, _OPS)
def dilatednet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padding: Literal["reflect", "zeros"] = "reflect",
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """The front end and the Basic context module: 28,392 parameters more, 134,374,973.

    See `DilatedNet` for the arguments.
    """
    return DilatedNet(
        1,
        num_classes,
        in_channels,
        padding=padding,
        width=width,
        dropout=dropout,
        backend=backend,
    )


@register(_PAPER, 8, _OPS)
def dilatednet_large(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padding: Literal["reflect", "zeros"] = "reflect",
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """The front end and the Large context module: 6,803,139 parameters more, 141,149,720.

    See `DilatedNet` for the arguments.
    """
    return DilatedNet(
        ContextModule.LARGE,
        num_classes,
        in_channels,
        padding=padding,
        width=width,
        dropout=dropout,
        backend=backend,
    )
