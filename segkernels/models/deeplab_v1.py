"""Chen et al.: Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs.

ICLR 2015 (DeepLab, later called v1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, max_pool, op_backend, scaled
from segkernels.models._crf import WithCRF
from segkernels.models._registry import register
from segkernels.nn import ConvBNAct, DenseCRF

Field = Literal["large_fov", "4x4", "7x7"]
# Kernel, dilation and channels of fc6 (section 4.2, table 2).
_FC6 = {"large_fov": (3, 12, 1024), "4x4": (4, 4, 4096), "7x7": (7, 4, 4096)}


class AtrousVGG16(_vgg.VGG16):
    """VGG16 at output stride 8 as DeepLab has it: 3x3 poolings, the last two without stride.

    The convolutions after pool4 are dilated by 2 ("holes", section 3.1).
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
    """VGG16 at output stride 8, fc6 with a large field of view, bilinear upsampling, CRF.

    The poolings, the average pooling after pool5 and the corners of the upsampling are those of the
    authors' released LargeFOV network. Any size fits; at 8 k + 1 (321, 513) the scores of the
    corners fall on the corner pixels.

    Args:
        num_classes: C.
        in_channels: of the images.
        field: fc6: "large_fov" 3x3 at dilation 12 with 1024 channels, or "4x4" or "7x7" at
            dilation 4 with 4096.
        crf: see `WithCRF`; and so `train_crf`.
        train_crf: whether training goes through the CRF.
        width: times the paper's channels.
        dropout: after fc6 and fc7.
        backend: see `SegmentationModel`.
    """

    align_corners = True

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        field: Field,
        crf: DenseCRF | None,
        train_crf: bool,
        width: float,
        dropout: float,
        backend: Backend,
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
        x = self.fc8(self.dropout(self.fc7(x)))
        return Scores(x, (input.size(-2), input.size(-1)))

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load torchvision's vgg16: its convolutions, and fc6 and fc7 subsampled (section 3.1)."""
        _vgg.load_vgg16(self, state_dict, self.name)


@register("Chen et al. 2015", 8, ("dense_crf", "dilated_conv2d", "interpolate", "max_pool2d"))
def deeplab_v1(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    field: Field = "large_fov",
    crf: DenseCRF | None = None,
    train_crf: bool = False,
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """DeepLab-LargeFOV. 20,505,429 parameters; "4x4" 65,140,565; "7x7" 134,346,581.

    See `DeepLabV1` for the arguments.
    """
    return DeepLabV1(
        num_classes,
        in_channels,
        field=field,
        crf=crf,
        train_crf=train_crf,
        width=width,
        dropout=dropout,
        backend=backend,
    )
