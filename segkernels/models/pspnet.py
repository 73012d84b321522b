"""Zhao et al.: Pyramid Scene Parsing Network, CVPR 2017."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models._blocks import Backend, op_backend, resize, spatial_size
from segkernels.models._registry import Architecture
from segkernels.models._resnet import LAYERS, ResNetModel, Stem
from segkernels.nn import ConvBNAct
from segkernels.ops._operator import must_call_torch

BINS = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """The pyramid pooling module (figure 3c).

    It averages the feature map over 1x1, 2x2, 3x3 and 6x6 bins, reduces the channels of each
    average with a 1x1 convolution, upsamples, and concatenates the results to the feature map.
    """

    def __init__(self, in_channels: int, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        each, ops = max(1, in_channels // len(BINS)), op_backend(backend)
        self.out_channels = in_channels + each * len(BINS)
        self.reduce = nn.ModuleList(ConvBNAct(in_channels, each, 1, backend=ops) for _ in BINS)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H, W]."""
        size = spatial_size(input)
        levels = [
            resize(reduce(_average(input, bins)), size, True, self.backend)
            for bins, reduce in zip(BINS, self.reduce, strict=True)
        ]
        return torch.cat([input, *levels], dim=1)


def _average(x: torch.Tensor, bins: int) -> torch.Tensor:
    """`F.adaptive_avg_pool2d`, as products of matrices where that has no ONNX form."""
    if not must_call_torch():
        return F.adaptive_avg_pool2d(x, bins)
    rows, columns = (_shares(x.size(dim), bins, x) for dim in (-2, -1))
    return rows @ x @ columns.T


def _shares(size: int, bins: int, like: torch.Tensor) -> torch.Tensor:
    """The share of each of `size` pixels in the average of each bin, [bins, size]."""
    bin_ = torch.arange(bins, device=like.device)[:, None]
    first, end = bin_ * size // bins, ((bin_ + 1) * size + bins - 1) // bins
    pixel = torch.arange(size, device=like.device)
    return ((pixel >= first) & (pixel < end)).to(like.dtype) / (end - first)


class PSPNet(ResNetModel):
    """A ResNet at output stride 8, pyramid pooling, a 3x3 and a 1x1 convolution.

    The auxiliary loss on layer3 has a factor of 0.4 (section 3.3). Any size fits; with sizes of
    8 k + 1 (473, 713) the corner scores lie on the corner pixels. Training needs two images or
    more, because the 1x1 bin has one pixel.

    Args:
        num_classes, in_channels, aux_loss, width, layers, backend: see `ResNetModel`.
        stem: the first layers of the ResNet, see `ResNet`: "deep" adds 123,776 parameters.
    """

    align_corners = True
    aux_weight = 0.4

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        stem: Stem = "7x7",
        aux_loss: bool = False,
        width: float = 1.0,
        layers: Sequence[int] = LAYERS[50],
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(
            num_classes, in_channels, layers, width, backend, stem=stem, aux_loss=aux_loss
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
        """True: the 1x1 bin of the pyramid is one."""
        return True


_pspnet = Architecture(
    PSPNet, "Zhao et al. 2017", 8, ("dilated_conv2d", "interpolate", "max_pool2d")
)


@_pspnet.variant(parameters=46_592_597, flops=365_144_120_704)
def pspnet50() -> None:
    """PSPNet on ResNet-50."""


@_pspnet.variant(parameters=65_584_725, flops=525_186_309_504, defaults={"layers": LAYERS[101]})
def pspnet101() -> None:
    """PSPNet on ResNet-101."""
