"""Scatter-add and gather at the positions recorded by max pooling.

They are the gradients of max pooling (scatter-add) and of max unpooling (gather), and each is the
transpose of the other. A position is a uint8 code (the flat index of a cell in its window) or an
int64 index (the flat index of a pixel in the plane).
"""

from __future__ import annotations

import torch

from segkernels import _native
from segkernels.ops import _dtypes, _windows
from segkernels.ops._operator import Operator
from segkernels.ops._windows import Windows


def _scatter_add(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Scatter-add `grad` [N, C, *pooled] to its positions in an [N, C, *full] tensor of zeros."""
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
    """Whether the CPU kernel needs one float32 plane per thread as workspace.

    It then accumulates a plane in float32 and rounds it once.
    """
    if w.channels_last or grad.dtype not in (torch.float16, torch.bfloat16):
        return False
    return positions.dtype == torch.int64 or not w.tile_the_plane


def _gather(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Gather [N, C, *pooled] from `grad` [N, C, *full] at the positions.

    The result is zero where a position is outside the plane; the forward pass has reported it.
    """
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


def _gather_transpose(x: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Scatter-add `x` and skip positions outside the plane, which indices of unpooling may be."""
    if positions.dtype == torch.uint8:
        out: torch.Tensor = scatter_add(x, positions, w)
        return out
    pixels = w.full[0] * w.full[1]
    index = positions.flatten(-2)
    inside = (index >= 0) & (index < pixels)
    values = x.flatten(-2).masked_fill(~inside, 0)
    if x.is_cuda:  # scatter_add is not deterministic on CUDA, an accumulating index_put is
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
    transpose=_gather_transpose,
)
