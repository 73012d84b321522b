"""max_pool2d: a drop-in for torch's, which can also return one-byte codes instead of indices."""

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
        layouts=("contiguous", "channels_last"),
        differentiable=("input",),
        library_ops=("segkernels::max_pool2d", "segkernels::max_pool2d_backward"),
        note="twice differentiable; integer dtypes are computed by torch",
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
    """Take the maximum of every window, equal to `torch.nn.functional.max_pool2d` bit for bit.

    NaN is larger than every number (of several NaNs the last wins), -0 equals 0, and of equal
    values the first in row order wins. Padding counts as minus infinity.

    The backward pass gathers, or on the CPU adds in row order, and accumulates in float32 (float64
    for float64 input), so it is deterministic. It can be differentiated again. It saves one byte
    per window, or an int64 index for windows of more than 256 cells.

    Args:
        input: [N, C, H, W] or [C, H, W], float16, bfloat16, float32 or float64. Contiguous and
            channels_last tensors are read without a copy and the layout is preserved; tensors with
            other strides are copied first. torch computes integer dtypes.
        kernel_size: height and width of a window, or one int for both.
        stride: step between windows; default `kernel_size`.
        padding: padding on every side, at most half of `kernel_size`.
        dilation: step between the cells of a window.
        ceil_mode: round the number of windows up instead of down. Windows that would begin after
            the input and its first padding are dropped.
        return_indices: also return int64 indices, ``y * W + x`` in the input's plane.
        return_codes: also return uint8 codes, ``m * kernel_width + n`` for the cell in row m and
            column n of the window. Codes are eight times smaller than indices, and
            `segkernels.max_unpool2d` is fastest with them. At most 256 cells (16x16).

    Returns:
        [N, C, H_out, W_out] (without N if `input` has none), in the dtype and layout of `input`,
        where

            H_out = floor((H + 2 padding - dilation (kernel_size - 1) - 1) / stride) + 1.

        With `return_indices` or `return_codes`, a tuple of that tensor and the indices or codes,
        which have the same shape.

    Raises:
        RuntimeError: sizes do not fit; the message is torch's.
        TypeError: an argument has the wrong type, or `return_codes` is set and `input` is an
            integer tensor.
        ValueError: `return_codes` is set with more than 256 cells or with `return_indices`.
    """
    _arguments.check_tensor(input, "input", "max_pool2d")
    if return_codes and return_indices:
        raise ValueError("max_pool2d: return_codes must be False with return_indices, got True")
    supported = _arguments.is_supported(input)
    if return_codes and not supported:
        raise TypeError(
            f"max_pool2d: input must be one of {', '.join(_dtypes.names())} on CPU or CUDA "
            f"with return_codes, got {input.dtype} on {input.device}"
        )
    by_torch = not supported or _operator.must_call_torch()
    if by_torch and not return_codes:
        args: tuple[Any, ...] = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return F.max_pool2d(input, *args)
    kernel_size = _arguments.pair(kernel_size, "kernel_size", "max_pool2d")
    if stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0):
        stride = kernel_size
    else:
        stride = _arguments.pair(stride, "stride", "max_pool2d")
    padding = _arguments.pair(padding, "padding", "max_pool2d")
    dilation = _arguments.pair(dilation, "dilation", "max_pool2d")
    if return_codes and _windows.too_large_for_codes(kernel_size):
        raise ValueError(
            f"max_pool2d: kernel_size must have at most {_windows.MAX_CELLS} cells (16x16) with "
            f"return_codes, got {kernel_size}"
        )
    if by_torch:
        values, indices = F.max_pool2d(
            input, kernel_size, stride, padding, dilation, ceil_mode, True
        )
        full, pooled = (input.size(-2), input.size(-1)), (values.size(-2), values.size(-1))
        w = Windows(full, pooled, kernel_size, stride, padding, dilation, False)
        return values, _windows.codes_of(indices, w)
    batched = input.dim() == 4
    make = _cached_pooling if _operator.is_eager(input) else _pooling
    p = make(
        input.shape,
        batched and _operator.is_channels_last(input),
        kernel_size,
        stride,
        padding,
        dilation,
        bool(ceil_mode),
        bool(return_codes),
        bool(return_indices),
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
    kernel_size: Int2,
    stride: Int2,
    padding: Int2,
    dilation: Int2,
    ceil_mode: bool,
    return_codes: bool,
    return_indices: bool,
) -> Pooling:
    """Return the call's record after torch's checks, in torch's order."""
    if len(shape) not in (3, 4):
        raise RuntimeError(
            "max_pool2d: non-empty 3D or 4D (batch mode) tensor expected for input, got shape "
            f"{list(shape)}"
        )
    _check_padding(kernel_size, stride, padding, dilation)
    full = (shape[-2], shape[-1])
    w = Windows(full, (0, 0), kernel_size, stride, padding, dilation, channels_last)
    _windows.check_positive(w, "max_pool2d")
    if any(size == 0 for size in shape[-3:]):
        raise RuntimeError(
            "max_pool2d: Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for "
            f"input, but got:{list(shape)}"
        )
    (pad_h, pad_w), (kh, kw) = padding, kernel_size
    if pad_h > kh // 2 or pad_w > kw // 2:
        raise RuntimeError(
            "max_pool2d: pad should be smaller than or equal to half of kernel size, but got "
            f"padW = {pad_w}, padH = {pad_h}, kW = {kw}, kH = {kh}"
        )
    pooled = (_pooled_size(w, 0, ceil_mode), _pooled_size(w, 1, ceil_mode))
    if pooled[0] < 1 or pooled[1] < 1:
        channels = shape[-3]
        raise RuntimeError(
            f"max_pool2d: Given input size: ({channels}x{full[0]}x{full[1]}). Calculated output "
            f"size: ({channels}x{pooled[0]}x{pooled[1]}). Output size is too small"
        )
    w = w._replace(pooled=pooled)
    _windows.check_range(w, "max_pool2d")
    return Pooling(w, return_codes, return_indices)


# For eager calls only: sizes are SymInts while tracing.
_cached_pooling = functools.lru_cache(maxsize=1024)(_pooling)


def _check_padding(kernel_size: Int2, stride: Int2, padding: Int2, dilation: Int2) -> None:
    for k, s, pad, d in zip(kernel_size, stride, padding, dilation, strict=True):
        if s == 0:
            raise RuntimeError("max_pool2d: stride should not be zero")
        if pad < 0:
            raise RuntimeError(f"max_pool2d: pad must be non-negative, but got pad: {pad}")
        if 2 * pad > max((k - 1) * d + 1, 0):
            raise RuntimeError(
                "max_pool2d: pad should be at most half of effective kernel size, but got "
                f"pad={pad}, kernel_size={k} and dilation={d}"
            )


def _pooled_size(w: Windows, axis: int, ceil_mode: bool) -> int:
    size, stride, padding = w.full[axis], w.stride[axis], w.padding[axis]
    span = size + 2 * padding - w.dilation[axis] * (w.kernel_size[axis] - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    count = (span + stride - 1) // stride + 1
    # The last window must begin inside the input or its first padding.
    if stride + padding <= w.dilation[axis] * (w.kernel_size[axis] - 1) + 1:
        return count  # it does for every size
    return torch.sym_min(count, (size + padding - 1) // stride + 1)
