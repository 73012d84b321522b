"""Chen et al.: Rethinking Atrous Convolution for Semantic Image Segmentation, 2017."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from segkernels.models._base import SegmentationModel
from segkernels.models._blocks import Backend, op_backend, scaled
from segkernels.models._registry import register
from segkernels.models._resnet import LAYERS, ResNetModel
from segkernels.nn import ASPP, conv_bn_act

_PAPER = "Chen et al. 2017"
_OPS = ("aspp", "dilated_conv2d", "interpolate", "max_pool2d")
# Rates of the pyramid at each output stride (section 4.1.2).
RATES = {8: (12, 24, 36), 16: (6, 12, 18)}


class DeepLabHead(nn.Sequential):
    """ASPP, 3x3 convolution, BatchNorm, ReLU, 1x1 convolution, with torchvision's names."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        rates: Sequence[int],
        width: float,
        backend: Backend,
    ) -> None:
        inner, ops = scaled(256, width), op_backend(backend)
        super().__init__(
            ASPP(in_channels, inner, rates, backend=ops),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, num_classes, 1),
        )
        self.op_backend = ops

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, num_classes, H, W]."""
        conv, norm = self[1], self[2]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        x = conv_bn_act(self[0](input), conv, norm, backend=self.op_backend)
        out: torch.Tensor = self[4](x)
        return out


class DeepLabV3(ResNetModel):
    """A dilated ResNet, atrous spatial pyramid pooling with image pooling, bilinear upsampling.

    Loads the state dicts of torchvision's deeplabv3_resnet50 and deeplabv3_resnet101 (built with
    `aux_loss=True` where they have ``aux_classifier``) and gives the same output. Any size fits.
    Training needs two images or more: the pooled image has one pixel.

    Args:
        output_stride: 8, or 16 with half the rates.
        layers: see `ResNetModel`; and so the rest.
        num_classes: C.
        in_channels: of the images.
        aux_loss: whether layer3 is classified too.
        width: times the paper's channels.
        backend: see `SegmentationModel`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int,
        in_channels: int,
        *,
        output_stride: int,
        aux_loss: bool,
        width: float,
        backend: Backend,
    ) -> None:
        if output_stride not in RATES:
            raise ValueError(f"deeplab_v3: output_stride must be 8 or 16, got {output_stride}")
        super().__init__(
            layers,
            num_classes,
            in_channels,
            width=width,
            output_stride=output_stride,
            aux_loss=aux_loss,
            backend=backend,
        )
        self.classifier = DeepLabHead(
            self.backbone.channels[3], num_classes, RATES[output_stride], width, backend
        )

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """The pooled image."""
        return True


@register(_PAPER, 8, _OPS)
def deeplab_v3_resnet50(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    output_stride: int = 8,
    aux_loss: bool = False,
    width: float = 1.0,
    layers: Sequence[int] = LAYERS[50],
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """DeepLab v3 on ResNet-50. 39,638,869 parameters; with `aux_loss` 42,004,074.

    See `DeepLabV3` for the arguments.
    """
    return DeepLabV3(
        layers,
        num_classes,
        in_channels,
        output_stride=output_stride,
        aux_loss=aux_loss,
        width=width,
        backend=backend,
    )


@register(_PAPER, 8, _OPS)
def deeplab_v3_resnet101(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    output_stride: int = 8,
    aux_loss: bool = False,
    width: float = 1.0,
    layers: Sequence[int] = LAYERS[101],
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """DeepLab v3 on ResNet-101. 58,630,997 parameters; with `aux_loss` 60,996,202.

    See `DeepLabV3` for the arguments.
    """
    return DeepLabV3(
        layers,
        num_classes,
        in_channels,
        output_stride=output_stride,
        aux_loss=aux_loss,
        width=width,
        backend=backend,
    )
