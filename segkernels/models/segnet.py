"""Badrinarayanan et al.: SegNet: A Deep Convolutional Encoder-Decoder Architecture, TPAMI 2017."""

from __future__ import annotations

import torch
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, op_backend, unpool
from segkernels.models._registry import Architecture
from segkernels.nn import ConvBNAct


class SegNet(SegmentationModel):
    """The 13 convolutions of VGG16, and a decoder with max unpooling (figure 2).

    The unpooling takes the max-pooling indices of the encoder. Convolutions have biases and
    BatchNorm; the last one of the decoder is the classifier. The model has 29,449,355 parameters
    for 11 classes. Sizes of 32 or more fit: pooling rounds down, and unpooling restores the size
    before it.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        width: factor on the paper's numbers of channels.
    """

    min_size = 32
    load_backbone = _vgg.load_vgg16

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        backend: Backend = "segkernels",
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        ops = op_backend(backend)
        self.vgg = _vgg.VGG16(in_channels, width=width, norm=True, backend=backend)
        channels = self.vgg.channels
        stages: list[nn.Sequential] = []
        for level in (4, 3, 2, 1, 0):
            depth, here = _vgg.STAGES[level][1], channels[level]
            layers: list[nn.Module] = [
                ConvBNAct(here, here, bias=True, backend=ops) for _ in range(depth - 1)
            ]
            if level > 0:
                layers.append(ConvBNAct(here, channels[level - 1], bias=True, backend=ops))
            else:
                layers.append(nn.Conv2d(here, num_classes, 3, padding=1))
            stages.append(nn.Sequential(*layers))
        self.decoder = nn.ModuleList(stages)
        he_init_(self)

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at the size of the input."""
        x, pooled = _vgg.encode(self.vgg, input, self.backend)
        for stage in self.decoder:
            x = stage(unpool(x, *pooled.pop(), self.backend))
        return Scores(x)


_segnet = Architecture(
    SegNet, "Badrinarayanan et al. 2017", 32, ("dilated_conv2d", "max_pool2d", "max_unpool2d")
)


@_segnet.variant(parameters=29_455_125, flops=326_328_560_640)
def segnet() -> None:
    """SegNet."""
