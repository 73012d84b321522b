"""Gather and scatter-add at the positions that max pooling records: gradients of both directions.

A position is a one-byte code (a cell of a window) or an int64 index (a pixel of the plane). The
gradient of pooling scatter-adds, the gradient of unpooling gathers, and each is the transpose of
the other.
"""

from __future__ import annotations

import torch

from segkernels import _native
from segkernels.ops import _dtypes, _windows
from segkernels.ops._operator import Operator
from segkernels.ops._windows import Windows


def _scatter_add(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
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
    """Whether the CPU accumulates in one float32 plane a thread, and rounds at the end."""
    if w.channels_last or grad.dtype not in (torch.float16, torch.bfloat16):
        return False
    return positions.dtype == torch.int64 or not w.tile_the_plane


def _gather(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Zero for a position outside the plane: the forward pass has reported it."""
    out = _windows.empty(grad, w.pooled, w)
    if out.numel() == 0:
        return out
    if grad.numel() == 0:
        return out.zero_()
    where = _native.where(grad)
    grad = grad.contiguous(memory_format=w.memory_format)
    positions = positions.contiguous(memory_format=w.memory_format)
    _native.C().max_unpool2d_backward(
        where,
        _windows.native(w, grad),
        _dtypes.FLOATING[grad.dtype],
        grad,
        positions,
        positions.dtype == torch.int64,
        out,
        None,
    )
    return out


def _scatter_add_any(x: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Scatter-add to positions that may lie outside the plane, which unpooling allows."""
    if positions.dtype == torch.uint8:
        out: torch.Tensor = scatter_add(x, positions, w)
        return out
    pixels = w.full[0] * w.full[1]
    index = positions.flatten(-2)
    inside = (index >= 0) & (index < pixels)
    values = x.flatten(-2).masked_fill(~inside, 0)
    if x.is_cuda:  # scatter_add has no fixed order there
        planes = torch.arange(values.numel() // max(1, index.size(-1)), device=x.device)
        first = (planes * pixels).view(*values.shape[:-1], 1)
        at = (first + index.masked_fill(~inside, 0)).flatten()
        sums = values.new_zeros(planes.numel() * pixels)
        sums = sums.index_put((at,), values.flatten(), accumulate=True)
        return sums.view(*values.shape[:-1], *w.full)
    zeros = values.new_zeros((*values.shape[:-1], pixels))
    return zeros.scatter_add(-1, index.masked_fill(~inside, 0), values).unflatten(-1, w.full)


scatter_add: Operator = Operator(
    "max_pool2d_backward",
    "Tensor grad, Tensor positions",
    Windows,
    kernel=_scatter_add,
    fake=lambda grad, positions, w: _windows.empty(grad, w.full, w),
    transpose=lambda grad, positions, w: gather(grad, positions, w),
)
gather: Operator = Operator(
    "max_unpool2d_backward",
    "Tensor grad, Tensor positions",
    Windows,
    kernel=_gather,
    fake=lambda grad, positions, w: _windows.empty(grad, w.pooled, w),
    transpose=_scatter_add_any,
)
