"""The exact filter on the CPU: calls of the native functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from segkernels import _native
from segkernels.ops.gaussian_filter.points import TILE, Points


class Values(NamedTuple):
    """Sorted values.

    Attributes:
        sorted: (B, P, C) rows, or (B, C, P); 0 at invalid points, in channels with a value that is
            not finite, and in the padding.
        not_finite: (B, C, 1) bool, channels with a value that is not finite.
    """

    sorted: torch.Tensor
    not_finite: torch.Tensor


def apply(queries: Points, keys: Points, rows: torch.Tensor, reach: float) -> torch.Tensor:
    """Multiply rows by K: (B, P_keys, C) to (B, C, P_queries)."""
    out = rows.new_empty(rows.shape[0], rows.shape[2], queries.features.shape[2])
    return _run(queries, keys, None, rows, reach, out)


def query_gradient(
    queries: Points, keys: Points, a: torch.Tensor, b: torch.Tensor, reach: float
) -> torch.Tensor:
    """sum_j k_ij <a_i, b_j> (y_j - x_i), as `blocked.query_gradient`: (B, d, P_queries).

    `a` is (B, C, P_queries); `b` are rows, (B, P_keys, C).
    """
    return _run(queries, keys, a.contiguous(), b, reach, torch.empty_like(queries.features))


def sort_values(
    points: Points, values: torch.Tensor, rows: bool, least_sum: float | None = None
) -> Values:
    """Sort (B, C, N) values, as rows or as planes.

    With `least_sum`, a channel of ones is appended.
    """
    if (values.shape[0], values.shape[2]) != tuple(points.invalid.shape):
        raise RuntimeError(
            f"gaussian_filter: values must be (B, C, N) for points (B, N) of shape "
            f"{tuple(points.invalid.shape)}, got {tuple(values.shape)}"
        )
    values = values.contiguous()
    batch, channels, _ = values.shape
    padded, total = points.features.shape[2], channels + (least_sum is not None)
    out = values.new_empty((batch, padded, total) if rows else (batch, total, padded))
    not_finite = points.invalid.new_empty((batch, channels, 1))
    strides = (total, 1) if rows else (1, padded)
    order = points.order.contiguous()
    _reorder(_native.C().gaussian_sort, points, strides, order, not_finite, values, out, least_sum)
    return Values(out, not_finite)


def unsort_values(
    points: Points,
    values: torch.Tensor,
    not_finite: torch.Tensor,
    least_sum: float | None = None,
) -> torch.Tensor:
    """Return sorted (B, C, P) values in the original order: (B, C, N).

    Invalid points, and channels that are not finite, are NaN.

    With `least_sum`, the last channel holds sums of weights, by which the others are divided; where
    a sum is less, they become 0.
    """
    channels = values.shape[1] - (least_sum is not None)
    out = values.new_empty((values.shape[0], channels, points.count))
    strides = (1, values.shape[2])
    flags = not_finite.expand(-1, channels, -1).contiguous()
    order = points.inverse
    _reorder(_native.C().gaussian_unsort, points, strides, order, flags, values, out, least_sum)
    return out


def _reorder(
    function: Callable[..., None],
    points: Points,
    strides: tuple[int, int],
    index: torch.Tensor,
    not_finite: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    least_sum: float | None,
) -> None:
    function(
        _native.where(source),
        (*not_finite.shape[:2], points.count, points.features.shape[2]),
        strides,
        index,
        points.invalid,
        not_finite,
        source,
        target,
        least_sum,
        source.dtype == torch.float64,
    )


def _run(
    queries: Points,
    keys: Points,
    a: torch.Tensor | None,
    b: torch.Tensor,
    reach: float,
    out: torch.Tensor,
) -> torch.Tensor:
    boxes = queries.boxes(TILE), keys.boxes(TILE)
    sides = [
        (p.features, low, high, p.features.shape[2])
        for p, (low, high) in zip((queries, keys), boxes, strict=True)
    ]
    _native.C().gaussian_filter(
        _native.where(b),
        *sides,
        b.shape[0],
        queries.features.shape[1],
        b.shape[2],
        reach,
        a,
        b,
        out,
        b.dtype == torch.float64,
    )
    return out
