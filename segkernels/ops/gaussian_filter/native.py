"""The exact filter on the CPU: calls of the native kernel."""

from __future__ import annotations

import torch

from segkernels import _native
from segkernels.ops.gaussian_filter.points import TILE, Points


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
