"""Ronneberger et al.: U-Net: Convolutional Networks for Biomedical Image Segmentation.

MICCAI 2015.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, max_pool, op_backend, scaled
from segkernels.models._registry import register
from segkernels.nn import ConvBNAct


class UNet(SegmentationModel):
    """A contracting path of 64 to 1024 channels, and an expanding one that is handed its maps.

    Figure 1 of the paper: two 3x3 convolutions with ReLU a level, 2x2 max pooling down, a 2x2
    transposed convolution up, the cropped map of the same level put before it, 1x1 at the end.
    Dropout at the end of the contracting path (section 3.1); He initialisation (section 3).

    Sizes, or a `ValueError` that names the nearest: ``padding="same"``: multiples of 16.
    ``padding="valid"``, the paper's convolutions without padding: 188 + 16 k, for 4 + 16 k of
    output (572 gives 388); `loss` then crops a target of the input's size to its centre.

    Args:
        num_classes: C.
        in_channels: of the images.
        padding: "same" or "valid".
        width: times the paper's channels.
        dropout: after the last two levels of the contracting path.
        backend: see `SegmentationModel`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        padding: Literal["same", "valid"],
        width: float,
        dropout: float,
        backend: Backend,
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        if padding not in ("same", "valid"):
            raise ValueError(f'unet: padding must be "same" or "valid", got {padding!r}')
        self.padding = padding
        self.min_size, self.size_step = (188 if padding == "valid" else 16), 16
        pad, ops = (0 if padding == "valid" else 1), op_backend(backend)
        sizes = [scaled(64 * 2**i, width) for i in range(5)]

        def double(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(
                ConvBNAct(before, after, padding=pad, norm=False, backend=ops),
                ConvBNAct(after, after, padding=pad, norm=False, backend=ops),
            )

        self.down = nn.ModuleList(
            double(a, b) for a, b in zip([in_channels, *sizes[:-1]], sizes, strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        pairs = list(zip(sizes[:0:-1], sizes[-2::-1], strict=True))
        self.up_conv = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.up = nn.ModuleList(double(2 * b, b) for _, b in pairs)
        self.last = nn.Conv2d(sizes[0], num_classes, 1)
        he_init_(self)

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at the output's size."""
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
            x = block(torch.cat([_centre(skips.pop(), x), x], dim=1))
        return Scores(self.last(x), (x.size(-2), x.size(-1)))

    def fit_target(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The centre of a target of the input's size, for unpadded convolutions."""
        if self.padding == "same" or target.shape[-2:] != input.shape[-2:]:
            return target
        return target[..., 92:-92, 92:-92]


def _centre(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    top, left = ((x.size(d) - like.size(d)) // 2 for d in (-2, -1))
    return x[..., top : top + like.size(-2), left : left + like.size(-1)]


@register("Ronneberger et al. 2015", 16, ("dilated_conv2d", "max_pool2d"))
def unet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    padding: Literal["same", "valid"] = "same",
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """U-Net. 31,030,658 parameters for one channel and two classes, as in the paper.

    See `UNet` for the arguments and the sizes that fit.
    """
    return UNet(
        num_classes, in_channels, padding=padding, width=width, dropout=dropout, backend=backend
    )
