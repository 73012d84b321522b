"""Jégou et al.: The One Hundred Layers Tiramisu, CVPR workshops 2017."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, max_pool, op_backend, scaled
from segkernels.models._registry import register
from segkernels.nn import DilatedConv2d

_PAPER = "Jégou et al. 2017"
_OPS = ("dilated_conv2d", "max_pool2d")


class Layer(nn.Module):
    """BatchNorm, ReLU, convolution, dropout (table 1)."""

    def __init__(
        self, before: int, after: int, kernel: int, dropout: float, backend: Backend
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(before)
        pad = kernel // 2
        self.conv = DilatedConv2d(before, after, kernel, padding=pad, backend=op_backend(backend))
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, before, H, W] to [N, after, H, W]."""
        out: torch.Tensor = self.dropout(self.conv(F.relu(self.bn(input))))
        return out


class DenseBlock(nn.ModuleList):
    """Layers of which each reads the block's input and all layers before it (figure 2)."""

    def __init__(
        self, before: int, growth: int, depth: int, dropout: float, backend: Backend
    ) -> None:
        super().__init__(
            Layer(before + i * growth, growth, 3, dropout, backend) for i in range(depth)
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The new maps only, [N, depth * growth, H, W]."""
        x, new = input, []
        for layer in self:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], dim=1)
        return torch.cat(new, dim=1)


class FCDenseNet(SegmentationModel):
    """Dense blocks down and up; on the way up only a block's new maps are upsampled (section 3.2).

    A transition down is a 1x1 convolution and 2x2 max pooling; one up is a 3x3 transposed
    convolution with stride 2, cropped at its centre to the skip's size. Sizes of 32 or more fit.
    At less than 64 x 64 the bottleneck is one pixel, so training needs two images or more.

    Args:
        depths: layers of the five blocks down, the bottleneck, and the five blocks up.
        growth: maps of each layer.
        num_classes: C.
        in_channels: of the images.
        width: times the growth rate and the first convolution's 48 channels.
        dropout: after each convolution.
        backend: see `SegmentationModel`.
    """

    min_size = 32

    def __init__(
        self,
        depths: Sequence[int],
        growth: int,
        num_classes: int,
        in_channels: int,
        *,
        width: float,
        dropout: float,
        backend: Backend,
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        if len(depths) != 11 or min(depths) < 1:
            raise ValueError(f"fc_densenet: depths must be 11 positive ints, got {tuple(depths)}")
        growth, channels = scaled(growth, width), scaled(48, width)
        ops = op_backend(backend)
        self.first = DilatedConv2d(in_channels, channels, 3, padding=1, backend=ops)
        skips = []
        self.down, self.transition_down = nn.ModuleList(), nn.ModuleList()
        for depth in depths[:5]:
            self.down.append(DenseBlock(channels, growth, depth, dropout, backend))
            channels += growth * depth
            skips.append(channels)
            self.transition_down.append(Layer(channels, channels, 1, dropout, backend))
        self.bottleneck = DenseBlock(channels, growth, depths[5], dropout, backend)
        new = growth * depths[5]
        self.up, self.transition_up = nn.ModuleList(), nn.ModuleList()
        for depth in depths[6:]:
            self.transition_up.append(nn.ConvTranspose2d(new, new, 3, 2))
            channels = new + skips.pop()
            self.up.append(DenseBlock(channels, growth, depth, dropout, backend))
            new = growth * depth
        # The last block's input is kept too (table 2: 256 maps before the classifier of 103).
        self.classifier = nn.Conv2d(channels + new, num_classes, 1)
        he_init_(self)

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """The bottleneck's."""
        return input.size(-2) < 64 and input.size(-1) < 64

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at the input's size."""
        x, skips = self.first(input), []
        for block, transition in zip(self.down, self.transition_down, strict=True):
            x = torch.cat([x, block(x)], dim=1)
            skips.append(x)
            x = max_pool(transition(x), backend=self.backend)
        new = self.bottleneck(x)
        for transition, block in zip(self.transition_up, self.up, strict=True):
            skip = skips.pop()
            x = torch.cat([_centre(transition(new), skip), skip], dim=1)
            new = block(x)
        x = self.classifier(torch.cat([x, new], dim=1))
        return Scores(x, (input.size(-2), input.size(-1)))


def _centre(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    top, left = ((x.size(d) - like.size(d)) // 2 for d in (-2, -1))
    return x[..., top : top + like.size(-2), left : left + like.size(-1)]


@register(_PAPER, 32, _OPS)
def fc_densenet56(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    dropout: float = 0.2,
    depths: Sequence[int] = (4,) * 11,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """FC-DenseNet56: growth 12. 1,376,795 parameters for 11 classes.

    See `FCDenseNet` for the arguments and the sizes that fit.
    """
    return FCDenseNet(
        depths, 12, num_classes, in_channels, width=width, dropout=dropout, backend=backend
    )


@register(_PAPER, 32, _OPS)
def fc_densenet67(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    dropout: float = 0.2,
    depths: Sequence[int] = (5,) * 11,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """FC-DenseNet67: growth 16. 3,463,243 parameters for 11 classes.

    See `FCDenseNet` for the arguments and the sizes that fit.
    """
    return FCDenseNet(
        depths, 16, num_classes, in_channels, width=width, dropout=dropout, backend=backend
    )


@register(_PAPER, 32, _OPS)
def fc_densenet103(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    dropout: float = 0.2,
    depths: Sequence[int] = (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4),
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """FC-DenseNet103: growth 16. 9,322,091 parameters for 11 classes.

    See `FCDenseNet` for the arguments and the sizes that fit.
    """
    return FCDenseNet(
        depths, 16, num_classes, in_channels, width=width, dropout=dropout, backend=backend
    )
