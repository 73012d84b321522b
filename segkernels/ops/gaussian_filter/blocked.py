"""The filter in blocks of torch operators that never hold the N x N weights: on the CPU, and in
float64 on CUDA.

Distances are sums of squared differences: the expansion |x|^2 + |y|^2 - 2 x y loses digits where
features are large beside their differences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from segkernels.ops.gaussian_filter.points import TILE, Points

QUERIES = 4 * TILE
_LARGE = 4096  # queries and keys of a block on CUDA
KEYS = 512  # keys of a block at most: the weights of a block then stay in a core's cache


def apply(queries: Points, keys: Points, rows: torch.Tensor, reach: float) -> torch.Tensor:
    """K rows: (B, P_keys, C) to (B, P_queries, C).

    Args:
        queries, keys: the points.
        rows: values at the keys, in order.
        reach: squared distances above this have no weight.
    """
    out = rows.new_zeros(rows.shape[0], queries.features.shape[2], rows.shape[2])
    for image, at, near in blocks(queries, keys, reach):
        x = queries.features[image, :, at]
        into = out[image, at]
        for part in near.split(KEYS if near.device.type == "cpu" else _LARGE):
            into.addmm_(_weights(x, keys.features[image, :, part]), rows[image, part])
    return out


def pull(
    queries: Points,
    keys: Points,
    a: torch.Tensor,
    b: torch.Tensor,
    reach: float,
) -> torch.Tensor:
    """sum_j k_ij <a_i, b_j> (y_j - x_i) for queries x and keys y: rows (B, P_queries, d)."""
    dims = queries.features.shape[1]
    out = a.new_zeros(a.shape[0], a.shape[1], dims)
    for image, at, near in blocks(queries, keys, reach):
        x = queries.features[image, :, at]
        for part in near.split(KEYS if near.device.type == "cpu" else _LARGE):
            y = keys.features[image, :, part]
            weights = _weights(x, y).mul_(a[image, at] @ b[image, part].T)
            for k in range(dims):
                step = y[k].unsqueeze(0) - x[k].unsqueeze(1)
                out[image, at, k] += step.mul_(weights).sum(dim=1)
    return out


def blocks(
    queries: Points, keys: Points, reach: float
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(image, some neighbouring queries, the positions of the keys that have weight there)."""
    device, count = keys.features.device, queries.features.shape[2]
    skips = device.type == "cpu"  # elsewhere to look at distances would be to wait for them
    size = QUERIES if skips else _LARGE
    low, high = keys.boxes(TILE)
    first, last = queries.boxes(size)
    within = torch.arange(TILE, device=device)
    tiles = torch.arange(keys.tiles, device=device).unsqueeze(1)
    for image in range(low.shape[0]):
        for block in range(first.shape[2]):
            if skips:
                gap = _gap(first[image, :, block], last[image, :, block], low[image], high[image])
                tiles = (gap <= reach).nonzero()
            at = slice(block * size, min((block + 1) * size, count))
            yield image, at, (tiles * TILE + within).view(-1)


def _gap(
    first: torch.Tensor, last: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """Squared distances from one box to others, (d,) and (d, T)."""
    apart = torch.maximum(low - last.unsqueeze(1), first.unsqueeze(1) - high)
    return apart.clamp_(min=0).square_().sum(dim=0)


def _weights(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-|x_i - y_j|^2 / 2) for (d, M) and (d, N): (M, N)."""
    total = x.new_zeros(x.shape[1], y.shape[1])
    step = torch.empty_like(total)
    for k in range(x.shape[0]):
        torch.sub(x[k].unsqueeze(1), y[k].unsqueeze(0), out=step)
        total.addcmul_(step, step)
    return total.mul_(-0.5).exp_()
