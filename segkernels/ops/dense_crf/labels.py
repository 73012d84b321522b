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
# Compared in int64. Labels of all other dtypes fit int32, with -1 for unknown.
_INT64_DTYPES = (torch.int64, torch.uint32, torch.uint64)


def probs_from_labels(
    labels: Labels,
    num_classes: int,
    gt_prob: float = 0.7,
    ignore_index: int | None = None,
) -> Labels:
    """Turn hard labels into the class probabilities that `dense_crf` refines.

    A pixel with label c gets `gt_prob` for class c and ``(1 - gt_prob) / (C - 1)`` for each other
    class. A pixel whose label is `ignore_index` gets 1 / C for every class, so the CRF decides it
    from its neighbours. With one class every probability is 1. These are the unaries of
    ``unary_from_labels`` in pydensecrf, as probabilities.

    Args:
        labels: from 0 to num_classes - 1, or `ignore_index`, of any integer dtype: a numpy array or
            a torch tensor `(H, W)`, `(B, H, W)` or, for volumes, `(B, D, H, W)`.
        num_classes: C, at least 1.
        gt_prob: the probability that a label is right, between 0 and 1, both excluded.
        ignore_index: the label of unknown pixels: any integer, in [0, C) or not. None: every pixel
            is labelled.

    Returns:
        float32 probabilities, an array or a tensor as `labels`, on the same device: `(C, H, W)`,
        `(B, C, H, W)` or `(B, C, D, H, W)`. They sum to 1 over the classes.

    Raises:
        TypeError: `labels` is neither an array nor a tensor, or is not of an integer dtype;
            `num_classes` or `ignore_index` is not an integer.
        ValueError: a wrong rank, an empty map, `num_classes` below 1, a `gt_prob` outside (0, 1),
            or a label outside [0, C) that is not `ignore_index`. On CUDA the pixel is treated as
            unknown and `segkernels.check` raises.
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
        _check_map(labels.ndim, labels.shape, labels.size, labels.dtype.kind in "iu", labels.dtype)
        return _expand(_as_tensor(labels), classes, float(gt_prob), ignored).numpy()
    if isinstance(labels, torch.Tensor):
        whole = not (
            labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
        )
        _check_map(labels.ndim, tuple(labels.shape), labels.numel(), whole, labels.dtype)
        return _expand(labels, classes, float(gt_prob), ignored)
    raise TypeError(
        f"{_OP}: labels must be a numpy array or a torch tensor, got {type(labels).__name__}"
    )


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{_OP}: {name} must be an integer, got {value!r}")
    return int(value)


def _check_map(rank: int, shape: tuple[int, ...], size: int, whole: bool, dtype: object) -> None:
    if not whole:
        raise TypeError(f"{_OP}: labels must have an integer dtype, got {dtype}")
    if rank not in (2, 3, 4):
        raise ValueError(
            f"{_OP}: labels must be (H, W), (B, H, W) or (B, D, H, W), got shape {shape}"
        )
    if size == 0:
        raise ValueError(f"{_OP}: labels must have at least one pixel, got shape {shape}")


def _as_tensor(labels: npt.NDArray[np.generic]) -> torch.Tensor:
    """The array as a tensor, copied where torch cannot share its memory."""
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
    """Report labels that are no class: raise on the CPU, set a status word on CUDA."""
    if labels.is_cuda:
        with _status.watch(labels, _OP) as words:
            words[_LABEL_OUT_OF_RANGE].masked_fill_(~allowed.all(), 1)
        return
    if bool(allowed.all()):
        return
    wrong = ~allowed
    where = tuple(int(i) for i in torch.nonzero(wrong)[0])
    unless = "" if ignored is None else f" or ignore_index ({ignored})"
    raise ValueError(
        f"{_OP}: labels must be in [0, {classes}){unless}, got {labels[where].item()} at {where} "
        f"({int(wrong.sum())} such pixels)"
    )
