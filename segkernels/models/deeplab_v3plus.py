"""Chen et al.: Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation.

ECCV 2018 (DeepLab v3+).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from segkernels.models._base import Scores
from segkernels.models._blocks import Backend, op_backend, resize, scaled, spatial_size
from segkernels.models._registry import Architecture
from segkernels.models._resnet import LAYERS, ResNetModel
from segkernels.models.deeplab_v3 import RATES
from segkernels.nn import ASPP, ConvBNAct


class DeepLabV3Plus(ResNetModel):
    """DeepLab v3 as encoder, and a decoder that also reads the output of layer1 (figure 2).

    The decoder reduces the output of layer1 to 48 channels, upsamples the encoder's 256 channels to
    its size, and applies two 3x3 convolutions to both (section 3.1, tables 1 and 2). The
    convolutions are standard ones, not separable ones. The encoder's output and the scores, which
    have stride 4, are upsampled with aligned corners, as in the authors' code. Any size fits.
    Training needs two images or more, because image pooling leaves one pixel.

    Args:
        num_classes, in_channels, width, layers, backend: see `ResNetModel`.
        output_stride: of the encoder: 16, or 8 with twice the atrous rates.
    """

    align_corners = True

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        output_stride: int = 16,
        width: float = 1.0,
        layers: Sequence[int] = LAYERS[101],
        backend: Backend = "segkernels",
    ) -> None:
        if output_stride not in RATES:
            raise ValueError(f"deeplab_v3plus: output_stride must be 8 or 16, got {output_stride}")
        super().__init__(
            num_classes, in_channels, layers, width, backend, output_stride=output_stride
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
        """True: image pooling gives one."""
        return True

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at stride 4."""
        maps = self.backbone(input)
        low = self.low_level(maps[0])
        x = resize(self.aspp(maps[3]), spatial_size(low), True, self.backend)
        return Scores(self.classifier(torch.cat([x, low], dim=1)))


_deeplab_v3plus = Architecture(
    DeepLabV3Plus, "Chen et al. 2018", 16, ("aspp", "dilated_conv2d", "interpolate", "max_pool2d")
)


@_deeplab_v3plus.variant(parameters=59_344_309, flops=185_640_727_424)
def deeplab_v3plus_resnet101() -> None:
    """DeepLab v3+ on ResNet-101."""
