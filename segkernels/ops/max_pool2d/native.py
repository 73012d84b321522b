"""The native call of max_pool2d."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels import _native
from segkernels.ops import _dtypes, _windows
from segkernels.ops._windows import Windows

# (values, codes, indices); None for positions that are not computed.
Outputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Pooling(NamedTuple):
    """The windows, and which positions the caller requested."""

    windows: Windows
    return_codes: bool
    return_indices: bool


def outputs(x: torch.Tensor, p: Pooling) -> Outputs:
    """Return uninitialised outputs, with the positions that the backward pass needs.

    These are codes, or indices for windows too large for codes. Indices are also included if the
    caller requested them.
    """
    too_large = _windows.too_large_for_codes(p.windows.kernel_size)
    return _empty(x, p.windows, not too_large, too_large or p.return_indices)


def pool(x: torch.Tensor, p: Pooling) -> Outputs:
    """Pool the 4-D `x`; compute also the positions that the backward pass needs."""
    return _run(x, p.windows, outputs(x, p))


def pool_direct(x: torch.Tensor, p: Pooling) -> Outputs:
    """Pool the 4-D `x`; compute only the positions that the caller requested."""
    return _run(x, p.windows, _empty(x, *p))


def _empty(x: torch.Tensor, w: Windows, codes: bool, indices: bool) -> Outputs:
    return (
        _windows.empty(x, w.pooled, w),
        _windows.empty(x, w.pooled, w, torch.uint8) if codes else None,
        _windows.empty(x, w.pooled, w, torch.int64) if indices else None,
    )


def _run(x: torch.Tensor, w: Windows, out: Outputs) -> Outputs:
    if out[0].numel() > 0:
        where = _native.where(x)
        x = x.contiguous(memory_format=w.memory_format)
        _native.C().max_pool2d(where, _windows.native(w, x), _dtypes.FLOATING[x.dtype], x, *out)
    return out
