"""probs_from_labels: class probabilities from hard labels."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from segkernels import _status
from segkernels.ops import _arguments

Labels = TypeVar("Labels", torch.Tensor, npt.NDArray[np.generic])

_OP = "probs_from_labels"
# Dtypes converted to int64. Labels of other dtypes fit in int32, with -1 for unknown.
_INT64_DTYPES = (torch.int64, torch.uint32, torch.uint64)


def probs_from_labels(
    labels: Labels,
    num_classes: int,
    gt_prob: float = 0.7,
    ignore_index: int | None = None,
) -> Labels:
    """Convert hard labels to class probabilities for `dense_crf`.

    A pixel with label c gets `gt_prob` for class c and ``(1 - gt_prob) / (C - 1)`` for each other
    class. A pixel with label `ignore_index` gets 1 / C for every class, so its neighbours decide.
    With one class every probability is 1. pydensecrf's ``unary_from_labels`` returns the same
    distribution as energies.

    Args:
        labels: from 0 to num_classes - 1, or `ignore_index`, of any integer dtype, or a bool mask
            (False is 0, True is 1): a numpy array or a torch tensor `(H, W)`, `(B, H, W)` or, for
            volumes, `(B, D, H, W)`.
        num_classes: C, at least 1; at least 2 for a mask.
        gt_prob: the probability that a label is correct, above 0 and at most 1.
        ignore_index: the label of unknown pixels, any integer. None: every pixel has a label.

    Returns:
        float32 probabilities, an array or a tensor like `labels`, on the same device: `(C, H, W)`,
        `(B, C, H, W)` or `(B, C, D, H, W)`. They sum to 1 over the classes.

    Raises:
        TypeError: `labels` is not an array or a tensor of integers or bools; `num_classes` or
            `ignore_index` is not an integer; `gt_prob` is not a number.
        ValueError: a wrong rank, empty labels, `num_classes` below 1 (2 for a mask), a `gt_prob`
            outside (0, 1], or a label outside [0, C) that is not `ignore_index`. On CUDA a pixel
            with such a label is treated as unknown, and `segkernels.check` reports it.
    """
    classes = _integer("num_classes", num_classes)
    if classes < 1:
        raise ValueError(f"{_OP}: num_classes must be at least 1, got {classes}")
    ignored = None if ignore_index is None else _integer("ignore_index", ignore_index)
    if isinstance(gt_prob, bool) or not isinstance(gt_prob, (int, float, np.number)):
        raise TypeError(f"{_OP}: gt_prob must be a number, got {type(gt_prob).__name__}")
    if not 0.0 < gt_prob <= 1.0:
        raise ValueError(f"{_OP}: gt_prob must be above 0 and at most 1, got {gt_prob}")

    if isinstance(labels, np.ndarray):
        _check_labels(labels, labels.size, labels.dtype.kind in "iub", classes)
        tensor = _arguments.from_numpy(labels)
        return _expand(tensor, classes, float(gt_prob), ignored).numpy()
    if isinstance(labels, torch.Tensor):
        is_integer = not (labels.is_floating_point() or labels.is_complex())
        _check_labels(labels, labels.numel(), is_integer, classes)
        return _expand(labels, classes, float(gt_prob), ignored)
    raise TypeError(
        f"{_OP}: labels must be a numpy array or a torch tensor, got {type(labels).__name__}"
    )


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{_OP}: {name} must be an integer, got {value!r}")
    return int(value)


def _check_labels(labels: Any, size: int, is_integer: bool, classes: int) -> None:
    shape = tuple(labels.shape)
    if not is_integer:
        raise TypeError(f"{_OP}: labels must hold integers or bools, got {labels.dtype}")
    if classes == 1 and labels.dtype in (torch.bool, np.dtype(bool)):
        raise ValueError(
            f"{_OP}: num_classes must be at least 2 (background and foreground) for a mask, got 1"
        )
    if labels.ndim not in (2, 3, 4):
        raise ValueError(
            f"{_OP}: labels must be (H, W), (B, H, W) or (B, D, H, W), got shape {shape}"
        )
    if size == 0:
        raise ValueError(f"{_OP}: labels must have at least one pixel, got shape {shape}")


def _expand(
    labels: torch.Tensor, classes: int, gt_prob: float, ignored: int | None
) -> torch.Tensor:
    wide = labels.to(torch.int64 if labels.dtype in _INT64_DTYPES else torch.int32)
    known = (wide >= 0) & (wide < classes)
    limits = torch.iinfo(wide.dtype)
    value = ignored
    if labels.dtype == torch.uint64 and ignored is not None:
        # Labels from 2^63 on wrap to negative ones, which no negative ignore_index may equal.
        value = ignored - 2**64 * (ignored >= 2**63) if 0 <= ignored < 2**64 else None
    if value is not None and limits.min <= value <= limits.max:
        skipped = wide == value
        _report_outside(labels, known | skipped, classes, ignored)
        known &= ~skipped
    else:
        _report_outside(labels, known, classes, ignored)

    axis = 0 if labels.ndim == 2 else 1
    if classes == 1:
        return torch.ones_like(wide, dtype=torch.float32).unsqueeze(axis)
    # -1 equals no class, so an unknown pixel gets `others` for every class.
    wide = torch.where(known, wide, -1).unsqueeze(axis)
    others = torch.full_like(wide, (1.0 - gt_prob) / (classes - 1), dtype=torch.float32)
    others.masked_fill_(~known.unsqueeze(axis), 1.0 / classes)
    column = [1] * wide.ndim
    column[axis] = classes
    every_class = torch.arange(classes, dtype=wide.dtype, device=wide.device).view(column)
    return torch.where(wide == every_class, gt_prob, others)


def _report_outside(
    labels: torch.Tensor, allowed: torch.Tensor, classes: int, ignored: int | None
) -> None:
    """Report labels that are not allowed: raise on the CPU, set a status word on CUDA."""
    if labels.is_cuda:
        with _status.watch(labels, _OP) as words:
            words[_status.LABEL_OUT_OF_RANGE].masked_fill_(~allowed.all(), 1)
        return
    if bool(allowed.all()):
        return
    unless = "" if ignored is None else f" or ignore_index = {ignored}"
    raise ValueError(
        f"{_OP}: labels must be from 0 to num_classes - 1 = {classes - 1}{unless}, got "
        f"{_status.first_invalid(labels, ~allowed)}"
    )
