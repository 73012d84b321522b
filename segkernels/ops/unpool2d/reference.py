"""unpool_nearest and unpool_bed_of_nails in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels.ops.max_pool2d.reference import pair


def unpool_nearest(input: torch.Tensor, kernel_size: int | Sequence[int]) -> torch.Tensor:
    """As `segkernels.unpool_nearest`; any dtype and device."""
    height, width = pair(kernel_size)
    return input.repeat_interleave(height, -2).repeat_interleave(width, -1)


def unpool_bed_of_nails(
    input: torch.Tensor, kernel_size: int | Sequence[int], cell: int | Sequence[int] = 0
) -> torch.Tensor:
    """As `segkernels.unpool_bed_of_nails`; any dtype and device."""
    height, width = pair(kernel_size)
    row, column = pair(cell)
    *outer, rows, columns = input.shape
    out = input.new_zeros((*outer, rows * height, columns * width))
    out[..., row::height, column::width] = input
    return out
