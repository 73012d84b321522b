"""max_unpool2d: a deterministic drop-in for torch's, which also accepts one-byte codes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segkernels.ops import _arguments, _dtypes, _operator, _registry, _windows
from segkernels.ops._arguments import Int2
from segkernels.ops._windows import Windows
from segkernels.ops.max_unpool2d import operator

_registry.register(
    _registry.Op(
        name="max_unpool2d",
        functions=("max_unpool2d",),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        layouts=("contiguous", "channels_last"),
        differentiable=("input",),
        library_ops=("segkernels::max_unpool2d", "segkernels::max_unpool2d_backward"),
        note="twice differentiable, by torch's scatter_add with int64 indices; integer dtypes are "
        "computed by torch",
    )
)


def max_unpool2d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    output_size: Sequence[int] | None = None,
    *,
    dilation: int | Sequence[int] = 1,
) -> torch.Tensor:
    """Write values to the positions recorded by max pooling, and zero elsewhere.

    Equals `torch.nn.functional.max_unpool2d`, and also accepts the codes of
    ``segkernels.max_pool2d(..., return_codes=True)``. With codes every output element is written
    once, without clearing the output first and without a scatter. This is the unpooling of
    DeconvNet (Noh et al. 2015, section 3.2.1) and SegNet (Badrinarayanan et al. 2017, section 3).

    If several values have the same position, the last in row order wins (undefined in torch).
    Gradients are torch's: every value receives the gradient at its position, even if another value
    has overwritten it.

    Args:
        input: [N, C, H, W] or [C, H, W], float16, bfloat16, float32 or float64. Contiguous and
            channels_last tensors are read without a copy and the layout is preserved; tensors with
            other strides are copied first. torch computes integer dtypes.
        indices: positions in the shape of `input`: uint8 codes (flat index of a cell in its window)
            or int64 indices, ``y * W_out + x``, anywhere in the output's plane.
        kernel_size: as in the pooling.
        stride: as in the pooling; default `kernel_size`.
        padding: as in the pooling.
        output_size: (..., H_out, W_out), two or four elements of which the last two count. Each
            must differ by less than the stride from the default,

            H_out = (H - 1) stride + dilation (kernel_size - 1) + 1 - 2 padding.
        dilation: as in the pooling; torch has no such argument.

    Returns:
        [N, C, H_out, W_out] (without N if `input` has none), in the dtype and layout of `input`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; the message is torch's.
        ValueError: `output_size` does not fit, a window has more than 256 cells with codes, or a
            position is invalid: an index outside the plane, or a code that is no cell of its window
            or whose cell is outside the plane. On CUDA invalid positions are skipped, and
            `segkernels.check` raises.
        TypeError: an argument has the wrong type.
    """
    for name, value in (("input", input), ("indices", indices)):
        _arguments.check_tensor(value, name, "max_unpool2d")
    if not _arguments.is_supported(input):
        if indices.dtype == torch.uint8:
            raise TypeError(
                f"max_unpool2d: input must be one of {', '.join(_dtypes.names())} on CPU or CUDA "
                f"with codes, got {input.dtype} on {input.device}"
            )
        args: tuple[Any, ...] = (kernel_size, stride, padding, output_size)
        return F.max_unpool2d(input, indices, *args)
    kernel_size = _arguments.pair(kernel_size, "kernel_size", "max_unpool2d")
    stride = kernel_size if stride is None else _arguments.pair(stride, "stride", "max_unpool2d")
    padding = _arguments.pair(padding, "padding", "max_unpool2d")
    dilation = _arguments.pair(dilation, "dilation", "max_unpool2d")
    if _operator.must_call_torch():
        return _by_torch(input, indices, kernel_size, stride, padding, output_size, dilation)
    batched = input.dim() == 4
    size = None if output_size is None else tuple(output_size)
    hashable = size is None or all(type(n) is int for n in size)
    make = _cached_windows if hashable and _operator.is_eager(input) else _make_windows
    w = make(
        input.shape,
        indices.shape,
        indices.dtype,
        batched and _operator.is_channels_last(input),
        kernel_size,
        stride,
        padding,
        dilation,
        size,
    )
    if input.device != indices.device:
        raise RuntimeError(
            "max_unpool2d: Expected all tensors to be on the same device, but input is on "
            f"{input.device} and indices on {indices.device}"
        )
    if batched:
        return operator.unpool(input, indices, w)
    return operator.unpool(input.unsqueeze(0), indices.unsqueeze(0), w).squeeze(0)


def _make_windows(
    shape: torch.Size,
    indices_shape: torch.Size,
    indices_dtype: torch.dtype,
    channels_last: bool,
    kernel_size: Int2,
    stride: Int2,
    padding: Int2,
    dilation: Int2,
    output_size: tuple[Any, ...] | None,
) -> Windows:
    """Return the windows after torch's checks, in torch's order."""
    if len(shape) not in (3, 4):
        raise RuntimeError(
            "max_unpool2d: Input to max_unpooling2d should be a 3d or 4d Tensor, but got a tensor "
            f"with {len(shape)} dimensions."
        )
    pooled = (shape[-2], shape[-1])
    default = _default_size(pooled, kernel_size, stride, padding, dilation)
    full = _output_size(default, stride, output_size)
    _check_indices(shape, indices_shape, indices_dtype)
    if indices_dtype == torch.int64:
        # Indices do not depend on the windows, which only determine the default output size.
        return Windows(full, pooled, (1, 1), (1, 1), (0, 0), (1, 1), channels_last)
    w = Windows(full, pooled, kernel_size, stride, padding, dilation, channels_last)
    _windows.check_positive(w, "max_unpool2d")
    if padding[0] < 0 or padding[1] < 0:
        raise RuntimeError(f"max_unpool2d: pad must be non-negative, but got pad: {padding}")
    if _windows.too_large_for_codes(kernel_size):
        raise ValueError(
            f"max_unpool2d: kernel_size must have at most {_windows.MAX_CELLS} cells (16x16) with "
            f"codes, got {kernel_size}"
        )
    _windows.check_range(w, "max_unpool2d")
    return w


# For eager calls only: sizes are SymInts while tracing.
_cached_windows = functools.lru_cache(maxsize=1024)(_make_windows)


def _by_torch(
    x: torch.Tensor,
    positions: torch.Tensor,
    kernel_size: Int2,
    stride: Int2,
    padding: Int2,
    output_size: Sequence[int] | None,
    dilation: Int2,
) -> torch.Tensor:
    """Unpool with torch's functions: not with its own max_unpool2d, which cannot be recorded."""
    pooled = (x.size(-2), x.size(-1))
    if output_size is None:
        full = _default_size(pooled, kernel_size, stride, padding, dilation)
    else:
        full = (output_size[-2], output_size[-1])
    if positions.dtype == torch.uint8:
        w = Windows(full, pooled, kernel_size, stride, padding, dilation, False)
        positions = _windows.indices_of(positions, w)
    zeros = x.new_zeros((*x.shape[:-2], full[0] * full[1]))
    out = zeros.scatter(-1, positions.flatten(-2), x.flatten(-2))
    return out.view(*x.shape[:-2], *full)


