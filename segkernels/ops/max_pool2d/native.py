"""The native calls of max_pool2d."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels import _dtypes, _native
from segkernels.ops import _windows
from segkernels.ops._windows import Windows

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Pooling(NamedTuple):
    """What is pooled, and whether indices are asked for."""

    windows: Windows
    return_indices: bool


def outputs(x: torch.Tensor, p: Pooling) -> Three:
    """Uninitialised values, codes and indices.

    Codes are empty where a window has too many cells for them, indices where it has not and nobody
    asked for them.
    """
    w, many = p.windows, p.windows.many_cells
    return (
        _windows.empty(x, w.pooled, w),
        _windows.empty(x, (0, 0) if many else w.pooled, w, torch.uint8),
        _windows.empty(x, w.pooled if many or p.return_indices else (0, 0), w, torch.int64),
    )


def pool(x: torch.Tensor, p: Pooling) -> Three:
    """Values, codes and indices of the 4-D `x`."""
    values, codes, indices = found = outputs(x, p)
    _run(
        x,
        p.windows,
        values,
        codes if codes.numel() else None,
        indices if indices.numel() else None,
    )
    return found


def pool_values(x: torch.Tensor, w: Windows) -> torch.Tensor:
    """Values alone."""
    values = _windows.empty(x, w.pooled, w)
    _run(x, w, values, None, None)
    return values


def pool_positions(x: torch.Tensor, p: Pooling) -> tuple[torch.Tensor, torch.Tensor]:
    """Values, and indices or codes."""
    w = p.windows
    values = _windows.empty(x, w.pooled, w)
    positions = _windows.empty(x, w.pooled, w, torch.int64 if p.return_indices else torch.uint8)
    _run(x, w, values, *((None, positions) if p.return_indices else (positions, None)))
    return values, positions


def _run(
    x: torch.Tensor,
    w: Windows,
    values: torch.Tensor,
    codes: torch.Tensor | None,
    indices: torch.Tensor | None,
) -> None:
    if values.numel() == 0:
        return
    x = x.contiguous(memory_format=w.memory_format)
    _native.C().max_pool2d(
        _native.where(x),
        _windows.native(w, x),
        _dtypes.FLOATING[x.dtype],
        x,
        values,
        codes,
        indices,
    )


def send_back(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Scatter-add `grad` to the recorded positions."""
    out = _windows.empty(grad, w.full, w)
    if out.numel() == 0:
        return out
    grad = grad.contiguous(memory_format=w.memory_format)
    positions = positions.contiguous(memory_format=w.memory_format)
    where = _native.where(grad)
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
