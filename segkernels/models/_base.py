"""The base class of the models: checks, full-size scores, label map and loss."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from segkernels.models import _blocks, _pretrained
from segkernels.models._blocks import BACKENDS, Backend, crop, spatial_size
from segkernels.models._weights import LoadReport


class Box(NamedTuple):
    """A rectangle of an image."""

    top: int
    left: int
    height: int
    width: int


class Scores(NamedTuple):
    """The class scores that a network computes, and how to make full-size scores of them.

    Attributes:
        low: class scores [N, C, h, w].
        size: height and width to resize them to, bilinearly; None for those of the image.
        box: the part of the resized scores that is the output; None for all of it.
        aux: class scores [N, C, h', w'] of the auxiliary head, resized in the same way; or None.
    """

    low: torch.Tensor
    size: tuple[int, int] | None = None
    box: Box | None = None
    aux: torch.Tensor | None = None


class SegmentationModel(nn.Module):
    """Images [N, in_channels, H, W] to class scores [N, num_classes, H, W].

    A subclass defines `scores`. This class resizes the scores to the size of the image, and
    computes the label map and the loss without the full-size scores in memory.

    Args:
        num_classes: number of classes. A model of one class separates the foreground, label 1, from
            the background, label 0: its score is the logit of the foreground, and its loss is the
            binary cross entropy.
        in_channels: number of channels of the images.
        backend: "segkernels", or "torch" for plain torch layers with the same parameters and
            results.

    Attributes:
        num_classes, in_channels, backend: the arguments.
        name: the name that `create_model` takes.
        arguments: the arguments of the builder, which `save_pretrained` saves.
        weights_report: what `create_model` or `load_backbone` loaded; None if nothing.
    """

    weights_report: LoadReport | None = None

    align_corners = False  # in the resizing of the scores
    aux_weight = 0.5  # factor of the auxiliary loss
    # Heights and widths that fit are min_size + k * size_step.
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
        """Run the network."""
        raise NotImplementedError

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Class scores (logits) at the size of the input, or the loss of a target.

        The loss is the mean cross entropy between the scores and `target`, computed with less
        memory. A model with an auxiliary head adds the loss of that head times `aux_weight`.

        Under DistributedDataParallel call the wrapped model with a target. Each process then
        divides by its own pixels, and the gradients are averaged over the processes. With ignored
        pixels or class weights this is the average of the means of the processes, not the mean
        over all pixels.

        Args:
            input: images [N, in_channels, H, W].
            target: labels [N, H, W], int64, int32, int16 or uint8, for one class also bool; None
                for the scores.
            weight: a factor for each class, [C]; for one class [2], of the labels 0 and 1.
            ignore_index: label of the pixels to leave out.
            label_smoothing: from 0 to 1.

        Returns:
            With a target the loss, a scalar. Without one the scores: a tensor, or for a model with
            ``aux_loss=True`` a dict of two, "out" and "aux".

        Raises:
            ValueError: the input has a wrong rank, number of channels or size; the batch is too
                small to train BatchNorm; the target does not have the size of the scores. See also
                `segkernels.upsample_cross_entropy`.
            TypeError: the input does not hold floats, or the target does not hold integers.
        """
        if target is not None:
            self._check_target(input, target)
        low, size, box, aux = self._checked_scores(input)
        if target is not None:
            options = (weight, ignore_index, label_smoothing)
            return self._cross_entropy(input, target, low, size, box, aux, *options)

        def full(scores: torch.Tensor) -> torch.Tensor:
            resized = _blocks.resize(scores, size, self.align_corners, self.backend)
            return resized if box is None else crop(resized, *box)

        return full(low) if aux is None else {"out": full(low), "aux": full(aux)}

    @torch.no_grad()
    def predict(self, input: torch.Tensor) -> torch.Tensor:
        """The label map [N, H, W], int64: `forward(input).argmax(1)` with less memory.

        For a model of one class it is 1 where the score is above 0, else 0. This method does not
        change the mode: call `eval()` first.
        """
        low, size, box, _ = self._checked_scores(input)
        labels = _blocks.label_map(low, size, self.align_corners, self.backend)
        return labels if box is None else crop(labels, *box)

    def loss(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """The loss of `forward` with a target, where the arguments are described.

        This method calls the model, but not a wrapper of it. In distributed training call the model
        that DistributedDataParallel wraps, with `target`: only its own call synchronises the
        gradients. This method warns once if it is called outside, with gradients and several
        processes. Likewise call the result of `torch.compile` with `target`.
        """
        warn_unless_synchronised(self)
        value: torch.Tensor = self(
            input,
            target=target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        return value

    def fit_target(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The part of `target` that the output covers: all of it for most models."""
        return target

    def load_backbone(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load the state dict of torchvision's classifier with the same backbone.

        From the state dict of a segmentation model it loads the backbone.

        Raises:
            ValueError: torchvision has no such classifier, or the state dict does not fit.
        """
        raise ValueError(f"{self.name}: torchvision has no classifier with this backbone")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, for `segkernels.models.from_pretrained`.

        What the model has now is saved: its tensors in their dtypes, its CRF, whether it has an
        auxiliary head, and `aux_weight`, ``eps`` and ``momentum`` of BatchNorm and ``p`` of dropout
        where they were changed. SyncBatchNorm comes back as BatchNorm2d, tensors that share memory
        as separate ones, and frozen parameters as trainable. An interrupted call leaves no mixture
        of old and new files.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: `from_pretrained` would build another model, because layers or other
                attributes were replaced, or because the model was not built by `create_model` or
                the function of its name.
        """
        _pretrained.save(self, Path(folder))

    def check_input(self, input: torch.Tensor) -> None:
        """Raise the errors that `forward` lists."""
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
        """Whether BatchNorm normalises a feature map of one pixel."""
        return False

    def _trains_statistics(self) -> bool:
        # SyncBatchNorm is left out: other processes may have more images.
        return any(type(part) is nn.BatchNorm2d and part.training for part in self.modules())

    def _check_target(self, input: torch.Tensor, target: torch.Tensor) -> None:
        """Raise the errors for a target that do not depend on the size of the scores."""
        dtypes = (*_blocks.LABELS, torch.bool) if self.num_classes == 1 else (*_blocks.LABELS,)
        if not isinstance(target, torch.Tensor) or target.dtype not in dtypes:
            got = target.dtype if isinstance(target, torch.Tensor) else type(target).__name__
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{self.name}: target must hold labels ({names}), got {got}")
        if target.dim() != 3 or len(target) != len(input):
            raise ValueError(
                f"{self.name}: target must be [{len(input)}, H, W], got shape {tuple(target.shape)}"
            )

    def _cross_entropy(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        low: torch.Tensor,
        size: tuple[int, int],
        box: Box | None,
        aux: torch.Tensor | None,
        weight: torch.Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> torch.Tensor:
        target = self.fit_target(input, target)
        shape = [len(input), *((box.height, box.width) if box else size)]
        if list(target.shape) != shape:
            raise ValueError(
                f"{self.name}: target must be {shape}, got shape {tuple(target.shape)}"
            )
        if box is not None:
            below, right = size[0] - box.top - box.height, size[1] - box.left - box.width
            target = F.pad(target.long(), (box.left, right, box.top, below), value=ignore_index)
        options: dict[str, Any] = {
            "weight": weight,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
        }
        tail = (target, self.align_corners, self.backend)
        loss = _blocks.cross_entropy(low, *tail, **options)
        if aux is None:
            return loss
        return loss + self.aux_weight * _blocks.cross_entropy(aux, *tail, **options)

    def _nearest(self, size: int) -> str:
        above = max(0, -(-(size - self.min_size) // self.size_step))
        sizes = [self.min_size + k * self.size_step for k in (above - 1, above) if k >= 0]
        return " or ".join(map(str, sizes))

    def _checked_scores(
        self, input: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[int, int], Box | None, torch.Tensor | None]:
        """Check the input; return `scores` with the size of the image in place of None."""
        self.check_input(input)
        low, size, box, aux = self.scores(input)
        return low, size or spatial_size(input), box, aux


def warn_unless_synchronised(model: SegmentationModel) -> None:
    """Warn if gradients of `model` are wanted, but no wrapper averages them over the processes."""
    distributed = torch.distributed
    if (
        not torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not distributed.is_available()
        or not distributed.is_initialized()
        or distributed.get_world_size() < 2
    ):
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    # FSDPModule is a base of the model itself, so calling the model synchronises.
    inside = DistributedDataParallel._get_active_ddp_module() is not None
    if not inside and not isinstance(model, FSDPModule):
        _warn_once(model.name)


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(
        f"{name}.loss was called outside the forward of DistributedDataParallel while "
        f"{torch.distributed.get_world_size()} processes run: the gradients of this process are "
        "not averaged with those of the others. Call the wrapped model instead: "
        "ddp(images, target=labels)",
        stacklevel=4,
    )
