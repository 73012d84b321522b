"""The convolutions of VGG16, and the conversion of torchvision's weights."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from segkernels.models._base import SegmentationModel
from segkernels.models._blocks import (
    Backend,
    max_pool_with_indices,
    op_backend,
    scaled,
    spatial_size,
)
from segkernels.models._weights import load_parts, plain
from segkernels.nn import ConvBNAct

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Sequential):
    """The five stages of configuration D, without the pooling after each stage.

    Models iterate over the stages and pool themselves.

    Args:
        in_channels: number of channels of the images.
        width: factor on the paper's numbers of channels.
        norm: whether BatchNorm follows each convolution.
        dilation: dilation of the convolutions in each stage.
        padding: "same", or "valid" for none.
        first_padding: padding of the first convolution, if it is another one (100 in FCN).
        backend: see `SegmentationModel`.

    Source: Simonyan and Zisserman: Very Deep Convolutional Networks, ICLR 2015, table 1.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        width: float = 1.0,
        norm: bool = False,
        dilation: Sequence[int] = (1, 1, 1, 1, 1),
        padding: Literal["same", "valid"] = "same",
        first_padding: int | None = None,
        backend: Backend,
    ) -> None:
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        self.channels = [scaled(channels, width) for channels, _ in STAGES]
        before = in_channels
        for i, (_, depth) in enumerate(STAGES):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for j in range(depth):
                pad = 0 if padding == "valid" else dilation[i]
                if i == j == 0 and first_padding is not None:
                    pad = first_padding
                layers[f"conv{i + 1}_{j + 1}"] = ConvBNAct(
                    before,
                    self.channels[i],
                    padding=pad,
                    dilation=dilation[i],
                    bias=True,
                    norm=norm,
                    backend=op_backend(backend),
                )
                before = self.channels[i]
            stages[f"stage{i + 1}"] = nn.Sequential(layers)
        super().__init__(stages)

    def from_torchvision(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename ``features.*`` of torchvision's vgg16 (vgg16_bn with `norm`) to the names here.

        A tensor without a counterpart keeps its name.
        """
        layers = [
            f"{s}.{c}" for s, stage in self.named_children() for c, _ in stage.named_children()
        ]
        theirs: dict[int, dict[str, torch.Tensor]] = {}
        found: dict[str, torch.Tensor] = {}
        for key, value in state_dict.items():
            if match := re.fullmatch(r"features\.(\d+)\.(\w+)", key):
                theirs.setdefault(int(match[1]), {})[match[2]] = value
            elif key.startswith("features."):
                found[key] = value
        for part, dim in (("conv", 4), ("bn", 1)):
            weights = {n: w for n in sorted(theirs) if (w := theirs[n].get("weight")) is not None}
            indices = [n for n, weight in weights.items() if weight.dim() == dim]
            for i, index in enumerate(indices):
                name = f"{layers[i]}.{part}" if i < len(layers) else f"features.{index}"
                found |= {f"{name}.{kind}": value for kind, value in theirs[index].items()}
        return found


def encode(
    vgg: VGG16, x: torch.Tensor, backend: Backend
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, tuple[int, int]]]]:
    """Run the stages with 2x2 max pooling after each.

    Returns:
        The pooled output of the last stage, and for each stage what `unpool` takes: the indices of
        the maxima, and height and width before the pooling.
    """
    pooled = []
    for stage in vgg:
        x = stage(x)
        size = spatial_size(x)
        x, indices = max_pool_with_indices(x, backend)
        pooled.append((indices, size))
    return x, pooled


def convolutionalise(
    state_dict: Mapping[str, torch.Tensor], kernel: int, channels: int
) -> dict[str, torch.Tensor]:
    """Convert the first two fully connected layers of torchvision's VGG16 to convolutions.

    A 7x7 kernel and 4096 channels keep all weights (FCN, section 3.1). Smaller ones are subsampled:
    evenly spaced rows and columns of the kernel, and evenly spaced filters (Chen et al. 2015,
    section 3.1: 4x4 or 3x3, and 1024 channels).

    Args:
        state_dict: of torchvision's vgg16 or vgg16_bn.
        kernel: kernel size of fc6, from 1 to 7.
        channels: number of output channels of fc6 and fc7, a divisor of 4096.

    Returns:
        fc6.conv.weight [channels, 512, kernel, kernel], fc7.conv.weight [channels, channels, 1, 1],
        fc6.conv.bias and fc7.conv.bias [channels].

    Raises:
        ValueError: the state dict lacks the layers, or `channels` does not divide their number of
            filters.
    """
    missing = [
        key
        for n in (0, 3)
        for kind in ("weight", "bias")
        if (key := f"classifier.{n}.{kind}") not in state_dict
    ]
    if missing:
        raise ValueError(f"convolutionalise: the state dict lacks {', '.join(missing)}")
    first, second = state_dict["classifier.0.weight"], state_dict["classifier.3.weight"]
    filters = len(first) if first.dim() == 2 else 0
    if filters == 0 or first.size(1) % 49 or filters % channels:
        raise ValueError(
            f"convolutionalise: classifier.0.weight {tuple(first.shape)} must be [filters, "
            f"channels * 7 * 7] with filters a multiple of {channels}"
        )
    for key, shape in (
        ("classifier.0.bias", (filters,)),
        ("classifier.3.weight", (filters, filters)),
        ("classifier.3.bias", (filters,)),
    ):
        if state_dict[key].shape != shape:
            raise ValueError(
                f"convolutionalise: {key} must be {shape}, got {tuple(state_dict[key].shape)}"
            )
    every = filters // channels
    cells = torch.linspace(0, 6, kernel).round().long() if kernel > 1 else torch.tensor([3])
    fc6 = first.view(filters, -1, 7, 7)[::every][..., cells, :][..., cells]
    return {
        "fc6.conv.weight": fc6,
        "fc6.conv.bias": state_dict["classifier.0.bias"][::every],
        "fc7.conv.weight": second[::every, ::every, None, None],
        "fc7.conv.bias": state_dict["classifier.3.bias"][::every],
    }


def load_vgg16(
    model: SegmentationModel, state_dict: Mapping[str, torch.Tensor], fc: Sequence[str] = ()
) -> None:
    """Load a VGG16 into ``model.vgg``, after an error nothing.

    Args:
        model: to load into.
        state_dict: torchvision's, of vgg16_bn or vgg16; or of a segmentation model with ``vgg``, of
            which only that and the layers of `fc` are loaded.
        fc: names of the modules with fc6 and fc7 to load; "" is `model` itself.

    Raises:
        ValueError: the state dict does not fit.
    """
    vgg = model.get_submodule("vgg")
    assert isinstance(vgg, VGG16)
    given = plain(state_dict, f"{model.name}: state_dict")
    holders = [f"{name}." if name else "" for name in fc]
    parts = ["vgg", *(f"{holder}{layer}" for holder in holders for layer in ("fc6", "fc7"))]
    used = tuple(f"{part}." for part in parts)
    state = {key: value for key, value in given.items() if key.startswith(used)}
    if not state:
        used = ("features.", *(("classifier.0.", "classifier.3.") if fc else ()))
        state = {f"vgg.{key}": value for key, value in vgg.from_torchvision(given).items()}
        for holder in holders:
            out, _, kernel, _ = model.get_parameter(f"{holder}fc6.conv.weight").shape
            layers = convolutionalise(given, kernel, out)
            state |= {holder + key: value for key, value in layers.items()}
    load_parts(model, state, parts, [key for key in given if not key.startswith(used)])


def load_vgg16_with_fc(model: SegmentationModel, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load torchvision's vgg16: the convolutions, and fc6 and fc7 by `convolutionalise`."""
    load_vgg16(model, state_dict, fc=[""])
