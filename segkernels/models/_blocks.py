"""Steps that several models share, each with segkernels' operators or with plain torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.nn import conv_bn_act
from segkernels.ops._operator import must_call_torch, surely
from segkernels.ops.interpolate import interpolate
from segkernels.ops.max_pool2d import max_pool2d
from segkernels.ops.max_unpool2d import max_unpool2d
from segkernels.ops.upsample_argmax import upsample_argmax
from segkernels.ops.upsample_cross_entropy import (
    upsample_binary_cross_entropy,
    upsample_cross_entropy,
)
from segkernels.ops.upsample_cross_entropy.native import LABELS as LABELS

Backend = Literal["segkernels", "torch"]
BACKENDS = ("segkernels", "torch")
_HALF = (torch.float16, torch.bfloat16)


def op_backend(backend: Backend) -> Literal["auto", "torch"]:
    """The `backend` argument of segkernels.nn's modules for the backend of a model."""
    return "torch" if backend == "torch" else "auto"


def scaled(channels: int, width: float) -> int:
    """The paper's number of channels times `width`, rounded, at least 1."""
    return max(1, round(channels * width))


def spatial_size(x: torch.Tensor) -> tuple[int, int]:
    """Height and width."""
    return (x.size(-2), x.size(-1))


def crop(x: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """The box of `x` whose first pixel is (top, left)."""
    for dim, start, size in ((-2, top, height), (-1, left, width)):
        if surely(size == x.size(dim)) or surely(size != x.size(dim)):
            x = x.narrow(dim, start, size)
        else:  # not a view, whose layout would depend on the answer
            x = x.index_select(dim, torch.arange(start, start + size, device=x.device))
    return x


def centre_crop(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The centre of `x` with the height and width of `like`."""
    height, width = spatial_size(like)
    return crop(x, (x.size(-2) - height) // 2, (x.size(-1) - width) // 2, height, width)


def max_pool(
    x: torch.Tensor,
    kernel_size: int = 2,
    stride: int = 2,
    padding: int = 0,
    *,
    ceil_mode: bool = False,
    backend: Backend,
) -> torch.Tensor:
    """Max pooling."""
    pool = F.max_pool2d if backend == "torch" else max_pool2d
    out: torch.Tensor = pool(x, kernel_size, stride, padding, ceil_mode=ceil_mode)
    return out


def max_pool_with_indices(x: torch.Tensor, backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
    """2x2 max pooling and the positions of the maxima, for `unpool`.

    The positions are the one-byte codes of `segkernels.max_pool2d`, or torch's indices.
    """
    if backend == "torch":
        values, indices = F.max_pool2d(x, 2, return_indices=True)
        return values, indices
    values, codes = max_pool2d(x, 2, return_codes=True)
    return values, codes


def unpool(
    x: torch.Tensor, indices: torch.Tensor, size: tuple[int, int], backend: Backend
) -> torch.Tensor:
    """Max unpooling to the height and width before `max_pool_with_indices`."""
    if backend == "torch" and not must_call_torch():
        return F.max_unpool2d(x, indices, [2, 2], output_size=size)
    return max_unpool2d(x, indices, 2, output_size=size)


def _has_size(x: torch.Tensor, size: tuple[int, int]) -> bool:
    """Whether `x` surely has the height and width `size`."""
    return surely(x.size(-2) == size[0]) and surely(x.size(-1) == size[1])


def resize(
    x: torch.Tensor, size: tuple[int, int], align_corners: bool, backend: Backend
) -> torch.Tensor:
    """Bilinear upsampling, which is the identity at equal sizes."""
    if _has_size(x, size):
        return x
    function = F.interpolate if backend == "torch" else interpolate
    return function(x, size, mode="bilinear", align_corners=align_corners)


def label_map(
    low: torch.Tensor, size: tuple[int, int], align_corners: bool, backend: Backend
) -> torch.Tensor:
    """The class with the highest score at each pixel, after resizing the scores to `size`.

    With one class, 1 where its score is above 0.
    """
    if low.size(1) == 1:
        wide = low.float() if low.dtype in _HALF else low
        return (resize(wide, size, align_corners, backend) > 0).squeeze(1).long()
    if backend == "torch":
        return resize(low, size, align_corners, backend).argmax(dim=1)
    same = _has_size(low, size)
    mode, corners = ("nearest", False) if same else ("bilinear", align_corners)
    labels = upsample_argmax(low, size, mode, corners)
    assert isinstance(labels, torch.Tensor)
    return labels


def cross_entropy(
    low: torch.Tensor, target: torch.Tensor, align_corners: bool, backend: Backend, **options: Any
) -> torch.Tensor:
    """Cross entropy of scores resized to the size of `target`; options as for F.cross_entropy.

    With one class, the binary cross entropy: that of two classes with the scores 0 and `low`.
    """
    size = spatial_size(target)
    same = _has_size(low, size)
    mode, corners = ("nearest", False) if same else ("bilinear", align_corners)
    if target.dtype == torch.bool:
        target = target.to(torch.uint8)
    if low.size(1) == 1:
        plain = options["weight"] is None and options["label_smoothing"] == 0.0
        if plain and backend != "torch":
            return upsample_binary_cross_entropy(
                low,
                target.unsqueeze(1),
                ignore_index=options["ignore_index"],
                mode=mode,
                align_corners=corners,
            )
        low = torch.cat([torch.zeros_like(low), low], dim=1)
    if backend == "torch":
        resized = resize(low, size, align_corners, backend)
        if resized.dtype in _HALF:
            resized = resized.float()  # as upsample_cross_entropy does
        return F.cross_entropy(resized, target.long(), **options)
    return upsample_cross_entropy(low, target, mode=mode, align_corners=corners, **options)


def conv_norm(layers: nn.Sequential, first: int = 0) -> tuple[nn.Conv2d, nn.Module]:
    """The convolution at index `first`, and the normalisation layer after it."""
    return cast(nn.Conv2d, layers[first]), layers[first + 1]


class FCNHead(nn.Sequential):
    """3x3 convolution to a quarter of the channels, BatchNorm, ReLU, dropout, 1x1 convolution.

    torchvision's FCN has this head as classifier, and its FCN and DeepLab v3 have it as auxiliary
    classifier. The parameters have torchvision's names.
    """

    def __init__(self, in_channels: int, num_classes: int, backend: Backend) -> None:
        inner = max(1, in_channels // 4)
        super().__init__(
            nn.Conv2d(in_channels, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(inner, num_classes, 1),
        )
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] to [N, num_classes, H, W]."""
        x = conv_bn_act(input, *conv_norm(self), backend=op_backend(self.backend))
        out: torch.Tensor = self[4](self[3](x))
        return out


def he_init_(module: nn.Module) -> None:
    """The initialisation of He et al. 2015: it keeps the variance through ReLU. Biases are 0.

    Deep networks without BatchNorm do not train from scratch without it.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def zero_init_(layers: Iterable[nn.Conv2d]) -> None:
    """Set the weights and biases of score layers to 0, as FCN does (section 4.3)."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
