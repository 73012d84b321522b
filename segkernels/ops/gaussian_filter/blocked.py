"""The filter in blocks of torch operators that never hold the N x N weights: float64 on CUDA, and
what the tests hold the native and the Triton kernels against.

Distances are sums of squared differences: the expansion |x|^2 + |y|^2 - 2 x y loses digits where
features are large beside their differences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from segkernels import _native
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
    for image, at, near in _blocks(queries, keys, reach):
        x = queries.features[image, :, at]
        into = out[image, at]
        for part in near.split(_LARGE if _native.on_cuda(near.device) else KEYS):
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
    for image, at, near in _blocks(queries, keys, reach):
        x = queries.features[image, :, at]
        for part in near.split(_LARGE if _native.on_cuda(near.device) else KEYS):
            y = keys.features[image, :, part]
            weights = _weights(x, y).mul_(a[image, at] @ b[image, part].T)
            for k in range(dims):
                step = y[k].unsqueeze(0) - x[k].unsqueeze(1)
                out[image, at, k] += step.mul_(weights).sum(dim=1)
    return out


def _blocks(
    queries: Points, keys: Points, reach: float
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(image, some neighbouring queries, the positions of the keys that have weight there)."""
    device, count = keys.features.device, queries.features.shape[2]
    skips = not _native.on_cuda(device)  # there to look at distances would be to wait for them
    size = QUERIES if skips else _LARGE
    within = torch.arange(TILE, device=device)
    tiles = torch.arange(keys.tiles, device=device).unsqueeze(1)
    for image in range(keys.features.shape[0]):
        for block, near in enumerate(tiles_within(queries, keys, reach, size, image)):
            if skips:
                tiles = near.nonzero()
            at = slice(block * size, min((block + 1) * size, count))
            yield image, at, (tiles * TILE + within).view(-1)


def tiles_within(
    queries: Points, keys: Points, reach: float, size: int, image: int
) -> Iterator[torch.Tensor]:
    """For every `size` queries of an image: which tiles of keys are within reach, (T,) bool."""
    low, high = (box[image] for box in keys.boxes(TILE))
    first, last = (box[image] for box in queries.boxes(size))
    for block in range(first.shape[1]):
        at = slice(block, block + 1)
        gap = torch.maximum(low - last[:, at], first[:, at] - high)
        yield gap.clamp_(min=0).square_().sum(dim=0) <= reach


def _weights(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-|x_i - y_j|^2 / 2) for (d, M) and (d, N): (M, N)."""
    total = x.new_zeros(x.shape[1], y.shape[1])
    step = torch.empty_like(total)
    for k in range(x.shape[0]):
        torch.sub(x[k].unsqueeze(1), y[k].unsqueeze(0), out=step)
        total.addcmul_(step, step)
    return total.mul_(-0.5).exp_()
