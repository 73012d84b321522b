"""Chen et al.: DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
Convolution, and Fully Connected CRFs, TPAMI 2018 (v2, 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, load_parts, op_backend, scaled
from segkernels.models._crf import WithCRF
from segkernels.models._registry import register
from segkernels.models._resnet import LAYERS, ResNet
from segkernels.models.deeplab_v1 import AtrousVGG16
from segkernels.nn import ASPP, ConvBNAct, DenseCRF

_PAPER = "Chen et al. 2016"
_OPS = ("dense_crf", "dilated_conv2d", "interpolate", "max_pool2d")
RATES = (6, 12, 18, 24)


class Branch(nn.Module):
    """fc6 at one rate, fc7 and fc8: a field of view of its own (section 3.2, figure 7)."""

    def __init__(
        self, before: int, fc: int, num_classes: int, rate: int, dropout: float, backend: Backend
    ) -> None:
        super().__init__()
        ops = op_backend(backend)
        self.fc6 = ConvBNAct(before, fc, dilation=rate, norm=False, backend=ops)
        self.fc7 = ConvBNAct(fc, fc, 1, norm=False, backend=ops)
        self.fc8 = nn.Conv2d(fc, num_classes, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, before, H, W] to [N, num_classes, H, W]."""
        x = self.dropout(self.fc6(input))
        out: torch.Tensor = self.fc8(self.dropout(self.fc7(x)))
        return out


class DeepLabV2VGG16(WithCRF):
    """VGG16 at output stride 8 and four branches at rates 6, 12, 18 and 24, summed; CRF.

    Any size fits; as `DeepLabV1`.

    Args:
        num_classes: C.
        in_channels: of the images.
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
        crf: DenseCRF | None,
        train_crf: bool,
        width: float,
        dropout: float,
        backend: Backend,
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
        return Scores(out, (input.size(-2), input.size(-1)))

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load torchvision's vgg16; fc6 and fc7 of each branch are its subsampled ones."""
        branches = [f"branches.{i}" for i in range(len(RATES))]
        _vgg.load_vgg16(self, state_dict, self.name, branches)


class DeepLabV2ResNet(WithCRF):
    """A ResNet at output stride 8 and atrous spatial pyramid pooling to the classes, summed; CRF.

    Any size fits; as `DeepLabV1`.

    Args:
        layers: blocks in each of the ResNet's layers.
        num_classes: C.
        in_channels: of the images.
        crf: see `WithCRF`; and so `train_crf`.
        train_crf: whether training goes through the CRF.
        width: times the paper's channels.
        backend: see `SegmentationModel`.
    """

    align_corners = True

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int,
        in_channels: int,
        *,
        crf: DenseCRF | None,
        train_crf: bool,
        width: float,
        backend: Backend,
    ) -> None:
        super().__init__(num_classes, in_channels, crf=crf, train_crf=train_crf, backend=backend)
        self.backbone = ResNet(layers, in_channels, width=width, backend=backend)
        self.classifier = ASPP(
            self.backbone.channels[3], num_classes, RATES, form="v2", backend=op_backend(backend)
        )

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at stride 8."""
        x = self.classifier(self.backbone(input)[3])
        return Scores(x, (input.size(-2), input.size(-1)))

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load torchvision's ResNet of the same depth, without its ``fc``."""
        body = {f"backbone.{k}": v for k, v in state_dict.items() if not k.startswith("fc.")}
        load_parts(self, body, ["backbone"], self.name)


@register(_PAPER, 8, _OPS)
def deeplab_v2_vgg16(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    crf: DenseCRF | None = None,
    train_crf: bool = False,
    width: float = 1.0,
    dropout: float = 0.5,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """DeepLab v2 on VGG16 (ASPP-L). 37,877,652 parameters.

    See `DeepLabV2VGG16` for the arguments.
    """
    return DeepLabV2VGG16(
        num_classes,
        in_channels,
        crf=crf,
        train_crf=train_crf,
        width=width,
        dropout=dropout,
        backend=backend,
    )


@register(_PAPER, 8, ("aspp", *_OPS))
def deeplab_v2_resnet101(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    crf: DenseCRF | None = None,
    train_crf: bool = False,
    width: float = 1.0,
    layers: Sequence[int] = LAYERS[101],
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """DeepLab v2 on ResNet-101. 44,048,532 parameters.

    See `DeepLabV2ResNet` for the arguments.
    """
    return DeepLabV2ResNet(
        layers,
        num_classes,
        in_channels,
        crf=crf,
        train_crf=train_crf,
        width=width,
        backend=backend,
    )
