"""The native calls of max_pool2d."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels import _dtypes, _native
from segkernels.ops import _windows
from segkernels.ops._windows import Windows

# Values, codes and indices.
Found = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Pooling(NamedTuple):
    """What is pooled, and which positions are asked for."""

    windows: Windows
    return_codes: bool
    return_indices: bool


def outputs(x: torch.Tensor, p: Pooling) -> Found:
    """Uninitialised values, and codes, or indices where a window has too many cells for codes.

    Indices also where they are asked for.
    """
    many = p.windows.many_cells
    return _empty(x, p.windows, not many, many or p.return_indices)


def pool(x: torch.Tensor, p: Pooling) -> Found:
    """Values and positions of the 4-D `x`; codes or indices are there for the backward pass."""
    return _run(x, p.windows, outputs(x, p))


def pool_direct(x: torch.Tensor, p: Pooling) -> Found:
    """Values, and only the positions that are asked for."""
    return _run(x, p.windows, _empty(x, *p))


def _empty(x: torch.Tensor, w: Windows, codes: bool, indices: bool) -> Found:
    return (
        _windows.empty(x, w.pooled, w),
        _windows.empty(x, w.pooled, w, torch.uint8) if codes else None,
        _windows.empty(x, w.pooled, w, torch.int64) if indices else None,
    )


def _run(x: torch.Tensor, w: Windows, to: Found) -> Found:
    if to[0].numel() > 0:
        where = _native.where(x)
        x = x.contiguous(memory_format=w.memory_format)
        _native.C().max_pool2d(where, _windows.native(w, x), _dtypes.FLOATING[x.dtype], x, *to)
    return to


def send_back(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Scatter-add `grad` to the recorded positions."""
    out = _windows.empty(grad, w.full, w)
    if out.numel() == 0:
        return out
    where = _native.where(grad)
    grad = grad.contiguous(memory_format=w.memory_format)
    positions = positions.contiguous(memory_format=w.memory_format)
    sums = None
    if where[0] < 0 and _needs_sums(grad, positions, w):
        planes = min(max(where[2], 1), grad.size(0) * grad.size(1))
        sums = torch.empty((planes, *w.full), dtype=torch.float32, device="cpu")
    _native.C().max_pool2d_backward(
        where,
        _windows.native(w, grad),
        _dtypes.FLOATING[grad.dtype],
        grad,
        positions,
        positions.dtype == torch.int64,
        out,
        sums,
    )
    return out


def _needs_sums(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> bool:
    """Whether the CPU adds up in float planes, one a thread, and rounds them."""
    if w.channels_last or grad.dtype not in (torch.float16, torch.bfloat16):
        return False
    return positions.dtype == torch.int64 or not w.tile_the_plane
