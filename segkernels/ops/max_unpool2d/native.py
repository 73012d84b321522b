"""The native call of max_unpool2d."""

from __future__ import annotations

import torch

from segkernels import _native, _status
from segkernels.ops import _dtypes, _windows
from segkernels.ops._windows import Windows


def unpool(x: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Unpool the 4-D `x` [N, C, *pooled]; `positions` are uint8 codes or int64 indices."""
    out = _windows.empty(x, w.full, w)
    if out.numel() == 0:
        return out
    where = _native.where(x)
    x = x.contiguous(memory_format=w.memory_format)
    positions = positions.contiguous(memory_format=w.memory_format)
    wide = positions.dtype == torch.int64
    winners = None
    if wide and where[0] >= 0:  # workspace: the last value with each index
        sources = w.pooled[0] * w.pooled[1]
        dtype = torch.int32 if sources < 2**31 else torch.int64
        winners = _windows.empty(x, w.full, w, dtype)
    windows, dtype_code = _windows.native(w, x), _dtypes.FLOATING[x.dtype]
    args = where, windows, dtype_code, x, positions, wide, out, winners
    if where[0] < 0:
        _status.raise_if_set(_native.C().max_unpool2d(*args, None), "max_unpool2d")
        return out
    with _status.watch(x, "max_unpool2d") as status:
        _native.C().max_unpool2d(*args, status)
    return out
