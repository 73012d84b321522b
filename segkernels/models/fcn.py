"""Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Box, Scores, SegmentationModel
from segkernels.models._blocks import (
    Backend,
    crop,
    he_init_,
    max_pool,
    op_backend,
    scaled,
    zero_init_,
)
from segkernels.models._registry import Architecture
from segkernels.nn import ConvBNAct, bilinear_kernel_


class FCN(SegmentationModel):
    """VGG16 with its fully connected layers as convolutions, and skips from pool4 and pool3.

    This is the authors' network: the first convolution has a padding of 100, pooling rounds up, and
    the scores are cropped at the fixed offsets 5 (pool4), 9 (pool3) and, at the end, 19, 27 or 31.
    The x2 upsamplings are learned transposed convolutions between all classes, which start as
    bilinear interpolation (sections 3.3 and 4.2). The last upsampling is fixed: a transposed
    convolution with bilinear weights and a kernel of twice its stride. It is computed as a bilinear
    resizing of the scores with a border of zeros, which gives the same sums. Score layers start at
    zero (section 4.3).

    Any size fits.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        stride: stride of the finest scores: 32, 16 or 8.
        width: factor on the paper's numbers of channels.
        dropout: probability after fc6 and fc7.
    """

    load_backbone = _vgg.load_vgg16_with_fc

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        stride: int = 8,
        width: float = 1.0,
        dropout: float = 0.5,
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        self.stride = stride
        self.vgg = _vgg.VGG16(in_channels, width=width, first_padding=100, backend=backend)
        pool3, pool4, pool5 = self.vgg.channels[2:]
        fc, ops = scaled(4096, width), op_backend(backend)
        self.fc6 = ConvBNAct(pool5, fc, 7, padding=0, norm=False, backend=ops)
        self.fc7 = ConvBNAct(fc, fc, 1, norm=False, backend=ops)
        self.dropout = nn.Dropout(dropout)
        self.score_fr = nn.Conv2d(fc, num_classes, 1)
        he_init_(self)
        scores = [self.score_fr]
        if stride <= 16:
            self.score_pool4 = nn.Conv2d(pool4, num_classes, 1)
            self.upscore2 = _upsampling(num_classes)
            scores.append(self.score_pool4)
        if stride <= 8:
            self.score_pool3 = nn.Conv2d(pool3, num_classes, 1)
            self.upscore_pool4 = _upsampling(num_classes)
            scores.append(self.score_pool3)
        zero_init_(scores)

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at stride `stride`, with the box of the image."""
        x, pools = input, []
        for stage in self.vgg:
            x = max_pool(stage(x), ceil_mode=True, backend=self.backend)
            pools.append(x)
        x = self.dropout(self.fc6(x))
        x = self.score_fr(self.dropout(self.fc7(x)))
        if self.stride <= 16:
            x = _add_cropped(self.upscore2(x), self.score_pool4(pools[3]), 5)
        if self.stride <= 8:
            x = _add_cropped(self.upscore_pool4(x), self.score_pool3(pools[2]), 9)
        return self._cropped(x, input)

    def _cropped(self, x: torch.Tensor, input: torch.Tensor) -> Scores:
        """Crop the scores to the cells that the image needs, before they are upsampled."""
        s = self.stride
        # The image starts here in the resized scores with their border of zeros.
        start = {32: 19, 16: 27, 8: 31}[s] + s // 2
        first = (2 * start + 1 - s) // (2 * s)  # the first cell that the first pixel reads
        ends = [(2 * (start + n - 1) + 1 - s) // (2 * s) + 2 for n in input.shape[-2:]]
        cells = crop(F.pad(x, (1, 1, 1, 1)), first, first, ends[0] - first, ends[1] - first)
        offset = start - first * s
        size = (s * cells.size(-2), s * cells.size(-1))
        return Scores(cells, size, Box(offset, offset, input.size(-2), input.size(-1)))


def _upsampling(num_classes: int) -> nn.ConvTranspose2d:
    """A learned x2 upsampling."""
    return bilinear_kernel_(nn.ConvTranspose2d(num_classes, num_classes, 4, 2, bias=False))


def _add_cropped(x: torch.Tensor, skip: torch.Tensor, offset: int) -> torch.Tensor:
    return x + crop(skip, offset, offset, x.size(-2), x.size(-1))


_fcn = Architecture(FCN, "Long et al. 2015", 32, ("dilated_conv2d", "interpolate", "max_pool2d"))


@_fcn.variant(parameters=134_346_581, flops=379_769_853_312, stride=32)
def fcn32s() -> None:
    """FCN-32s: scores of the last layer, upsampled 32 times."""


@_fcn.variant(parameters=134_364_410, flops=379_817_477_280, stride=16)
def fcn16s() -> None:
    """FCN-16s: FCN-32s and a skip from pool4."""


@_fcn.variant(parameters=134_376_863, flops=379_920_933_024, stride=8)
def fcn8s() -> None:
    """FCN-8s: FCN-16s and a skip from pool3."""
