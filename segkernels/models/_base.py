"""The base of every model: checks, the full-size output, labels and loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models import _blocks
from segkernels.models._blocks import BACKENDS, Backend


class Box(NamedTuple):
    """A part of a plane."""

    top: int
    left: int
    height: int
    width: int


class Scores(NamedTuple):
    """Class scores at the size a network computes them in, and how they become its output.

    Attributes:
        low: [N, C, h, w].
        size: what `low` is resized to, bilinearly.
        box: the part of it that is the output; None for all.
        aux: [N, C, h', w'], of an auxiliary head: resized to `size`; None without one.
    """

    low: torch.Tensor
    size: tuple[int, int]
    box: Box | None = None
    aux: torch.Tensor | None = None


class SegmentationModel(nn.Module):
    """Images [N, in_channels, H, W] to class scores [N, num_classes, H, W].

    A subclass gives `scores`; the full-size output, the label map and the loss are computed from
    that, the last two without the scores at full size.

    Args:
        num_classes: C.
        in_channels: of the images.
        backend: "segkernels", or "torch" for plain torch layers: the same parameters and results.

    Attributes:
        num_classes, in_channels, backend: the arguments.
        name: the name that `create_model` knows the model by.
        arguments: what it was built with, as `save_pretrained` writes it.
    """

    align_corners = False  # of the last resizing
    aux_weight = 0.5  # of the auxiliary loss
    # Heights and widths that fit: min_size + k * size_step.
    min_size = 1
    size_step = 1

    def __init__(self, num_classes: int, in_channels: int, backend: Backend) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.arguments: dict[str, Any] = {}
        for what, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.name}: {what} must be a positive int, got {value!r}")
        if backend not in BACKENDS:
            raise ValueError(f"{self.name}: backend must be one of {BACKENDS}, got {backend!r}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.backend: Backend = backend

    def scores(self, input: torch.Tensor) -> Scores:
        """The network itself."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Class scores (logits) at the input's size; with `aux_loss=True` {"out": .., "aux": ..}.

        Raises:
            ValueError: an input of another rank, number of channels, or of a size that does not
                fit; a batch too small to train BatchNorm.
            TypeError: an input that does not hold floats.
        """
        self.check_input(input)
        found = self.scores(input)
        out = self._full(found.low, found)
        if found.aux is None:
            return out
        return {"out": out, "aux": self._full(found.aux, found)}

    @torch.no_grad()
    def predict(self, input: torch.Tensor) -> torch.Tensor:
        """The label of each pixel, [N, H, W] int64: `forward(input).argmax(1)`, with less memory.

        Call `eval()` first: the mode is left as it is.
        """
        self.check_input(input)
        found = self.scores(input)
        labels = _blocks.label_map(found.low, found.size, self.align_corners, self.backend)
        return labels if found.box is None else _crop(labels, found.box)

    def loss(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Mean cross entropy of `forward(input)`, with less memory.

        With an auxiliary head its loss is added, times `aux_weight`.

        Args:
            input: [N, in_channels, H, W].
            target: [N, H, W] labels, as of `segkernels.upsample_cross_entropy`; and so the rest.
            weight: [C], a weight for each class.
            ignore_index: a label that does not count.
            label_smoothing: from 0 to 1.

        Raises:
            ValueError, TypeError: as `forward` and `upsample_cross_entropy`.
        """
        self.check_input(input)
        found = self.scores(input)
        box = found.box or Box(0, 0, *found.size)
        target = self.fit_target(input, target)
        if tuple(target.shape) != (len(input), box.height, box.width):
            raise ValueError(
                f"{self.name}: target must be {[len(input), box.height, box.width]}, got shape "
                f"{tuple(target.shape)}"
            )
        if found.box is not None:
            below, right = found.size[0] - box.top - box.height, found.size[1] - box.left
            around = (box.left, right - box.width, box.top, below)
            target = F.pad(target.long(), around, value=ignore_index)
        options: dict[str, Any] = {
            "weight": weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
        }
        tail = (target, self.align_corners, self.backend)
        loss = _blocks.cross_entropy(found.low, *tail, **options)
        if found.aux is None:
            return loss
        return loss + self.aux_weight * _blocks.cross_entropy(found.aux, *tail, **options)

    def fit_target(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """`target` in the output's size; only models whose output is smaller change it."""
        return target

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load the state dict of torchvision's classifier of the same backbone.

        Raises:
            ValueError: the model has no such backbone; keys that are missing or do not fit.
        """
        raise ValueError(f"{self.name}: torchvision has no classifier with this backbone")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, for `segkernels.models.from_pretrained`.

        Raises:
            ImportError: safetensors is not installed.
        """
        from segkernels.models._pretrained import save

        save(self, folder)

    def check_input(self, input: torch.Tensor) -> None:
        """Raise unless the network can take `input`."""
        if input.dim() != 4 or input.size(1) != self.in_channels:
            raise ValueError(
                f"{self.name}: input must be [N, {self.in_channels}, H, W], got shape "
                f"{tuple(input.shape)}"
            )
        if not input.is_floating_point():
            raise TypeError(f"{self.name}: input must hold floats, got {input.dtype}")
        wrong = [
            f"{axis} {size} (nearest: {self._nearest(size)})"
            for axis, size in (("height", input.size(2)), ("width", input.size(3)))
            if size < self.min_size or (size - self.min_size) % self.size_step
        ]
        if wrong:
            step = f" and a multiple of {self.size_step} more" if self.size_step > 1 else ""
            raise ValueError(
                f"{self.name}: height and width must be at least {self.min_size}{step}, got "
                + ", ".join(wrong)
            )
        if input.size(0) == 1 and self.has_one_pixel_map(input) and self._trains_statistics():
            raise ValueError(
                f"{self.name}: training needs two images or more, got 1: BatchNorm over a map of "
                "one pixel has no variance"
            )

    def has_one_pixel_map(self, input: torch.Tensor) -> bool:
        """Whether a map that BatchNorm normalises has one pixel."""
        return False

    def _trains_statistics(self) -> bool:
        # SyncBatchNorm may get more images from other processes.
        return any(type(part) is nn.BatchNorm2d and part.training for part in self.modules())

    def _nearest(self, size: int) -> str:
        above = max(0, -(-(size - self.min_size) // self.size_step))
        sizes = [self.min_size + k * self.size_step for k in (above - 1, above) if k >= 0]
        return " or ".join(map(str, sizes))

    def _full(self, low: torch.Tensor, found: Scores) -> torch.Tensor:
        full = _blocks.resize(low, found.size, self.align_corners, self.backend)
        return full if found.box is None else _crop(full, found.box)


def _crop(x: torch.Tensor, box: Box) -> torch.Tensor:
    return x[..., box.top : box.top + box.height, box.left : box.left + box.width]
