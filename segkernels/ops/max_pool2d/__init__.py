"""max_pool2d: torch's, and with one-byte codes in place of indices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segkernels.ops import _arguments, _dtypes, _operator, _registry, _windows
from segkernels.ops._arguments import Int2
from segkernels.ops._windows import Windows
from segkernels.ops.max_pool2d import operator
from segkernels.ops.max_pool2d.native import Pooling

_registry.register(
    _registry.Op(
        name="max_pool2d",
        functions=("max_pool2d",),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        dtypes=_dtypes.names(),
        layouts=("contiguous", "channels_last"),
        deterministic=True,
        differentiable=("input",),
        library_ops=("segkernels::max_pool2d", "segkernels::max_pool2d_backward"),
        note="twice differentiable; integer dtypes are handed to torch",
    )
)


def max_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    return_codes: bool = False,
) -> Any:
    """The largest value of every window: `torch.nn.functional.max_pool2d`, bit for bit.

    NaN counts as the largest (of several NaNs the last), -0 equals 0, and of equal values the first
    of a window in row order wins. Padding counts as minus infinity. The backward is a gather, or on
    the CPU a sum in row order, accumulated in float32 (float64 for float64): the same bits every
    time. It is differentiable twice. What is kept for it is one byte a window (an index of a window
    of more than 256 cells).

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16, float32 or float64. Contiguous and
            channels_last tensors are taken as they are and the layout is kept; other strides are
            copied first. Integers are handed to torch.
        kernel_size: height and width of a window, or one int for both.
        stride: from window to window; default `kernel_size`.
        padding: on every side; at most half of `kernel_size`.
        dilation: from cell to cell of a window.
        ceil_mode: round the number of windows up instead of down; windows that would begin beyond
            the input and its first padding are left out.
        return_indices: also return int64 indices, ``y * W + x`` in the input's plane.
        return_codes: also return uint8 codes, ``m * kernel_width + n`` for the cell in row m and
            column n of the window: eight times smaller than indices, and what
            `segkernels.max_unpool2d` is fastest with. At most 256 cells (16x16).

    Returns:
        [N, C, H_out, W_out] (or without N, as `input`), in `input`'s dtype and layout, where

            H_out = floor((H + 2 padding - dilation (kernel_size - 1) - 1) / stride) + 1;

        with `return_indices` or `return_codes` a tuple of that and a tensor of its shape.

    Raises:
        RuntimeError: sizes that do not fit, as torch has it.
        TypeError: arguments of another type; codes of an integer `input`.
        ValueError: `return_codes` with more than 256 cells, or with `return_indices`.
    """
    _arguments.check_tensor(input, "input", "max_pool2d")
    if return_codes and return_indices:
        raise ValueError("max_pool2d: give return_indices or return_codes, not both")
    if return_codes:
        _operator.check_not_traced("max_pool2d")
    if not _arguments.is_taken(input) or _operator.traced():
        if return_codes:
            raise TypeError(
                f"max_pool2d: return_codes needs a floating input ({', '.join(_dtypes.names())}) "
                f"on CPU or CUDA, got {input.dtype} on {input.device}"
            )
        args: tuple[Any, ...] = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return F.max_pool2d(input, *args)
    kernel = _arguments.pair(kernel_size, "kernel_size", "max_pool2d")
    steps = kernel
    if stride is not None and not (isinstance(stride, (tuple, list)) and len(stride) == 0):
        steps = _arguments.pair(stride, "stride", "max_pool2d")
    pads = _arguments.pair(padding, "padding", "max_pool2d")
    gaps = _arguments.pair(dilation, "dilation", "max_pool2d")
    batched = input.dim() == 4
    make = _known_pooling if _operator.is_eager(input) else _pooling
    channels_last = batched and _operator.is_channels_last(input)
    shown = bool(return_codes), bool(return_indices)
    p = make(input.shape, channels_last, kernel, steps, pads, gaps, bool(ceil_mode), *shown)
    if return_codes and _windows.many_cells(kernel):
        raise ValueError(
            f"max_pool2d: return_codes needs a window of at most {_windows.MAX_CELLS} cells "
            f"(16x16), got kernel_size={kernel}"
        )
    x = input if batched else input.unsqueeze(0)
    values, codes, indices = operator.pool(x, p)
    if not (return_codes or return_indices):
        return values if batched else values.squeeze(0)
    positions = codes if return_codes else indices
    return (values, positions) if batched else (values.squeeze(0), positions.squeeze(0))


def _pooling(
    shape: torch.Size,
    channels_last: bool,
    kernel: Int2,
    steps: Int2,
    pads: Int2,
    gaps: Int2,
    ceil_mode: bool,
    return_codes: bool,
    return_indices: bool,
) -> Pooling:
    """The windows, checked as torch checks them and in its order."""
    if len(shape) not in (3, 4):
        raise RuntimeError(
            "max_pool2d: non-empty 3D or 4D (batch mode) tensor expected for input, got shape "
            f"{list(shape)}"
        )
    _check_padding(kernel, steps, pads, gaps)
    full = (shape[-2], shape[-1])
    w = Windows(full, (0, 0), kernel, steps, pads, gaps, channels_last)
    _windows.check_positive(w, "max_pool2d")
    if any(size == 0 for size in shape[-3:]):
        raise RuntimeError(
            "max_pool2d: Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for "
            f"input, but got:{list(shape)}"
        )
    if pads[0] > kernel[0] // 2 or pads[1] > kernel[1] // 2:
        raise RuntimeError(
            "max_pool2d: pad should be smaller than or equal to half of kernel size, but got "
            f"padW = {pads[1]}, padH = {pads[0]}, kW = {kernel[1]}, kH = {kernel[0]}"
        )
    pooled = (_windows_along(w, 0, ceil_mode), _windows_along(w, 1, ceil_mode))
    if pooled[0] < 1 or pooled[1] < 1:
        channels = shape[-3]
        raise RuntimeError(
            f"max_pool2d: Given input size: ({channels}x{full[0]}x{full[1]}). Calculated output "
            f"size: ({channels}x{pooled[0]}x{pooled[1]}). Output size is too small"
        )
    w = w._replace(pooled=pooled)
    _windows.check_range(w, "max_pool2d")
    return Pooling(w, return_codes, return_indices)


# Of shapes that are known, that is all but those of tracing.
_known_pooling = functools.lru_cache(maxsize=1024)(_pooling)


def _check_padding(kernel: Int2, stride: Int2, padding: Int2, dilation: Int2) -> None:
    for k, step, pad, gap in zip(kernel, stride, padding, dilation, strict=True):
        if step == 0:
            raise RuntimeError("max_pool2d: stride should not be zero")
        if pad < 0:
            raise RuntimeError(f"max_pool2d: pad must be non-negative, but got pad: {pad}")
        if 2 * pad > max((k - 1) * gap + 1, 0):
            raise RuntimeError(
                "max_pool2d: pad should be at most half of effective kernel size, but got "
                f"pad={pad}, kernel_size={k} and dilation={gap}"
            )


def _windows_along(w: Windows, axis: int, ceil_mode: bool) -> int:
    size, step, pad = w.full[axis], w.stride[axis], w.padding[axis]
    room = size + 2 * pad - w.dilation[axis] * (w.kernel_size[axis] - 1) - 1
    if not ceil_mode:
        return room // step + 1
    count = (room + step - 1) // step + 1
    # The last window must begin inside the input or its first padding.
    return count - 1 if (count - 1) * step >= size + pad else count
