"""The native calls of unpool_nearest and unpool_bed_of_nails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from segkernels import _native
from segkernels.ops import _dtypes, _windows
from segkernels.ops._arguments import Int2
from segkernels.ops._windows import Windows


class BedOfNails(NamedTuple):
    """The blocks, and the cell (row, column) of every block that has its value."""

    windows: Windows
    cell: Int2


def nearest(x: torch.Tensor, w: Windows) -> torch.Tensor:
    """Write every value of the 4-D `x` to all cells of its block."""
    return _run(_native.C().unpool_nearest, x, w.full, w)


def nearest_backward(grad: torch.Tensor, w: Windows) -> torch.Tensor:
    """Sum every block."""
    return _run(_native.C().unpool_nearest_backward, grad, w.pooled, w)


def bed_of_nails(x: torch.Tensor, n: BedOfNails) -> torch.Tensor:
    """Write every value of the 4-D `x` to one cell of its block, and zero to the others."""
    w = n.windows
    cell = n.cell[0] * w.kernel_size[1] + n.cell[1]
    return _run(_native.C().unpool_bed_of_nails, x, w.full, w, cell)


def bed_of_nails_backward(grad: torch.Tensor, n: BedOfNails) -> torch.Tensor:
    """Read one cell of every block."""
    w, (row, column) = n
    _native.where(grad)  # checks the device, and limits torch to one thread after a fork
    out = _windows.empty(grad, w.pooled, w)
    return out.copy_(grad[:, :, row :: w.kernel_size[0], column :: w.kernel_size[1]])


def _run(
    function: Callable[..., Any], x: torch.Tensor, size: Int2, w: Windows, *args: int
) -> torch.Tensor:
    out = _windows.empty(x, size, w)
    if out.numel() > 0:
        where = _native.where(x)
        x = x.contiguous(memory_format=w.memory_format)
        function(where, _windows.native(w, x), _dtypes.FLOATING[x.dtype], x, out, *args)
    return out
