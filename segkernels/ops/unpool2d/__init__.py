"""The two simple unpoolings: every value repeated, and every value at one cell of its block."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from segkernels.ops import _arguments, _dtypes, _operator, _registry, _windows
from segkernels.ops._arguments import Int2
from segkernels.ops._windows import Windows
from segkernels.ops.unpool2d import operator
from segkernels.ops.unpool2d.native import Nails

_registry.register(
    _registry.Op(
        name="unpool2d",
        functions=("unpool_nearest", "unpool_bed_of_nails"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        dtypes=_dtypes.names(),
        layouts=("contiguous", "channels_last"),
        deterministic=True,
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

    ``out[..., y, x] = input[..., y // kernel_height, x // kernel_width]``, as
    ``torch.nn.functional.interpolate(input, scale_factor=kernel_size)``. The gradient is the sum of
    a block, in row order, accumulated in float32 (float64 for float64).

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16, float32 or float64. Contiguous and
            channels_last tensors are taken as they are and the layout is kept; other strides are
            copied first.
        kernel_size: height and width of a block, or one int for both.

    Returns:
        [N, C, H * kernel_height, W * kernel_width] (or without N, as `input`), in `input`'s dtype
        and layout.

    Raises:
        TypeError: an `input` of another dtype; a `kernel_size` of another type.
        RuntimeError: another number of dimensions; a `kernel_size` that is not positive.
        ValueError: an output of 2^31 rows or columns.
    """
    blocks = _blocks_of(input, kernel_size, "unpool_nearest")
    if input.dim() == 4:
        out: torch.Tensor = operator.nearest(input, blocks)
        return out
    return operator.nearest(input.unsqueeze(0), blocks).squeeze(0)


def unpool_bed_of_nails(
    input: torch.Tensor, kernel_size: int | Sequence[int], cell: int | Sequence[int] = 0
) -> torch.Tensor:
    """Put every value in one cell of a block of `kernel_size`, and zeros in the others.

    "Bed of nails" unpooling, with the value in the block's upper left cell (Dosovitskiy et al.
    2015, "Learning to Generate Chairs with Convolutional Neural Networks") or in another that
    `cell` names. The gradient reads that cell.

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16, float32 or float64. Contiguous and
            channels_last tensors are taken as they are and the layout is kept; other strides are
            copied first.
        kernel_size: height and width of a block, or one int for both.
        cell: (row, column) in the block, or one int for both; default the first.

    Returns:
        [N, C, H * kernel_height, W * kernel_width] (or without N, as `input`), in `input`'s dtype
        and layout.

    Raises:
        TypeError: an `input` of another dtype; a `kernel_size` or `cell` of another type.
        RuntimeError: another number of dimensions; a `kernel_size` that is not positive.
        ValueError: a `cell` outside the block; an output of 2^31 rows or columns.
    """
    blocks = _blocks_of(input, kernel_size, "unpool_bed_of_nails")
    kernel = blocks.kernel_size
    row, column = _arguments.pair(cell, "cell", "unpool_bed_of_nails")
    if not (0 <= row < kernel[0] and 0 <= column < kernel[1]):
        raise ValueError(
            f"unpool_bed_of_nails: cell must lie in the block of kernel_size {kernel}, got "
            f"{(row, column)}"
        )
    nails = Nails(blocks, (row, column))
    if input.dim() == 4:
        out: torch.Tensor = operator.nails(input, nails)
        return out
    return operator.nails(input.unsqueeze(0), nails).squeeze(0)


def _blocks_of(input: torch.Tensor, kernel_size: int | Sequence[int], function: str) -> Windows:
    """The blocks of a plane's values, checked."""
    _operator.check_not_traced(function)
    _arguments.check_tensor(input, "input", function)
    _arguments.check_floating(input, "input", function)
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"{function}: input must be [N, C, H, W] or [C, H, W], got shape {list(input.shape)}"
        )
    kernel = _arguments.pair(kernel_size, "kernel_size", function)
    channels_last = input.dim() == 4 and _operator.is_channels_last(input)
    make = _known_blocks if _operator.is_eager(input) else _blocks
    return make(input.size(-2), input.size(-1), kernel, channels_last, function)


def _blocks(height: int, width: int, kernel: Int2, channels_last: bool, function: str) -> Windows:
    full = (height * kernel[0], width * kernel[1])
    w = Windows(full, (height, width), kernel, kernel, (0, 0), (1, 1), channels_last)
    _windows.check_positive(w, function)
    _windows.check_range(w, function)
    return w


# Of sizes that are known, that is all but those of tracing.
_known_blocks = functools.lru_cache(maxsize=1024)(_blocks)
