"""Chen et al.: Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation.

ECCV 2018 (DeepLab v3+).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, op_backend, resize, scaled
from segkernels.models._registry import register
from segkernels.models._resnet import LAYERS, ResNetModel
from segkernels.models.deeplab_v3 import RATES
from segkernels.nn import ASPP, ConvBNAct


class DeepLabV3Plus(ResNetModel):
    """DeepLab v3 as encoder, and a decoder that refines its output with layer1's (figure 2).

    The decoder: 48 channels of layer1, the encoder's 256 upsampled to them, two 3x3 convolutions
    (section 3.1, tables 1 and 2). Dense convolutions, not separable ones. The scores, at stride 4,
    and the encoder's output are upsampled with aligned corners, as in the authors' code. Any size
    fits. Training needs two images or more: the pooled image has one pixel.

    Args:
        layers: see `ResNetModel`; and so the rest.
        num_classes: C.
        in_channels: of the images.
        output_stride: of the encoder: 16, or 8 with twice the rates.
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
        output_stride: int,
        width: float,
        backend: Backend,
    ) -> None:
        if output_stride not in RATES:
            raise ValueError(f"deeplab_v3plus: output_stride must be 8 or 16, got {output_stride}")
        super().__init__(
            layers,
            num_classes,
            in_channels,
            width=width,
            output_stride=output_stride,
            backend=backend,
        )
        inner, low, ops = scaled(256, width), scaled(48, width), op_backend(backend)
        channels = self.backbone.channels
        self.aspp = ASPP(channels[3], inner, RATES[output_stride], backend=ops)
        self.low_level = ConvBNAct(channels[0], low, 1, backend=ops)
        self.classifier = nn.Sequential(
            ConvBNAct(inner + low, inner, backend=ops),
            ConvBNAct(inner, inner, backend=ops),
            nn.Conv2d(inner, num_classes, 1),
        )

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """The pooled image."""
        return True

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at stride 4."""
        found = self.backbone(input)
        low = self.low_level(found[0])
        x = resize(self.aspp(found[3]), (low.size(-2), low.size(-1)), True, self.backend)
        x = self.classifier(torch.cat([x, low], dim=1))
        return Scores(x, (input.size(-2), input.size(-1)))


@register("Chen et al. 2018", 16, ("aspp", "dilated_conv2d", "interpolate", "max_pool2d"))
def deeplab_v3plus_resnet101(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    output_stride: int = 16,
    width: float = 1.0,
    layers: Sequence[int] = LAYERS[101],
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """DeepLab v3+ on ResNet-101. 59,344,309 parameters.

    See `DeepLabV3Plus` for the arguments.
    """
    return DeepLabV3Plus(
        layers,
        num_classes,
        in_channels,
        output_stride=output_stride,
        width=width,
        backend=backend,
    )
