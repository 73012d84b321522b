"""Badrinarayanan et al.: SegNet: A Deep Convolutional Encoder-Decoder Architecture, TPAMI 2017."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, max_pool_switches, op_backend, unpool
from segkernels.models._registry import register
from segkernels.nn import ConvBNAct


class SegNet(SegmentationModel):
    """VGG16's 13 convolutions, and a decoder that unpools with the encoder's positions (figure 2).

    Convolutions have biases and BatchNorm; the decoder's last one is the classifier. Sizes of 32 or
    more fit: pooling rounds down, unpooling restores the size that was pooled.

    Args:
        num_classes: C.
        in_channels: of the images.
        width: times the paper's channels.
        backend: see `SegmentationModel`.
    """

    min_size = 32

    def __init__(
        self, num_classes: int, in_channels: int, *, width: float, backend: Backend
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        ops = op_backend(backend)
        self.vgg = _vgg.VGG16(in_channels, width=width, norm=True, backend=backend)
        sizes = self.vgg.channels
        stages: list[nn.Sequential] = []
        for level in (4, 3, 2, 1, 0):
            depth, here = _vgg.STAGES[level][1], sizes[level]
            layers: list[nn.Module] = [
                ConvBNAct(here, here, bias=True, backend=ops) for _ in range(depth - 1)
            ]
            if level > 0:
                layers.append(ConvBNAct(here, sizes[level - 1], bias=True, backend=ops))
            else:
                layers.append(nn.Conv2d(here, num_classes, 3, padding=1))
            stages.append(nn.Sequential(*layers))
        self.decoder = nn.ModuleList(stages)
        he_init_(self)

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at the input's size."""
        x, pooled = input, []
        for stage in self.vgg:
            x = stage(x)
            size = (x.size(-2), x.size(-1))
            x, switches = max_pool_switches(x, self.backend)
            pooled.append((switches, size))
        for stage in self.decoder:
            x = stage(unpool(x, *pooled.pop(), self.backend))
        return Scores(x, (input.size(-2), input.size(-1)))

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load the convolutions of torchvision's vgg16_bn."""
        _vgg.load_vgg16(self, state_dict, self.name, fc=())


@register("Badrinarayanan et al. 2017", 32, ("dilated_conv2d", "max_pool2d", "max_unpool2d"))
def segnet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """SegNet. 29,449,355 parameters for 11 classes.

    See `SegNet` for the arguments and the sizes that fit.
    """
    return SegNet(num_classes, in_channels, width=width, backend=backend)
