"""Jégou et al.: The One Hundred Layers Tiramisu, CVPR workshops 2017."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, centre_crop, he_init_, max_pool, op_backend, scaled
from segkernels.models._registry import Architecture
from segkernels.nn import DilatedConv2d


class Layer(nn.Module):
    """BatchNorm, ReLU, convolution and dropout (table 1)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, dropout: float, backend: Backend
    ) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        pad, ops = kernel // 2, op_backend(backend)
        self.conv = DilatedConv2d(in_channels, out_channels, kernel, padding=pad, backend=ops)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H, W]."""
        out: torch.Tensor = self.dropout(self.conv(F.relu(self.bn(input))))
        return out


class DenseBlock(nn.ModuleList):
    """A dense block: each layer reads the block's input and all earlier outputs (figure 2)."""

    def __init__(
        self, in_channels: int, growth: int, depth: int, dropout: float, backend: Backend
    ) -> None:
        super().__init__(
            Layer(in_channels + i * growth, growth, 3, dropout, backend) for i in range(depth)
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The outputs of the layers, without the input: [N, depth * growth, H, W]."""
        x, new = input, []
        for layer in self:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], dim=1)
        return torch.cat(new, dim=1)


class FCDenseNet(SegmentationModel):
    """An encoder and a decoder of dense blocks.

    The decoder upsamples only the outputs of a block's layers, without the block's input (section
    3.2). A transition down is a 1x1 convolution and 2x2 max pooling. A transition up is a 3x3
    transposed convolution with stride 2, whose output is cropped at the centre to the size of the
    skip. The models have 1,376,795, 3,463,243 and 9,322,091 parameters for 11 classes. Sizes of 32
    or more fit. Training needs two images or more below 64 x 64, because the bottleneck has one
    pixel there.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        growth: growth rate, the number of output channels of a layer.
        width: factor on the growth rate and on the first convolution's 48 channels.
        dropout: probability after each convolution.
        depths: number of layers of the encoder's five blocks, the bottleneck, and the decoder's
            five blocks.
    """

    min_size = 32

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        growth: int = 12,
        width: float = 1.0,
        dropout: float = 0.2,
        depths: Sequence[int] = (4,) * 11,
        backend: Backend = "segkernels",
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
        # The classifier also reads the last block's input (table 2: 256 channels for 103 layers).
        self.classifier = nn.Conv2d(channels + new, num_classes, 1)
        he_init_(self)

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """Whether the bottleneck has one pixel."""
        return input.size(-2) < 64 and input.size(-1) < 64

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at the size of the input."""
        x, skips = self.first(input), []
        for block, transition in zip(self.down, self.transition_down, strict=True):
            x = torch.cat([x, block(x)], dim=1)
            skips.append(x)
            x = max_pool(transition(x), backend=self.backend)
        new = self.bottleneck(x)
        for transition, block in zip(self.transition_up, self.up, strict=True):
            skip = skips.pop()
            x = torch.cat([centre_crop(transition(new), skip), skip], dim=1)
            new = block(x)
        return Scores(self.classifier(torch.cat([x, new], dim=1)))


_fc_densenet = Architecture(FCDenseNet, "Jégou et al. 2017", 32, ("dilated_conv2d", "max_pool2d"))


@_fc_densenet.variant(parameters=1_378_725, flops=94_411_731_744, growth=12)
def fc_densenet56() -> None:
    """FC-DenseNet56: growth rate 12."""


@_fc_densenet.variant(
    parameters=3_466_133, flops=220_431_860_064, growth=16, defaults={"depths": (5,) * 11}
)
def fc_densenet67() -> None:
    """FC-DenseNet67: growth rate 16."""


@_fc_densenet.variant(
    parameters=9_324_661,
    flops=211_459_515_936,
    growth=16,
    defaults={"depths": (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4)},
)
def fc_densenet103() -> None:
    """FC-DenseNet103: growth rate 16."""
