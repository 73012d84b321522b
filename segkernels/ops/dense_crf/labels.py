"""probs_from_labels: class probabilities from hard labels."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from segkernels import _status

Labels = TypeVar("Labels", torch.Tensor, npt.NDArray[np.generic])

_OP = "probs_from_labels"
_LABEL_OUT_OF_RANGE = 5  # kLabelOutOfRange in csrc/common/status.h
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
        labels: from 0 to num_classes - 1, or `ignore_index`, of any integer dtype: a numpy array or
            a torch tensor `(H, W)`, `(B, H, W)` or, for volumes, `(B, D, H, W)`.
        num_classes: C, at least 1.
        gt_prob: the probability that a label is correct, above 0 and below 1.
        ignore_index: the label of unknown pixels, any integer. None: every pixel has a label.

    Returns:
        float32 probabilities, an array or a tensor like `labels`, on the same device: `(C, H, W)`,
        `(B, C, H, W)` or `(B, C, D, H, W)`. They sum to 1 over the classes.

    Raises:
        TypeError: `labels` is not an array or a tensor of an integer dtype; `num_classes` or
            `ignore_index` is not an integer; `gt_prob` is not a number.
        ValueError: a wrong rank, empty labels, `num_classes` below 1, a `gt_prob` outside (0, 1),
            or a label outside [0, C) that is not `ignore_index`. On CUDA a pixel with such a label
            is treated as unknown, and `segkernels.check` reports it.
    """
    classes = _integer("num_classes", num_classes)
    if classes < 1:
        raise ValueError(f"{_OP}: num_classes must be at least 1, got {classes}")
    ignored = None if ignore_index is None else _integer("ignore_index", ignore_index)
    if isinstance(gt_prob, bool) or not isinstance(gt_prob, (int, float, np.floating)):
        raise TypeError(f"{_OP}: gt_prob must be a number, got {type(gt_prob).__name__}")
    if not 0.0 < gt_prob < 1.0:
        raise ValueError(f"{_OP}: gt_prob must be above 0 and below 1, got {gt_prob}")

    if isinstance(labels, np.ndarray):
        is_integer = labels.dtype.kind in "iu"
        _check_labels(labels.ndim, labels.shape, labels.size, is_integer, labels.dtype)
        return _expand(_as_tensor(labels), classes, float(gt_prob), ignored).numpy()
    if isinstance(labels, torch.Tensor):
        is_integer = not (
            labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
        )
        _check_labels(labels.ndim, tuple(labels.shape), labels.numel(), is_integer, labels.dtype)
        return _expand(labels, classes, float(gt_prob), ignored)
    raise TypeError(
        f"{_OP}: labels must be a numpy array or a torch tensor, got {type(labels).__name__}"
    )


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{_OP}: {name} must be an integer, got {value!r}")
    return int(value)


def _check_labels(
    rank: int, shape: tuple[int, ...], size: int, is_integer: bool, dtype: object
) -> None:
    if not is_integer:
        raise TypeError(f"{_OP}: labels must have an integer dtype, got {dtype}")
    if rank not in (2, 3, 4):
        raise ValueError(
            f"{_OP}: labels must be (H, W), (B, H, W) or (B, D, H, W), got shape {shape}"
        )
    if size == 0:
        raise ValueError(f"{_OP}: labels must have at least one pixel, got shape {shape}")


def _as_tensor(labels: npt.NDArray[np.generic]) -> torch.Tensor:
    """Return the array as a tensor, copied where torch cannot share its memory."""
    native = labels.dtype.newbyteorder("=")
    if labels.dtype != native or any(stride < 0 for stride in labels.strides):
        labels = np.ascontiguousarray(labels, dtype=native)
    elif not labels.flags.writeable:
        # from_numpy warns about read-only memory; a copy avoids the warning.
        labels = labels.copy()
    return torch.from_numpy(labels)


def _expand(
    labels: torch.Tensor, classes: int, gt_prob: float, ignored: int | None
) -> torch.Tensor:
    wide = labels.to(torch.int64 if labels.dtype in _INT64_DTYPES else torch.int32)
    known = (wide >= 0) & (wide < classes)
    limits = torch.iinfo(wide.dtype)
    if ignored is not None and limits.min <= ignored <= limits.max:
        skipped = wide == ignored
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
            words[_LABEL_OUT_OF_RANGE].masked_fill_(~allowed.all(), 1)
        return
    if bool(allowed.all()):
        return
    outside = ~allowed
    index = tuple(int(i) for i in torch.nonzero(outside)[0])
    unless = "" if ignored is None else f" or ignore_index ({ignored})"
    raise ValueError(
        f"{_OP}: labels must be in [0, {classes}){unless}, got {labels[index].item()} at {index} "
        f"({int(outside.sum())} such pixels)"
    )
