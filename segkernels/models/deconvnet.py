"""Noh et al.: Learning Deconvolution Network for Semantic Segmentation, ICCV 2015."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models import _vgg
from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import (
    Backend,
    he_init_,
    max_pool_switches,
    op_backend,
    scaled,
    unpool,
)
from segkernels.models._registry import register
from segkernels.nn import ConvBNAct


class Deconv(nn.Module):
    """Transposed convolution without stride, BatchNorm, ReLU (section 3.2.2)."""

    def __init__(self, before: int, after: int, kernel: int, padding: int) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(before, after, kernel, padding=padding)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, before, H, W] to [N, after, ..]."""
        return F.relu(self.bn(self.deconv(input)))


class DeconvNet(SegmentationModel):
    """VGG16 down to fc7, and its mirror image of unpoolings and deconvolutions (figure 2).

    BatchNorm after every convolution (section 4.2.1); unpooling puts values back where the pooling
    of the same level found them. The paper classifies proposals of 224x224; heights and widths of
    224 or more fit. At less than 256 x 256 fc7's map is one pixel, so training needs two images.

    Args:
        num_classes: C.
        in_channels: of the images.
        width: times the paper's channels.
        backend: see `SegmentationModel`.
    """

    min_size = 224

    def __init__(
        self, num_classes: int, in_channels: int, *, width: float, backend: Backend
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        fc, ops = scaled(4096, width), op_backend(backend)
        self.vgg = _vgg.VGG16(in_channels, width=width, norm=True, backend=backend)
        sizes = self.vgg.channels
        self.fc6 = ConvBNAct(sizes[4], fc, 7, padding=0, bias=True, backend=ops)
        self.fc7 = ConvBNAct(fc, fc, 1, bias=True, backend=ops)
        self.deconv_fc6 = Deconv(fc, sizes[4], 7, 0)
        stages = []
        for level in (4, 3, 2, 1, 0):
            depth, after = _vgg.STAGES[level][1], sizes[max(level - 1, 0)]
            outs = [sizes[level]] * (depth - 1) + [after]
            ins = [sizes[level]] * depth
            stages.append(
                nn.Sequential(*(Deconv(a, b, 3, 1) for a, b in zip(ins, outs, strict=True)))
            )
        self.deconv = nn.ModuleList(stages)
        self.seg_score = nn.Conv2d(sizes[0], num_classes, 1)
        he_init_(self)

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """Whether fc6 gives one."""
        return input.size(-2) < 256 and input.size(-1) < 256

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores at the input's size."""
        x, pooled = input, []
        for stage in self.vgg:
            x = stage(x)
            size = (x.size(-2), x.size(-1))
            x, switches = max_pool_switches(x, self.backend)
            pooled.append((switches, size))
        x = self.deconv_fc6(self.fc7(self.fc6(x)))
        for stage in self.deconv:
            x = stage(unpool(x, *pooled.pop(), self.backend))
        return Scores(self.seg_score(x), (input.size(-2), input.size(-1)))

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load the convolutions of torchvision's vgg16_bn."""
        _vgg.load_vgg16(self, state_dict, self.name, fc=())


@register("Noh et al. 2015", 32, ("dilated_conv2d", "max_pool2d", "max_unpool2d"))
def deconvnet(
    num_classes: int = 21,
    in_channels: int = 3,
    *,
    width: float = 1.0,
    backend: Backend = "segkernels",
) -> SegmentationModel:
    """DeconvNet. 251,805,653 parameters.

    See `DeconvNet` for the arguments and the sizes that fit.
    """
    return DeconvNet(num_classes, in_channels, width=width, backend=backend)
