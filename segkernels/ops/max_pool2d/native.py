"""The native call of max_pool2d."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels import _native
from segkernels.ops import _dtypes, _windows
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
