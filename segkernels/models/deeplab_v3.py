"""Chen et al.: Rethinking Atrous Convolution for Semantic Image Segmentation, 2017."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from segkernels.models._blocks import Backend, conv_norm, op_backend, scaled
from segkernels.models._registry import Architecture
from segkernels.models._resnet import LAYERS, ResNetModel
from segkernels.nn import ASPP, conv_bn_act

# Atrous rates of the ASPP for each output stride (section 4.1.2).
RATES = {8: (12, 24, 36), 16: (6, 12, 18)}


class DeepLabHead(nn.Sequential):
    """ASPP, 3x3 convolution, BatchNorm, ReLU and 1x1 convolution, named as in torchvision."""

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
        x = conv_bn_act(self[0](input), *conv_norm(self, 1), backend=self.op_backend)
        out: torch.Tensor = self[4](x)
        return out


class DeepLabV3(ResNetModel):
    """A dilated ResNet, atrous spatial pyramid pooling with image pooling, bilinear upsampling.

    The model loads the state dicts of torchvision's deeplabv3_resnet50 and deeplabv3_resnet101, and
    gives the same output. A state dict with ``aux_classifier`` needs ``aux_loss=True``. Any size
    fits. Training needs two images or more, because image pooling leaves one pixel.

    Args:
        num_classes, in_channels, aux_loss, width, layers, backend: see `ResNetModel`.
        output_stride: 8, or 16 with half the atrous rates.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        output_stride: int = 8,
        aux_loss: bool = False,
        width: float = 1.0,
        layers: Sequence[int] = LAYERS[50],
        backend: Backend = "segkernels",
    ) -> None:
        if output_stride not in RATES:
            raise ValueError(f"deeplab_v3: output_stride must be 8 or 16, got {output_stride}")
        super().__init__(
            num_classes,
            in_channels,
            layers,
            width,
            backend,
            output_stride=output_stride,
            aux_loss=aux_loss,
        )
        self.classifier = DeepLabHead(
            self.backbone.channels[3], num_classes, RATES[output_stride], width, backend
        )

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """True: image pooling gives one."""
        return True


_deeplab_v3 = Architecture(
    DeepLabV3, "Chen et al. 2017", 8, ("aspp", "dilated_conv2d", "interpolate", "max_pool2d")
)


@_deeplab_v3.variant(parameters=39_638_869, flops=337_305_924_480)
def deeplab_v3_resnet50() -> None:
    """DeepLab v3 on ResNet-50."""


@_deeplab_v3.variant(parameters=58_630_997, flops=497_348_113_280, defaults={"layers": LAYERS[101]})
def deeplab_v3_resnet101() -> None:
    """DeepLab v3 on ResNet-101."""
