"""FCN on a dilated ResNet, as torchvision has it: Long et al. 2015, He et al. 2016."""

from __future__ import annotations

from collections.abc import Sequence

from segkernels.models._base import SegmentationModel
from segkernels.models._blocks import Backend, FCNHead
from segkernels.models._registry import register
from segkernels.models._resnet import LAYERS, ResNetModel

_PAPER = "Long et al. 2015, He et al. 2016"
_OPS = ("dilated_conv2d", "interpolate", "max_pool2d")


class FCNResNet(ResNetModel):
    """A ResNet at output stride 8, a 3x3 and a 1x1 convolution, bilinear upsampling.

    Loads the state dicts of torchvision's fcn_resnet50 and fcn_resnet101 (built with
    `aux_loss=True` where they have ``aux_classifier``) and gives the same output. Any size fits.

    Args: see `ResNetModel`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int,
        in_channels: int,
        *,
        width: float,
        aux_loss: bool,
        backend: Backend,
    ) -> None:
        super().__init__(
            layers,
            num_classes,
            in_channels,
            width=width,
            output_stride=8,
            aux_loss=aux_loss,
            backend=backend,
        )
        self.classifier = FCNHead(self.backbone.channels[3], num_classes, backend)


@register(_PAPER, 8, _OPS)
def fcn_resnet50(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    aux_loss: bool = False,
    width: float = 1.0,
    layers: Sequence[int] = LAYERS[50],
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """FCN on ResNet-50. 32,957,013 parameters; with `aux_loss` 35,322,218.

    See `FCNResNet` for the arguments.
    """
    return FCNResNet(
        layers, num_classes, in_channels, width=width, aux_loss=aux_loss, backend=backend
    )


@register(_PAPER, 8, _OPS)
def fcn_resnet101(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    aux_loss: bool = False,
    width: float = 1.0,
    layers: Sequence[int] = LAYERS[101],
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """FCN on ResNet-101. 51,949,141 parameters; with `aux_loss` 54,314,346.

    See `FCNResNet` for the arguments.
    """
    return FCNResNet(
        layers, num_classes, in_channels, width=width, aux_loss=aux_loss, backend=backend
    )