def _default_size(
    pooled: Int2, kernel_size: Int2, stride: Int2, padding: Int2, dilation: Int2
) -> Int2:
    height, width = (
        (pooled[i] - 1) * stride[i] + dilation[i] * (kernel_size[i] - 1) + 1 - 2 * padding[i]
        for i in (0, 1)
    )
    return height, width


def _check_indices(shape: torch.Size, indices: torch.Size, dtype: torch.dtype) -> None:
    if dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            "max_unpool2d: elements in indices should be type int64 (flat indices) or uint8 "
            f"(codes) but got: {dtype}"
        )
    if shape != indices:
        raise RuntimeError(
            "max_unpool2d: Expected shape of indices to be same as that of the input tensor "
            f"({list(shape)}) but got indices tensor with shape: {list(indices)}"
        )
    for dim in range(len(shape) - 3, len(shape)):
        if shape[dim] == 0:
            raise RuntimeError(
                "max_unpool2d: Expected input to have non-zero size for non-batch dimensions, but "
                f"got {list(shape)} with dimension {dim} being empty."
            )


def _output_size(default: Int2, stride: Int2, output_size: tuple[Any, ...] | None) -> Int2:
    if output_size is None:
        sizes = list(default)
    else:
        sizes = list(output_size)
        if len(sizes) == 4:
            sizes = sizes[2:]
        if len(sizes) != 2:
            raise ValueError(
                "max_unpool2d: output_size should be a sequence containing 2 or 4 elements, but it "
                f"has a length of '{len(sizes)}'"
            )
        for dim in range(2):
            if not isinstance(sizes[dim], (int, torch.SymInt)):
                raise TypeError(
                    "max_unpool2d(): argument 'output_size' must be tuple of ints, but found "
                    f"element of type {type(sizes[dim]).__name__} at pos {dim}"
                )
            low, high = default[dim] - stride[dim], default[dim] + stride[dim]
            if _operator.surely(sizes[dim] <= low) or _operator.surely(sizes[dim] >= high):
                raise ValueError(
                    f'max_unpool2d: invalid output_size "{output_size}" (dim {dim} must be '
                    f"between {low} and {high})"
                )
    for dim in range(2):
        if _operator.surely(sizes[dim] < 0):
            raise ValueError(
                "max_unpool2d: output_size must contain non-negative spatial dimensions, but got "
                f"output_size[{dim}]={sizes[dim]}"
            )
    return sizes[0], sizes[1]
