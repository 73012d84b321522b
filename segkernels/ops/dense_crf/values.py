"""What only the values of `dense_crf`'s arguments show: doubts, and words for invalid values.

Only tensors in CPU memory are read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from segkernels import _status
from segkernels.ops import _arguments
from segkernels.ops._operator import can_read_values

QUIET, ALLOWED = 1e-2, 0.5  # kQuiet, kAllowed in csrc/permutohedral/filter.h


def doubtful_unit(image: torch.Tensor, srgb: float) -> str:
    """Return a warning if `srgb` is so large for the image's values that it has no edge, or "".

    `srgb` is the smallest of the channels. Only floats are read.
    """
    floats = image.dtype.is_floating_point
    if not floats or image.numel() == 0 or srgb < 1 or not can_read_values(image):
        return ""
    low, high = (float(x) for x in image.detach().aminmax())
    limit = srgb / 4
    if not low < high or max(-low, high) > max(1.0, limit):
        return ""
    effect = "so the image has almost no effect; srgb is in the unit of the image's values"
    if low >= 0 and high <= 1:
        return (
            f"the image's values are from 0 to 1 and srgb is {srgb:g}, {effect}: use about 13/255"
        )
    return (
        f"the image's values are from -{max(1.0, limit):g} to {max(1.0, limit):g} and srgb is "
        f"{srgb:g}, {effect}: pass the image before its normalisation, or a smaller srgb"
    )


def doubtful_kind(scores: torch.Tensor, kind: str) -> str:
    """Return a warning if unaries or logits (B, C, *spatial) look like probabilities, or ""."""
    if kind == "probs" or scores.shape[1] == 1 or not can_read_values(scores):
        return ""
    scores = scores.detach()
    # The first pixel excludes almost all energies and logits, so the others are not read.
    if not _are_probs(scores[:1].flatten(2)[:, :, :1]) or not _are_probs(scores):
        return ""
    meaning, effect = (
        ("energies, -log p", "invert") if kind == "unary" else ("log-probabilities", "weaken")
    )
    return (
        f"{kind} are {meaning}, but they are from 0 to 1 and sum to 1 over the classes, as "
        f"probabilities do; this would {effect} them: pass them as probs"
    )


def _are_probs(scores: torch.Tensor) -> bool:
    low, high = scores.aminmax()
    return bool(low >= 0) and bool(high <= 1) and _sum_to_one(scores, 1)


def _sum_to_one(probs: torch.Tensor, axis: int) -> bool:
    tolerance = 1e-3 if probs.dtype.itemsize > 2 else 1e-2
    return bool(((probs.float().sum(dim=axis) - 1).abs() <= tolerance).all())


def is_volume(scores: torch.Tensor, kind: str) -> bool:
    """Whether scores that are read as (B, C, H, W) must be a volume (C, D, H, W).

    The probabilities of a volume sum to 1 over axis 0 and not over axis 1.
    """
    if scores.shape[0] == 1 or not can_read_values(scores):
        return False
    scores = scores.detach()
    first = scores.flatten(2)[:, :, :1]  # excludes almost all batches
    if not _sum_to_one(_probs(first, kind), 0):
        return False
    probs = _probs(scores, kind)
    return _sum_to_one(probs, 0) and not _sum_to_one(probs, 1)


def _probs(scores: torch.Tensor, kind: str) -> torch.Tensor:
    return scores if kind == "probs" else (scores if kind == "logits" else -scores).float().exp()


def describe(
    codes: Collection[int],
    kind: str,
    scores: torch.Tensor,
    axis: int,
    given: Mapping[str, Any],
    features: Mapping[str, torch.Tensor],
) -> str:
    """Say which value of `dense_crf`'s arguments is invalid, and where; "" if it is not found.

    Args:
        codes: status codes.
        kind: the name of the scores.
        scores: as given.
        axis: of the classes in `scores`.
        given: the image and the features of `PairwiseTerm`s as given, by their names.
        features: of each term, divided by the sigmas.
    """
    if _status.FEATURES_NOT_FINITE in codes:
        tensors = {name: _floats(value) for name, value in given.items()}
        text = _status.describe_features([_status.FEATURES_NOT_FINITE], tensors)
        if text:
            return text
    text = _status.describe_features(codes, features)
    if text:
        return text
    if _status.SCORES_NOT_FINITE in codes:
        return _invalid_scores(kind, scores, axis)
    for code, limit, end in (
        (_status.PROBS_OUT_OF_RANGE, ALLOWED, ""),
        (_status.PROBS_CLIPPED, QUIET, "; such values are clipped"),
    ):
        outside = (scores < -limit) | (scores > 1 + limit)
        if code in codes and bool(outside.any()):
            where = _status.first_invalid(scores, outside)
            return f"{kind} must be from 0 to 1, got {where}{end}"
    return ""


def _floats(values: Any) -> torch.Tensor:
    """Return an image as a tensor; one of integers, which are finite, as an empty one."""
    if not isinstance(values, torch.Tensor):
        values = _arguments.from_numpy(np.asarray(values))
    return values.detach() if values.dtype.is_floating_point else torch.empty(0)


def invalid_scores(scores: torch.Tensor, kind: str) -> torch.Tensor:
    """Mask of the scores that are NaN, infinitely certain, or not finite for probabilities."""
    if kind == "probs":
        return ~torch.isfinite(scores)
    return scores.isnan() | (scores == (float("inf") if kind == "logits" else -float("inf")))


def _invalid_scores(kind: str, scores: torch.Tensor, axis: int) -> str:
    invalid = invalid_scores(scores, kind)
    impossible = {"probs": "", "logits": " or -inf", "unary": " or inf"}[kind]
    if bool(invalid.any()):
        where = _status.first_invalid(scores, invalid)
        return f"{kind} must be finite{impossible}, got {where}"
    nowhere = scores.isinf().all(dim=axis, keepdim=True)
    if not bool(nowhere.any()):
        return ""
    where = _status.first_invalid(scores.narrow(axis, 0, 1), nowhere)
    return f"{kind} must leave a class possible at every pixel, got {where} for all classes"
