"""ResNet with bottlenecks and an output stride, with torchvision's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import (
    Backend,
    FCNHead,
    load_parts,
    max_pool,
    op_backend,
    scaled,
)
from segkernels.nn import conv_bn_act

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
Stem = Literal["7x7", "deep"]


def _conv(before: int, after: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        before, after, kernel, stride, kernel // 2 * dilation, dilation=dilation, bias=False
    )


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as torchvision has it), 1x1, and the identity."""

    def __init__(
        self, before: int, planes: int, stride: int, dilation: int, shortcut: bool, backend: Backend
    ) -> None:
        super().__init__()
        after = 4 * planes
        self.conv1, self.bn1 = _conv(before, planes, 1), nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride, dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, after, 1), nn.BatchNorm2d(after)
        self.downsample = (
            nn.Sequential(_conv(before, after, 1, stride), nn.BatchNorm2d(after))
            if shortcut
            else None
        )
        self.op_backend = op_backend(backend)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, before, H, W] to [N, 4 planes, H / stride, W / stride]."""
        backend = self.op_backend
        x = conv_bn_act(input, self.conv1, self.bn1, backend=backend)
        x = conv_bn_act(x, self.conv2, self.bn2, backend=backend)
        identity = input
        if self.downsample is not None:
            conv, norm = self.downsample[0], self.downsample[1]
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            identity = conv_bn_act(input, conv, norm, activation=None, backend=backend)
        return conv_bn_act(x, self.conv3, self.bn3, residual=identity, backend=backend)


class ResNet(nn.Module):
    """The convolutions of a ResNet; `forward` returns the outputs of its four layers.

    Where the output stride is below 32, the last layers have no stride and the convolutions after
    it are dilated so much more, as torchvision's `replace_stride_with_dilation` does.

    Args:
        layers: blocks in each of the four layers; `LAYERS` has those of 50 and 101.
        in_channels: of the images.
        width: times the paper's channels.
        output_stride: 8, 16 or 32.
        stem: the first layers: one 7x7 convolution, or three of 3x3 ("deep", as in PSPNet's code).
        backend: of the convolutions and the pooling.

    Source: He et al.: Deep Residual Learning for Image Recognition, CVPR 2016, table 1.
    """

    def __init__(
        self,
        layers: Sequence[int],
        in_channels: int,
        *,
        width: float = 1.0,
        output_stride: int = 8,
        stem: Stem = "7x7",
        backend: Backend,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"ResNet: output_stride must be 8, 16 or 32, got {output_stride}")
        if stem not in ("7x7", "deep"):
            raise ValueError(f'ResNet: stem must be "7x7" or "deep", got {stem!r}')
        self.backend = backend
        planes = [scaled(64 * 2**i, width) for i in range(4)]
        self.channels = [4 * p for p in planes]
        before = planes[0]
        if stem == "7x7":
            self.conv1, self.bn1 = _conv(in_channels, before, 7, 2), nn.BatchNorm2d(before)
        else:
            self.conv1, self.bn1 = _conv(in_channels, before, 3, 2), nn.BatchNorm2d(before)
            self.conv2, self.bn2 = _conv(before, before, 3), nn.BatchNorm2d(before)
            self.conv3, self.bn3 = _conv(before, 2 * before, 3), nn.BatchNorm2d(2 * before)
            before *= 2
        self.stem = stem
        stride_so_far, dilation = 4, 1
        for i in range(4):
            first_dilation, stride = dilation, 1 if i == 0 else 2
            if stride_so_far * stride > output_stride:
                stride, dilation = 1, dilation * 2
            stride_so_far *= stride
            blocks = []
            for j in range(layers[i]):
                # The first block keeps the sampling that a trained network's weights expect.
                rate = first_dilation if j == 0 else dilation
                step = stride if j == 0 else 1
                blocks.append(Bottleneck(before, planes[i], step, rate, j == 0, backend))
                before = self.channels[i]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, input: torch.Tensor) -> list[torch.Tensor]:
        """[N, in_channels, H, W] to the outputs of layer1 to layer4."""
        backend = op_backend(self.backend)
        x = conv_bn_act(input, self.conv1, self.bn1, backend=backend)
        if self.stem == "deep":
            x = conv_bn_act(x, self.conv2, self.bn2, backend=backend)
            x = conv_bn_act(x, self.conv3, self.bn3, backend=backend)
        x = max_pool(x, 3, 2, 1, backend=self.backend)
        found = []
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
            found.append(x)
        return found


class ResNetModel(SegmentationModel):
    """A ResNet and a classifier of its last layer; `classifier` is set by the subclass.

    The names are torchvision's: ``backbone``, ``classifier`` and ``aux_classifier``.

    Args:
        layers: see `ResNet`; and so width, output_stride, stem and backend.
        num_classes: C.
        in_channels: of the images.
        width: times the paper's channels.
        output_stride: 8, 16 or 32.
        stem: the first layers.
        aux_loss: whether an `FCNHead` classifies the output of layer3 too.
        backend: see `SegmentationModel`.
    """

    classifier: nn.Module

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int,
        in_channels: int,
        *,
        width: float,
        output_stride: int,
        stem: Stem = "7x7",
        aux_loss: bool = False,
        backend: Backend,
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        self.backbone = ResNet(
            layers,
            in_channels,
            width=width,
            output_stride=output_stride,
            stem=stem,
            backend=backend,
        )
        self.aux_classifier = (
            FCNHead(self.backbone.channels[2], num_classes, backend) if aux_loss else None
        )

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores of layer4 and, with an auxiliary head, of layer3, to be resized to the input."""
        found = self.backbone(input)
        # The classifier first, as torchvision does: the order in which dropout draws.
        out = self.classifier(found[3])
        aux = self.aux_classifier(found[2]) if self.aux_classifier is not None else None
        return Scores(out, (input.size(-2), input.size(-1)), aux=aux)

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load torchvision's ResNet of the same depth, without its ``fc``."""
        body = {f"backbone.{k}": v for k, v in state_dict.items() if not k.startswith("fc.")}
        load_parts(self, body, ["backbone"], self.name)
