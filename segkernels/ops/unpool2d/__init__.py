"""Unpooling without positions: nearest-neighbour and "bed of nails"."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from segkernels.ops import _arguments, _operator, _registry, _windows
from segkernels.ops._arguments import Int2
from segkernels.ops._windows import Windows
from segkernels.ops.unpool2d import operator
from segkernels.ops.unpool2d.native import BedOfNails

_registry.register(
    _registry.Op(
        name="unpool2d",
        functions=("unpool_nearest", "unpool_bed_of_nails"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        layouts=("contiguous", "channels_last"),
        differentiable=("input",),
        library_ops=(
            "segkernels::unpool_nearest",
            "segkernels::unpool_nearest_backward",
            "segkernels::unpool_bed_of_nails",
            "segkernels::unpool_bed_of_nails_backward",
        ),
        note="twice differentiable",
    )
)


def unpool_nearest(input: torch.Tensor, kernel_size: int | Sequence[int]) -> torch.Tensor:
    """Repeat every value over a block of `kernel_size`: nearest-neighbour unpooling.

    ``out[..., y, x] = input[..., y // kernel_height, x // kernel_width]``, which equals
    ``torch.nn.functional.interpolate(input, scale_factor=kernel_size)``. The gradient with respect
    to a value is the sum over its block, in row order, accumulated in float32 (float64 for
    float64).

    Args:
        input: [N, C, H, W] or [C, H, W], float16, bfloat16, float32 or float64. Contiguous and
            channels_last tensors are read without a copy and the layout is preserved; tensors with
            other strides are copied first.
        kernel_size: height and width of a block, or one int for both.

    Returns:
        [N, C, H * kernel_height, W * kernel_width] (without N if `input` has none), in the dtype
        and layout of `input`.

    Raises:
        TypeError: `input` has another dtype, or `kernel_size` another type.
        RuntimeError: `input` has another number of dimensions, or `kernel_size` is not positive.
        ValueError: the output would have 2^31 rows or columns.
    """
    blocks = _check(input, kernel_size, "unpool_nearest")
    if _operator.must_call_torch():
        height, width = blocks.kernel_size
        return input.repeat_interleave(height, -2).repeat_interleave(width, -1)
    if input.dim() == 4:
        out: torch.Tensor = operator.nearest(input, blocks)
        return out
    return operator.nearest(input.unsqueeze(0), blocks).squeeze(0)


def unpool_bed_of_nails(
    input: torch.Tensor, kernel_size: int | Sequence[int], cell: int | Sequence[int] = 0
) -> torch.Tensor:
    """Write every value to one cell of a block of `kernel_size`, and zero to the other cells.

    This is "bed of nails" unpooling. The value is in the block's upper left cell (Dosovitskiy et
    al. 2015, "Learning to Generate Chairs with Convolutional Neural Networks") or in `cell`. The
    gradient with respect to a value is the output gradient at that cell.

    Args:
        input: [N, C, H, W] or [C, H, W], float16, bfloat16, float32 or float64. Contiguous and
            channels_last tensors are read without a copy and the layout is preserved; tensors with
            other strides are copied first.
        kernel_size: height and width of a block, or one int for both.
        cell: (row, column) in the block, or one int for both; default (0, 0).

    Returns:
        [N, C, H * kernel_height, W * kernel_width] (without N if `input` has none), in the dtype
        and layout of `input`.

    Raises:
        TypeError: `input` has another dtype, or `kernel_size` or `cell` another type.
        RuntimeError: `input` has another number of dimensions, or `kernel_size` is not positive.
        ValueError: `cell` is outside the block, or the output would have 2^31 rows or columns.
    """
    blocks = _check(input, kernel_size, "unpool_bed_of_nails")
    height, width = blocks.kernel_size
    row, column = _arguments.pair(cell, "cell", "unpool_bed_of_nails")
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"unpool_bed_of_nails: cell must be inside the block of {height} x {width} cells, got "
            f"{(row, column)}"
        )
    if _operator.must_call_torch():
        pads = (column, width - 1 - column, 0, 0, row, height - 1 - row)
        cells = F.pad(input.unsqueeze(-1).unsqueeze(-3), pads)  # [..., H, height, W, width]
        return cells.flatten(-2).flatten(-3, -2)
    record = BedOfNails(blocks, (row, column))
    if input.dim() == 4:
        out: torch.Tensor = operator.bed_of_nails(input, record)
        return out
    return operator.bed_of_nails(input.unsqueeze(0), record).squeeze(0)


def _check(input: torch.Tensor, kernel_size: int | Sequence[int], function: str) -> Windows:
    """Check the arguments and return the blocks as windows that tile the output."""
    _arguments.check_tensor(input, "input", function)
    _arguments.check_floating(input, "input", function)
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"{function}: input must be [N, C, H, W] or [C, H, W], got shape {list(input.shape)}"
        )
    size = _arguments.pair(kernel_size, "kernel_size", function)
    channels_last = input.dim() == 4 and _operator.is_channels_last(input)
    make = _cached_blocks if _operator.is_eager(input) else _make_blocks
    return make(input.size(-2), input.size(-1), size, channels_last, function)


def _make_blocks(
    height: int, width: int, kernel_size: Int2, channels_last: bool, function: str
) -> Windows:
    full = (height * kernel_size[0], width * kernel_size[1])
    w = Windows(full, (height, width), kernel_size, kernel_size, (0, 0), (1, 1), channels_last)
    _windows.check_positive(w, function)
    _windows.check_range(w, function)
    return w


# For eager calls only: sizes are SymInts while tracing.
_cached_blocks = functools.lru_cache(maxsize=1024)(_make_blocks)
