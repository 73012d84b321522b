"""The exact filter in torch operators, block by block, without the N x N matrix of weights.

It computes float64 on CUDA, and is the reference for the tests of the native and Triton kernels.

Distances are sums of squared differences. The expansion |x|^2 + |y|^2 - 2 x y would lose digits
where features are large compared with their differences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from segkernels import _native
from segkernels.ops.gaussian_filter.points import TILE, Points

QUERIES = 4 * TILE
_CUDA_BLOCK = 4096  # queries, and keys, of a block on CUDA
KEYS = 512  # maximum number of keys of a block: its weights then stay in a core's cache


def apply(queries: Points, keys: Points, rows: torch.Tensor, reach: float) -> torch.Tensor:
    """Multiply rows by K: (B, P_keys, C) to (B, P_queries, C).

    Args:
        queries, keys: the points.
        rows: values at the keys, in the order of `keys`.
        reach: weights at squared distances above this may count as 0.
    """
    out = rows.new_zeros(rows.shape[0], queries.features.shape[2], rows.shape[2])
    for image, block, near in _blocks(queries, keys, reach):
        x = queries.features[image, :, block]
        sums = out[image, block]
        for part in near.split(_CUDA_BLOCK if _native.on_cuda(near.device) else KEYS):
            sums.addmm_(_weights(x, keys.features[image, :, part]), rows[image, part])
    return out


def query_gradient(
    queries: Points,
    keys: Points,
    a: torch.Tensor,
    b: torch.Tensor,
    reach: float,
) -> torch.Tensor:
    """Gradient of sum_ij k_ij <a_i, b_j> with respect to the queries x: (B, P_queries, d).

    It is sum_j k_ij <a_i, b_j> (y_j - x_i), with y the keys.

    Args:
        queries, keys: the points.
        a: (B, P_queries, C) rows.
        b: (B, P_keys, C) rows.
        reach: as in `apply`.
    """
    dims = queries.features.shape[1]
    out = a.new_zeros(a.shape[0], a.shape[1], dims)
    for image, block, near in _blocks(queries, keys, reach):
        x = queries.features[image, :, block]
        for part in near.split(_CUDA_BLOCK if _native.on_cuda(near.device) else KEYS):
            y = keys.features[image, :, part]
            weights = _weights(x, y).mul_(a[image, block] @ b[image, part].T)
            for k in range(dims):
                difference = y[k].unsqueeze(0) - x[k].unsqueeze(1)
                out[image, block, k] += difference.mul_(weights).sum(dim=1)
    return out


def _blocks(
    queries: Points, keys: Points, reach: float
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Yield (image, a block of queries, positions of the keys within reach) for all queries."""
    device, count = keys.features.device, queries.features.shape[2]
    skips = not _native.on_cuda(device)  # on CUDA reading the distances would synchronise
    size = QUERIES if skips else _CUDA_BLOCK
    within = torch.arange(TILE, device=device)
    tiles = torch.arange(keys.tiles, device=device).unsqueeze(1)
    for image in range(keys.features.shape[0]):
        for block, near in enumerate(tiles_within(queries, keys, reach, size, image)):
            if skips:
                tiles = near.nonzero()
            some = slice(block * size, min((block + 1) * size, count))
            yield image, some, (tiles * TILE + within).view(-1)


def tiles_within(
    queries: Points, keys: Points, reach: float, size: int, image: int
) -> Iterator[torch.Tensor]:
    """Yield, for every `size` queries of an image, the tiles of keys within reach: (T,) bool."""
    low, high = (box[image] for box in keys.boxes(TILE))
    first, last = (box[image] for box in queries.boxes(size))
    for block in range(first.shape[1]):
        one = slice(block, block + 1)
        gap = torch.maximum(low - last[:, one], first[:, one] - high)
        yield gap.clamp_(min=0).square_().sum(dim=0) <= reach


def _weights(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-|x_i - y_j|^2 / 2) for (d, M) and (d, N): (M, N)."""
    total = x.new_zeros(x.shape[1], y.shape[1])
    difference = torch.empty_like(total)
    for k in range(x.shape[0]):
        torch.sub(x[k].unsqueeze(1), y[k].unsqueeze(0), out=difference)
        total.addcmul_(difference, difference)
    return total.mul_(-0.5).exp_()
