"""Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, CVPR 2015."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Box, Scores, SegmentationModel
from segkernels.models._blocks import (
    Backend,
    he_init_,
    max_pool,
    op_backend,
    scaled,
    zero_init_,
)
from segkernels.models._registry import register
from segkernels.nn import ConvBNAct, bilinear_kernel_

_PAPER = "Long et al. 2015"
_OPS = ("dilated_conv2d", "interpolate", "max_pool2d")


class FCN(SegmentationModel):
    """VGG16 with its fully connected layers as convolutions, and skips from pool4 and pool3.

    As in the authors' networks: the first convolution is padded by 100, pooling rounds up, and the
    scores are cropped by the fixed offsets 5 (pool4), 9 (pool3) and, at the end, 19, 27 or 31. The
    x2 upsamplings are transposed convolutions between all classes that start bilinear and are
    learned (section 3.3, 4.2); the last one is fixed bilinear. It is computed as a bilinear
    resizing of the scores with a ring of zeros around them, cropped: the same sum as that of the
    transposed convolution with a kernel of twice its stride. Score layers start at zero (section
    4.3).

    Any size fits.

    Args:
        stride: of the finest scores: 32, 16 or 8.
        num_classes: C.
        in_channels: of the images.
        width: times the paper's channels.
        dropout: after fc6 and fc7.
        backend: see `SegmentationModel`.
    """

    def __init__(
        self,
        stride: int,
        num_classes: int,
        in_channels: int,
        *,
        width: float,
        dropout: float,
        backend: Backend,
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
            self.upscore2 = _double(num_classes)
            scores.append(self.score_pool4)
        if stride <= 8:
            self.score_pool3 = nn.Conv2d(pool3, num_classes, 1)
            self.upscore_pool4 = _double(num_classes)
            scores.append(self.score_pool3)
        zero_init_(scores)

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at `stride`, and the box of the image in them."""
        x, pools = input, []
        for stage in self.vgg:
            x = max_pool(stage(x), ceil_mode=True, backend=self.backend)
            pools.append(x)
        x = self.dropout(self.fc6(x))
        x = self.score_fr(self.dropout(self.fc7(x)))
        if self.stride <= 16:
            x = _add_crop(self.upscore2(x), self.score_pool4(pools[3]), 5)
        if self.stride <= 8:
            x = _add_crop(self.upscore_pool4(x), self.score_pool3(pools[2]), 9)
        return self._boxed(x, input)

    def _boxed(self, x: torch.Tensor, input: torch.Tensor) -> Scores:
        """The part of the scores that the image needs, so that little more is upsampled."""
        s = self.stride
        start = {32: 19, 16: 27, 8: 31}[s] + s // 2  # in the resized map with its ring of zeros
        first = (2 * start + 1 - s) // (2 * s)  # the first cell that the first pixel reads
        ends = [(2 * (start + n - 1) + 1 - s) // (2 * s) + 2 for n in input.shape[-2:]]
        cells = F.pad(x, (1, 1, 1, 1))[..., first : ends[0], first : ends[1]]
        offset = start - first * s
        size = (s * cells.size(-2), s * cells.size(-1))
        return Scores(cells, size, Box(offset, offset, input.size(-2), input.size(-1)))

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load torchvision's vgg16: its convolutions, and fc6 and fc7 convolutionalised."""
        _vgg.load_vgg16(self, state_dict, self.name)


def _double(num_classes: int) -> nn.ConvTranspose2d:
    return bilinear_kernel_(nn.ConvTranspose2d(num_classes, num_classes, 4, 2, bias=False))


def _add_crop(x: torch.Tensor, skip: torch.Tensor, offset: int) -> torch.Tensor:
    return x + skip[..., offset : offset + x.size(-2), offset : offset + x.size(-1)]


@register(_PAPER, 32, _OPS)
def fcn32s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """FCN-32s: scores of the last layer, upsampled 32 times. 134,346,581 parameters.

    See `FCN` for the arguments.
    """
    return FCN(32, num_classes, in_channels, width=width, dropout=dropout, backend=backend)


@register(_PAPER, 32, _OPS)
def fcn16s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """FCN-16s: FCN-32s and a skip from pool4. 134,364,410 parameters.

    See `FCN` for the arguments.
    """
    return FCN(16, num_classes, in_channels, width=width, dropout=dropout, backend=backend)


@register(_PAPER, 32, _OPS)
def fcn8s(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """FCN-8s: FCN-16s and a skip from pool3. 134,376,863 parameters.

    See `FCN` for the arguments.
    """
    return FCN(8, num_classes, in_channels, width=width, dropout=dropout, backend=backend)
