"""Zhao et al.: Pyramid Scene Parsing Network, CVPR 2017."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models._base import SegmentationModel
from segkernels.models._blocks import Backend, op_backend, resize
from segkernels.models._registry import register
from segkernels.models._resnet import LAYERS, ResNetModel, Stem
from segkernels.nn import ConvBNAct

_PAPER = "Zhao et al. 2017"
_OPS = ("dilated_conv2d", "interpolate", "max_pool2d")
BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """Averages over 1x1, 2x2, 3x3 and 6x6 bins, each reduced by 1x1, and the map (figure 3c)."""

    def __init__(self, in_channels: int, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        each, ops = max(1, in_channels // len(BINS)), op_backend(backend)
        self.out_channels = in_channels + each * len(BINS)
        self.reduce = nn.ModuleList(ConvBNAct(in_channels, each, 1, backend=ops) for _ in BINS)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H, W]."""
        size = (input.size(-2), input.size(-1))
        levels = [
            resize(reduce(F.adaptive_avg_pool2d(input, bins)), size, True, self.backend)
            for bins, reduce in zip(BINS, self.reduce, strict=True)
        ]
        return torch.cat([input, *levels], dim=1)


class PSPNet(ResNetModel):
    """A ResNet at output stride 8, pyramid pooling, a 3x3 and a 1x1 convolution.

    The auxiliary loss on layer3 counts 0.4 (section 3.3). Any size fits; at 8 k + 1 (473, 713) the
    scores of the corners fall on the corner pixels. Training needs two images or more: the bin of
    1x1 has one pixel.

    Args: see `ResNetModel`.
    """

    align_corners = True
    aux_weight = 0.4

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int,
        in_channels: int,
        *,
        stem: Stem,
        aux_loss: bool,
        width: float,
        backend: Backend,
    ) -> None:
        super().__init__(
            layers,
            num_classes,
            in_channels,
            width=width,
            output_stride=8,
            stem=stem,
            aux_loss=aux_loss,
            backend=backend,
        )
        before = self.backbone.channels[3]
        pyramid, inner = PyramidPooling(before, backend), max(1, before // 4)
        self.classifier = nn.Sequential(
            pyramid,
            ConvBNAct(pyramid.out_channels, inner, backend=op_backend(backend)),
            nn.Dropout(0.1),
            nn.Conv2d(inner, num_classes, 1),
        )

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """The pyramid's bin of 1x1."""
        return True


@register(_PAPER, 8, _OPS)
def pspnet50(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    stem: Stem = "7x7",
    aux_loss: bool = False,
    width: float = 1.0,
    layers: Sequence[int] = LAYERS[50],
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """PSPNet on ResNet-50. 46,592,597 parameters; deep stem 123,776 more; aux 2,365,205 more.

    See `PSPNet` for the arguments.
    """
    return PSPNet(
        layers,
        num_classes,
        in_channels,
        stem=stem,
        aux_loss=aux_loss,
        width=width,
        backend=backend,
    )


@register(_PAPER, 8, _OPS)
def pspnet101(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    stem: Stem = "7x7",
    aux_loss: bool = False,
    width: float = 1.0,
    layers: Sequence[int] = LAYERS[101],
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """PSPNet on ResNet-101. 65,584,725 parameters; deep stem 123,776 more; aux 2,365,205 more.

    See `PSPNet` for the arguments.
    """
    return PSPNet(
        layers,
        num_classes,
        in_channels,
        stem=stem,
        aux_loss=aux_loss,
        width=width,
        backend=backend,
    )
