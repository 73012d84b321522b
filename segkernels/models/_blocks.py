"""What the models share: each step once with segkernels' ops and once with plain torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.nn import conv_bn_act
from segkernels.ops.interpolate import interpolate
from segkernels.ops.max_pool2d import max_pool2d
from segkernels.ops.max_unpool2d import max_unpool2d
from segkernels.ops.upsample_argmax import upsample_argmax
from segkernels.ops.upsample_cross_entropy import upsample_cross_entropy

Backend = Literal["segkernels", "torch"]
BACKENDS = ("segkernels", "torch")


def op_backend(backend: Backend) -> Literal["auto", "torch"]:
    """The `backend` of segkernels.nn's modules for that of a model."""
    return "torch" if backend == "torch" else "auto"


def scaled(channels: int, width: float) -> int:
    """`channels` of the paper in a variant that is `width` times as wide: at least one."""
    return max(1, round(channels * width))


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


def max_pool_switches(x: torch.Tensor, backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
    """2x2 max pooling, and where each maximum was: one-byte codes, or torch's indices."""
    if backend == "torch":
        values, indices = F.max_pool2d(x, 2, return_indices=True)
        return values, indices
    values, codes = max_pool2d(x, 2, return_codes=True)
    return values, codes


def unpool(
    x: torch.Tensor, switches: torch.Tensor, size: tuple[int, int], backend: Backend
) -> torch.Tensor:
    """The reverse of `max_pool_switches`, to the (height, width) that was pooled."""
    if backend == "torch":
        return F.max_unpool2d(x, switches, [2, 2], output_size=size)
    return max_unpool2d(x, switches, 2, output_size=size)


def resize(
    x: torch.Tensor, size: tuple[int, int], align_corners: bool, backend: Backend
) -> torch.Tensor:
    """Bilinear upsampling; `x` itself where it has the size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    function = F.interpolate if backend == "torch" else interpolate
    return function(x, size, mode="bilinear", align_corners=align_corners)


def label_map(
    low: torch.Tensor, size: tuple[int, int], align_corners: bool, backend: Backend
) -> torch.Tensor:
    """The argmax of scores resized to `size`."""
    if backend == "torch":
        return resize(low, size, align_corners, backend).argmax(dim=1)
    same = tuple(low.shape[-2:]) == tuple(size)
    mode, corners = ("nearest", False) if same else ("bilinear", align_corners)
    labels = upsample_argmax(low, size, mode, corners)
    assert isinstance(labels, torch.Tensor)
    return labels


def cross_entropy(
    low: torch.Tensor,
    target: torch.Tensor,
    align_corners: bool,
    backend: Backend,
    **options: Any,
) -> torch.Tensor:
    """The cross entropy of scores resized to `target`'s size. Options: those of F.cross_entropy."""
    size = (target.shape[-2], target.shape[-1])
    if backend == "torch":
        resized = resize(low, size, align_corners, backend)
        if resized.dtype in (torch.float16, torch.bfloat16):
            resized = resized.float()  # as upsample_cross_entropy
        return F.cross_entropy(resized, target.long(), **options)
    same = tuple(low.shape[-2:]) == size
    mode, corners = ("nearest", False) if same else ("bilinear", align_corners)
    return upsample_cross_entropy(low, target, mode=mode, align_corners=corners, **options)


class FCNHead(nn.Sequential):
    """3x3 convolution to a quarter of the channels, BatchNorm, ReLU, dropout, 1x1 convolution.

    The head, and the auxiliary head, of torchvision's segmentation models, with their names.
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
        conv, norm = self[0], self[1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        x = conv_bn_act(input, conv, norm, backend=op_backend(self.backend))
        out: torch.Tensor = self[4](self[3](x))
        return out


def he_init_(module: nn.Module) -> None:
    """He et al. 2015: convolutions keep the variance through ReLU; biases are 0.

    Without it the deep networks without BatchNorm would not train from scratch.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def zero_init_(layers: Iterable[nn.Conv2d]) -> None:
    """Weights and biases of score layers to 0, as in FCN (Long et al. 2015, section 4.3)."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def load_parts(
    model: nn.Module, state: Mapping[str, torch.Tensor], parts: Iterable[str], what: str
) -> None:
    """Load `state` into the submodules named `parts` of `model`, or raise and change nothing.

    Raises:
        ValueError: names `what`, and the keys that are missing, unknown, or of another shape.
    """
    prefixes = tuple(f"{part}." for part in parts)
    own = {key: v for key, v in model.state_dict().items() if key.startswith(prefixes)}
    # The counters matter only to a BatchNorm without momentum, and old checkpoints lack them.
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    problems = [f"missing {key}" for key in needed if key not in state]
    problems += [f"unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{what}: the state dict does not fit: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(dict(state), strict=False)
