"""Ronneberger et al.: U-Net: Convolutional Networks for Biomedical Image Segmentation.

MICCAI 2015.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import (
    Backend,
    centre_crop,
    he_init_,
    max_pool,
    op_backend,
    scaled,
    spatial_size,
)
from segkernels.models._registry import Architecture
from segkernels.nn import ConvBNAct


class UNet(SegmentationModel):
    """A contracting path of 64 to 1024 channels, and an expanding path with skip connections.

    Each level has two 3x3 convolutions with ReLU (figure 1). 2x2 max pooling leads down. A 2x2
    transposed convolution leads up, and its output is concatenated to the cropped feature map of
    the same level. A 1x1 convolution is the classifier. Dropout ends the contracting path (section
    3.1), and the initialisation is He's (section 3). The model has 31,030,658 parameters for the
    paper's one channel and two classes.

    With ``padding="same"`` the sizes that fit are multiples of 16. With ``padding="valid"``, the
    paper's convolutions without padding, they are 188 + 16 k, and the output has 4 + 16 k (572
    gives 388); `loss` crops a target of the input's size to its centre. The error for another size
    names the nearest that fit.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        padding: "same" or "valid".
        width: factor on the paper's numbers of channels.
        dropout: probability after the last two levels of the contracting path.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        padding: Literal["same", "valid"] = "same",
        width: float = 1.0,
        dropout: float = 0.5,
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        if padding not in ("same", "valid"):
            raise ValueError(f'unet: padding must be "same" or "valid", got {padding!r}')
        self.padding = padding
        self.min_size, self.size_step = (188 if padding == "valid" else 16), 16
        pad, ops = (0 if padding == "valid" else 1), op_backend(backend)
        channels = [scaled(64 * 2**i, width) for i in range(5)]

        def double(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(
                ConvBNAct(before, after, padding=pad, norm=False, backend=ops),
                ConvBNAct(after, after, padding=pad, norm=False, backend=ops),
            )

        self.down = nn.ModuleList(
            double(a, b) for a, b in zip([in_channels, *channels[:-1]], channels, strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        pairs = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up_conv = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.up = nn.ModuleList(double(2 * b, b) for _, b in pairs)
        self.last = nn.Conv2d(channels[0], num_classes, 1)
        he_init_(self)

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at the size of the output."""
        x, skips = input, []
        for level, block in enumerate(self.down):
            if level > 0:
                skips.append(x)
                x = max_pool(x, backend=self.backend)
            x = block(x)
            if level >= 3:
                x = self.dropout(x)
        for up_conv, block in zip(self.up_conv, self.up, strict=True):
            x = up_conv(x)
            x = block(torch.cat([centre_crop(skips.pop(), x), x], dim=1))
        return Scores(self.last(x), spatial_size(x))

    def fit_target(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The centre of a target that has the size of the input, with ``padding="valid"``."""
        if self.padding == "same" or target.shape[-2:] != input.shape[-2:]:
            return target
        return target[..., 92:-92, 92:-92]


_unet = Architecture(UNet, "Ronneberger et al. 2015", 16, ("dilated_conv2d", "max_pool2d"))


@_unet.variant(parameters=31_033_045, flops=386_010_185_728, size=512)
def unet() -> None:
    """U-Net."""
