"""Chen et al.: DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
Convolution, and Fully Connected CRFs, TPAMI 2018 (v2, 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Scores
from segkernels.models._blocks import Backend, he_init_, op_backend, scaled
from segkernels.models._crf import WithCRF
from segkernels.models._registry import Architecture
from segkernels.models._resnet import LAYERS, ResNet, load_resnet
from segkernels.models.deeplab_v1 import AtrousVGG16
from segkernels.nn import ASPP, ConvBNAct, DenseCRF

RATES = (6, 12, 18, 24)


class Branch(nn.Module):
    """fc6 with one atrous rate, fc7 and fc8 (section 3.2, figure 7)."""

    def __init__(
        self,
        in_channels: int,
        fc: int,
        num_classes: int,
        rate: int,
        dropout: float,
        backend: Backend,
    ) -> None:
        super().__init__()
        ops = op_backend(backend)
        self.fc6 = ConvBNAct(in_channels, fc, dilation=rate, norm=False, backend=ops)
        self.fc7 = ConvBNAct(fc, fc, 1, norm=False, backend=ops)
        self.fc8 = nn.Conv2d(fc, num_classes, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, num_classes, H, W]."""
        x = self.dropout(self.fc6(input))
        out: torch.Tensor = self.fc8(self.dropout(self.fc7(x)))
        return out


class DeepLabV2VGG16(WithCRF):
    """VGG16 at output stride 8, the sum of four branches at rates 6, 12, 18 and 24, and a CRF.

    Any size fits; `DeepLabV1` says which sizes align the corners.

    Args:
        num_classes, in_channels, crf, train_crf, backend: see `WithCRF`.
        width: factor on the paper's numbers of channels.
        dropout: probability after fc6 and fc7.
    """

    align_corners = True

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        crf: DenseCRF | None = None,
        train_crf: bool = False,
        width: float = 1.0,
        dropout: float = 0.5,
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(num_classes, in_channels, crf=crf, train_crf=train_crf, backend=backend)
        self.vgg = AtrousVGG16(in_channels, width=width, backend=backend)
        before, fc = self.vgg.channels[4], scaled(1024, width)
        self.branches = nn.ModuleList(
            Branch(before, fc, num_classes, rate, dropout, backend) for rate in RATES
        )
        he_init_(self)

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at stride 8."""
        x = self.vgg(input)
        out = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            out = out + branch(x)
        return Scores(out)

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load torchvision's vgg16; each branch gets its fc6 and fc7, subsampled."""
        branches = [f"branches.{i}" for i in range(len(RATES))]
        _vgg.load_vgg16(self, state_dict, branches)


class DeepLabV2ResNet(WithCRF):
    """A ResNet at output stride 8, the ASPP of DeepLab v2 as classifier, and a CRF.

    Any size fits; `DeepLabV1` says which sizes align the corners.

    Args:
        num_classes, in_channels, crf, train_crf, backend: see `WithCRF`.
        width, layers: see `ResNet`.
    """

    align_corners = True
    load_backbone = load_resnet

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        crf: DenseCRF | None = None,
        train_crf: bool = False,
        width: float = 1.0,
        layers: Sequence[int] = LAYERS[101],
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(num_classes, in_channels, crf=crf, train_crf=train_crf, backend=backend)
        self.backbone = ResNet(layers, in_channels, width, backend)
        self.classifier = ASPP(
            self.backbone.channels[3], num_classes, RATES, form="v2", backend=op_backend(backend)
        )

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at stride 8."""
        return Scores(self.classifier(self.backbone(input)[3]))


_PAPER = "Chen et al. 2016"
_OPS = ("dense_crf", "dilated_conv2d", "interpolate", "max_pool2d")


@Architecture(DeepLabV2VGG16, _PAPER, 8, _OPS).variant(parameters=37_877_652, flops=403_912_101_248)
def deeplab_v2_vgg16() -> None:
    """DeepLab v2 on VGG16 (ASPP-L)."""


@Architecture(DeepLabV2ResNet, _PAPER, 8, ("aspp", *_OPS)).variant(
    parameters=44_048_532, flops=378_585_221_504
)
def deeplab_v2_resnet101() -> None:
    """DeepLab v2 on ResNet-101."""
