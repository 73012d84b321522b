"""max_unpool2d: torch's, deterministic, and from one-byte codes."""

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
        dtypes=_dtypes.names(),
        layouts=("contiguous", "channels_last"),
        deterministic=True,
        differentiable=("input",),
        library_ops=("segkernels::max_unpool2d", "segkernels::max_unpool2d_backward"),
        note="twice differentiable, by torch's scatter_add with int64 indices; integer dtypes are "
        "handed to torch",
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
    """Values back to where max pooling found them, zero elsewhere.

    As `torch.nn.functional.max_unpool2d`, and also from the codes of
    ``segkernels.max_pool2d(..., return_codes=True)``: then every output element is written once,
    with no clearing and no scatter. The unpooling of DeconvNet (Noh et al. 2015, section 3.2.1) and
    SegNet (Badrinarayanan et al. 2017, section 3).

    Where several values point to one place, the last in row order stays, always (torch: undefined).
    Gradients are torch's: every value reads the gradient where it pointed, also one that another
    has overwritten.

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16, float32 or float64. Contiguous and
            channels_last tensors are taken as they are and the layout is kept; other strides are
            copied first. Integers are handed to torch.
        indices: `input`'s shape: uint8 codes, positions in the window; or int64 indices,
            ``y * W_out + x``, anywhere in the output's plane.
        kernel_size: that of the pooling, and so the next three.
        stride: default `kernel_size`.
        padding: as in the pooling.
        output_size: (..., H_out, W_out), less than a stride away from the default,

            H_out = (H - 1) stride + dilation (kernel_size - 1) + 1 - 2 padding.

            The last two of two or four elements count.
        dilation: as in the pooling; torch has no such argument.

    Returns:
        [N, C, H_out, W_out] (or without N, as `input`), in `input`'s dtype and layout.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, as torch has it.
        ValueError: an `output_size` that does not fit; more than 256 cells with codes; an index
            outside the plane, or a code that is no cell of its window or lies outside the plane. On
            CUDA those are left out and `segkernels.check` raises.
        TypeError: arguments of another type.
    """
    for name, value in (("input", input), ("indices", indices)):
        _arguments.check_tensor(value, name, "max_unpool2d")
    _operator.check_not_traced("max_unpool2d")  # which torch's own fails under, too
    if not _arguments.is_taken(input):
        if indices.dtype == torch.uint8:
            raise TypeError(
                f"max_unpool2d: codes need a floating input ({', '.join(_dtypes.names())}) on CPU "
                f"or CUDA, got {input.dtype} on {input.device}"
            )
        args: tuple[Any, ...] = (kernel_size, stride, padding, output_size)
        return F.max_unpool2d(input, indices, *args)
    kernel = _arguments.pair(kernel_size, "kernel_size", "max_unpool2d")
    steps = kernel if stride is None else _arguments.pair(stride, "stride", "max_unpool2d")
    pads = _arguments.pair(padding, "padding", "max_unpool2d")
    gaps = _arguments.pair(dilation, "dilation", "max_unpool2d")
    batched = input.dim() == 4
    size = None if output_size is None else tuple(output_size)
    known = size is None or all(type(n) is int for n in size)
    make = _known_windows if known and _operator.is_eager(input) else _windows_for
    channels_last = batched and _operator.is_channels_last(input)
    given = input.shape, indices.shape, indices.dtype, channels_last
    w = make(*given, kernel, steps, pads, gaps, size)
    if input.device != indices.device:
        raise RuntimeError(
            "max_unpool2d: Expected all tensors to be on the same device, but input is on "
            f"{input.device} and indices on {indices.device}"
        )
    if batched:
        return operator.unpool(input, indices, w)
    return operator.unpool(input.unsqueeze(0), indices.unsqueeze(0), w).squeeze(0)


def _windows_for(
    shape: torch.Size,
    indices_shape: torch.Size,
    indices_dtype: torch.dtype,
    channels_last: bool,
    kernel: Int2,
    steps: Int2,
    pads: Int2,
    gaps: Int2,
    output_size: tuple[Any, ...] | None,
) -> Windows:
    """The windows, checked as torch checks them and in its order."""
    if len(shape) not in (3, 4):
        raise RuntimeError(
            "max_unpool2d: Input to max_unpooling2d should be a 3d or 4d Tensor, but got a tensor "
            f"with {len(shape)} dimensions."
        )
    pooled = (shape[-2], shape[-1])
    default = (
        (pooled[0] - 1) * steps[0] + gaps[0] * (kernel[0] - 1) + 1 - 2 * pads[0],
        (pooled[1] - 1) * steps[1] + gaps[1] * (kernel[1] - 1) + 1 - 2 * pads[1],
    )
    full = _output_size(default, steps, output_size)
    _check_indices(shape, indices_shape, indices_dtype)
    if indices_dtype == torch.int64:
        # They say all; the windows only made the default size.
        return Windows(full, pooled, (1, 1), (1, 1), (0, 0), (1, 1), channels_last)
    w = Windows(full, pooled, kernel, steps, pads, gaps, channels_last)
    _windows.check_positive(w, "max_unpool2d")
    if pads[0] < 0 or pads[1] < 0:
        raise RuntimeError(f"max_unpool2d: pad must be non-negative, but got pad: {pads}")
    if kernel[0] * kernel[1] > _windows.MAX_CELLS:
        raise ValueError(
            f"max_unpool2d: codes need a window of at most {_windows.MAX_CELLS} cells (16x16), got "
            f"kernel_size={kernel}"
        )
    _windows.check_range(w, "max_unpool2d")
    return w


# Of shapes that are known, that is all but those of tracing.
_known_windows = functools.lru_cache(maxsize=1024)(_windows_for)


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
            if not low < sizes[dim] < high:
                raise ValueError(
                    f'max_unpool2d: invalid output_size "{output_size}" (dim {dim} must be '
                    f"between {low} and {high})"
                )
    for dim in range(2):
        if sizes[dim] < 0:
            raise ValueError(
                "max_unpool2d: output_size must contain non-negative spatial dimensions, but got "
                f"output_size[{dim}]={sizes[dim]}"
            )
    return sizes[0], sizes[1]
