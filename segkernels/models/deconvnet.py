"""Noh et al.: Learning Deconvolution Network for Semantic Segmentation, ICCV 2015."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import Backend, he_init_, op_backend, scaled, unpool
from segkernels.models._registry import Architecture
from segkernels.nn import ConvBNAct


class Deconv(nn.Module):
    """Transposed convolution with stride 1, BatchNorm and ReLU (section 3.2.2)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, padding: int) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(in_channels, out_channels, kernel, padding=padding)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, out_channels, H_out, W_out]."""
        return F.relu(self.bn(self.deconv(input)))


class DeconvNet(SegmentationModel):
    """VGG16 with fc6 and fc7, and a mirrored decoder of unpooling and deconvolution (figure 2).

    BatchNorm follows every convolution (section 4.2.1). Unpooling places values at the max-pooling
    indices of the same level. The paper classifies proposals of 224 x 224. Heights and widths of
    224 or more fit. Training needs two images or more below 256 x 256, because the output of fc7
    has one pixel there.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        width: factor on the paper's numbers of channels.
    """

    min_size = 224
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
        fc, ops = scaled(4096, width), op_backend(backend)
        self.vgg = _vgg.VGG16(in_channels, width=width, norm=True, backend=backend)
        channels = self.vgg.channels
        self.fc6 = ConvBNAct(channels[4], fc, 7, padding=0, bias=True, backend=ops)
        self.fc7 = ConvBNAct(fc, fc, 1, bias=True, backend=ops)
        self.deconv_fc6 = Deconv(fc, channels[4], 7, 0)
        stages = []
        for level in (4, 3, 2, 1, 0):
            depth, after = _vgg.STAGES[level][1], channels[max(level - 1, 0)]
            outs = [channels[level]] * (depth - 1) + [after]
            ins = [channels[level]] * depth
            stages.append(
                nn.Sequential(*(Deconv(a, b, 3, 1) for a, b in zip(ins, outs, strict=True)))
            )
        self.deconv = nn.ModuleList(stages)
        self.seg_score = nn.Conv2d(channels[0], num_classes, 1)
        he_init_(self)

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """Whether the output of fc6 has one pixel."""
        return input.size(-2) < 256 and input.size(-1) < 256

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at the size of the input."""
        x, pooled = _vgg.encode(self.vgg, input, self.backend)
        x = self.deconv_fc6(self.fc7(self.fc6(x)))
        for stage in self.deconv:
            x = stage(unpool(x, *pooled.pop(), self.backend))
        return Scores(self.seg_score(x))


_deconvnet = Architecture(
    DeconvNet, "Noh et al. 2015", 32, ("dilated_conv2d", "max_pool2d", "max_unpool2d")
)


@_deconvnet.variant(parameters=251_805_653, flops=384_531_920_896)
def deconvnet() -> None:
    """DeconvNet."""
