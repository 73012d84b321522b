"""ResNets with a chosen output stride; their parameters have torchvision's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from segkernels.models._base import Scores, SegmentationModel
from segkernels.models._blocks import (
    Backend,
    FCNHead,
    conv_norm,
    max_pool,
    op_backend,
    scaled,
)
from segkernels.models._weights import load_parts, plain
from segkernels.nn import conv_bn_act

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
Stem = Literal["7x7", "deep"]


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1
) -> nn.Conv2d:
    pad = kernel // 2 * dilation
    return nn.Conv2d(in_channels, out_channels, kernel, stride, pad, dilation, bias=False)


class Bottleneck(nn.Module):
    """A bottleneck block: 1x1, 3x3 and 1x1 convolutions, and a shortcut.

    The 3x3 convolution has the stride, as in torchvision.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        dilation: int,
        downsample: bool,
        backend: Backend,
    ) -> None:
        super().__init__()
        out = 4 * planes
        self.conv1, self.bn1 = _conv(in_channels, planes, 1), nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, stride, dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, out, 1), nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(_conv(in_channels, out, 1, stride), nn.BatchNorm2d(out))
            if downsample
            else None
        )
        self.op_backend = op_backend(backend)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, 4 planes, H / stride, W / stride]."""
        backend = self.op_backend
        x = conv_bn_act(input, self.conv1, self.bn1, backend=backend)
        x = conv_bn_act(x, self.conv2, self.bn2, backend=backend)
        shortcut = input
        if self.downsample is not None:
            layers = conv_norm(self.downsample)
            shortcut = conv_bn_act(input, *layers, activation=None, backend=backend)
        return conv_bn_act(x, self.conv3, self.bn3, residual=shortcut, backend=backend)


class ResNet(nn.Module):
    """The convolutional part of a ResNet.

    For an output stride below 32 the last layers have stride 1 and dilated convolutions, as with
    torchvision's `replace_stride_with_dilation`.

    Args:
        layers: number of blocks in each of the four layers; `LAYERS` has those of ResNet-50 and
            ResNet-101.
        in_channels: number of channels of the images.
        width: factor on the paper's numbers of channels.
        output_stride: 8, 16 or 32.
        stem: the first layers: one 7x7 convolution ("7x7"), or three 3x3 convolutions ("deep", as
            in PSPNet's code).
        backend: see `SegmentationModel`.

    Source: He et al.: Deep Residual Learning for Image Recognition, CVPR 2016, table 1.
    """

    def __init__(
        self,
        layers: Sequence[int],
        in_channels: int,
        width: float,
        backend: Backend,
        *,
        output_stride: int = 8,
        stem: Stem = "7x7",
    ) -> None:
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"ResNet: layers must be four positive ints, got {tuple(layers)}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"ResNet: output_stride must be 8, 16 or 32, got {output_stride}")
        if stem not in ("7x7", "deep"):
            raise ValueError(f'ResNet: stem must be "7x7" or "deep", got {stem!r}')
        self.backend = backend
        planes = [scaled(64 * 2**i, width) for i in range(4)]
        self.channels = [4 * p for p in planes]
        out = planes[0]
        if stem == "7x7":
            self.conv1, self.bn1 = _conv(in_channels, out, 7, 2), nn.BatchNorm2d(out)
        else:
            self.conv1, self.bn1 = _conv(in_channels, out, 3, 2), nn.BatchNorm2d(out)
            self.conv2, self.bn2 = _conv(out, out, 3), nn.BatchNorm2d(out)
            self.conv3, self.bn3 = _conv(out, 2 * out, 3), nn.BatchNorm2d(2 * out)
            out *= 2
        self.stem = stem
        stride_so_far, dilation = 4, 1
        for i in range(4):
            first_dilation, stride = dilation, 1 if i == 0 else 2
            if stride_so_far * stride > output_stride:
                stride, dilation = 1, dilation * 2
            stride_so_far *= stride
            blocks = []
            for j in range(layers[i]):
                # The first block keeps the dilation of the layer before, as in torchvision.
                rate = first_dilation if j == 0 else dilation
                step = stride if j == 0 else 1
                blocks.append(Bottleneck(out, planes[i], step, rate, j == 0, backend))
                out = self.channels[i]
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
        maps = []
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
            maps.append(x)
        return maps


def load_resnet(model: SegmentationModel, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load a ResNet of the same depth into ``model.backbone``, after an error nothing.

    Args:
        model: to load into.
        state_dict: of torchvision's classifier, without its ``fc``; or of a segmentation model, of
            which only ``backbone`` is loaded.

    Raises:
        ValueError: the state dict does not fit.
    """
    state = plain(state_dict, f"{model.name}: state_dict")
    body = {key: value for key, value in state.items() if key.startswith("backbone.")}
    left_over = state.keys() - body.keys()
    if not body:
        left_over = {key for key in state if key.startswith("fc.")}
        body = {f"backbone.{key}": v for key, v in state.items() if key not in left_over}
    load_parts(model, body, ["backbone"], [key for key in state if key in left_over])


class ResNetModel(SegmentationModel):
    """A ResNet with a classifier on layer4, which the subclass sets as ``classifier``.

    The submodules have torchvision's names: ``backbone``, ``classifier`` and ``aux_classifier``.

    Args:
        num_classes, in_channels, backend: see `SegmentationModel`.
        layers, width, output_stride, stem: see `ResNet`.
        aux_loss: whether an `FCNHead` also classifies the output of layer3. With ResNet-50 or
            ResNet-101 and 21 classes the head has 2,365,205 parameters.
    """

    classifier: nn.Module
    load_backbone = load_resnet

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        layers: Sequence[int],
        width: float,
        backend: Backend,
        *,
        output_stride: int = 8,
        stem: Stem = "7x7",
        aux_loss: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels, backend)
        self.backbone = ResNet(
            layers, in_channels, width, backend, output_stride=output_stride, stem=stem
        )
        self.aux_classifier = (
            FCNHead(self.backbone.channels[2], num_classes, backend) if aux_loss else None
        )

    def scores(self, input: torch.Tensor) -> Scores:
        """Scores of layer4 and, with an auxiliary head, of layer3."""
        maps = self.backbone(input)
        # The classifier runs first, so that dropout draws random numbers in torchvision's order.
        out = self.classifier(maps[3])
        aux = self.aux_classifier(maps[2]) if self.aux_classifier is not None else None
        return Scores(out, aux=aux)
