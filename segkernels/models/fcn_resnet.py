"""FCN on a dilated ResNet, as in torchvision: Long et al. 2015, He et al. 2016."""

from __future__ import annotations

from collections.abc import Sequence

from segkernels.models._blocks import Backend, FCNHead
from segkernels.models._registry import Architecture
from segkernels.models._resnet import LAYERS, ResNetModel


class FCNResNet(ResNetModel):
    """A ResNet at output stride 8, a 3x3 and a 1x1 convolution, bilinear upsampling.

    The model loads the state dicts of torchvision's fcn_resnet50 and fcn_resnet101, and gives the
    same output. A state dict with ``aux_classifier`` needs ``aux_loss=True``. Any size fits.

    Args:
        num_classes, in_channels, aux_loss, width, layers, backend: see `ResNetModel`.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        aux_loss: bool = False,
        width: float = 1.0,
        layers: Sequence[int] = LAYERS[50],
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(num_classes, in_channels, layers, width, backend, aux_loss=aux_loss)
        self.classifier = FCNHead(self.backbone.channels[3], num_classes, backend)


_fcn_resnet = Architecture(
    FCNResNet,
    "Long et al. 2015, He et al. 2016",
    8,
    ("dilated_conv2d", "interpolate", "max_pool2d"),
)


@_fcn_resnet.variant(parameters=32_957_013, flops=285_295_058_304)
def fcn_resnet50() -> None:
    """FCN on ResNet-50."""


@_fcn_resnet.variant(parameters=51_949_141, flops=445_337_247_104, defaults={"layers": LAYERS[101]})
def fcn_resnet101() -> None:
    """FCN on ResNet-101."""
