"""Chen et al.: Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs.

ICLR 2015 (DeepLab, later called v1).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Scores
from segkernels.models._blocks import Backend, he_init_, max_pool, op_backend, scaled
from segkernels.models._crf import WithCRF
from segkernels.models._registry import Architecture
from segkernels.nn import ConvBNAct, DenseCRF

Field = Literal["large_fov", "4x4", "7x7"]
# Kernel, dilation and channels of fc6 (section 4.2, table 2).
_FC6 = {"large_fov": (3, 12, 1024), "4x4": (4, 4, 4096), "7x7": (7, 4, 4096)}


class AtrousVGG16(_vgg.VGG16):
    """VGG16 at output stride 8: 3x3 max pooling, with stride 1 in the last two.

    The convolutions after pool4 have a dilation of 2 ("holes", section 3.1).
    """

    def __init__(self, in_channels: int, *, width: float, backend: Backend) -> None:
        super().__init__(in_channels, width=width, dilation=(1, 1, 1, 1, 2), backend=backend)
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, 512, ceil(H / 8), ceil(W / 8)]."""
        x = input
        for number, stage in enumerate(self):
            x = max_pool(stage(x), 3, 2 if number < 3 else 1, 1, backend=self.backend)
        return x


class DeepLabV1(WithCRF):
    """VGG16 at output stride 8, fc6 with a large field of view, bilinear upsampling, and a CRF.

    The poolings, the average pooling after pool5 and the aligned corners are those of the LargeFOV
    network that the authors released. Any size fits; with sizes of 8 k + 1 (321, 513) the corner
    scores lie on the corner pixels.

    Args:
        num_classes, in_channels, crf, train_crf, backend: see `WithCRF`.
        field: kernel of fc6. "large_fov": 3x3, dilation 12, 1024 channels; "4x4" (65,140,565
            parameters in all) and "7x7" (134,346,581): dilation 4, 4096 channels.
        width: factor on the paper's numbers of channels.
        dropout: probability after fc6 and fc7.
    """

    align_corners = True
    load_backbone = _vgg.load_vgg16_with_fc

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        field: Field = "large_fov",
        crf: DenseCRF | None = None,
        train_crf: bool = False,
        width: float = 1.0,
        dropout: float = 0.5,
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(num_classes, in_channels, crf=crf, train_crf=train_crf, backend=backend)
        if field not in _FC6:
            raise ValueError(f"deeplab_v1: field must be one of {', '.join(_FC6)}, got {field!r}")
        kernel, rate, channels = _FC6[field]
        fc, ops = scaled(channels, width), op_backend(backend)
        self.vgg = AtrousVGG16(in_channels, width=width, backend=backend)
        before, pad = self.vgg.channels[4], (kernel - 1) * rate // 2
        self.fc6 = ConvBNAct(
            before, fc, kernel, padding=pad, dilation=rate, norm=False, backend=ops
        )
        self.fc7 = ConvBNAct(fc, fc, 1, norm=False, backend=ops)
        self.dropout = nn.Dropout(dropout)
        self.fc8 = nn.Conv2d(fc, num_classes, 1)
        he_init_(self)

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at stride 8."""
        x = F.avg_pool2d(self.vgg(input), 3, 1, 1)
        x = self.dropout(self.fc6(x))
        return Scores(self.fc8(self.dropout(self.fc7(x))))


_deeplab_v1 = Architecture(
    DeepLabV1, "Chen et al. 2015", 8, ("dense_crf", "dilated_conv2d", "interpolate", "max_pool2d")
)


@_deeplab_v1.variant(parameters=20_505_429, flops=257_169_266_048)
def deeplab_v1() -> None:
    """DeepLab-LargeFOV."""
