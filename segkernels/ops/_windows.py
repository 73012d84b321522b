"""The geometry of pooling windows, shared by max pooling and the unpoolings."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from segkernels import _native
from segkernels.ops._arguments import Int2
from segkernels.ops._operator import memory_format

# A code is one byte: the flat index of a cell in its window.
MAX_CELLS = 256
_LIMIT = 2**31


def too_large_for_codes(kernel_size: Int2) -> bool:
    """Whether a window has more than `MAX_CELLS` cells."""
    return kernel_size[0] * kernel_size[1] > MAX_CELLS


class Windows(NamedTuple):
    """Pooling windows over a plane. Every pair is (rows, columns).

    A cell of a window is one of its kernel_height x kernel_width elements.

    Attributes:
        full: size of the plane that the windows cover: pooling's input, unpooling's output.
        pooled: number of windows: size of pooling's output and of unpooling's input.
        kernel_size: number of cells of a window.
        stride: step between windows.
        padding: rows and columns by which the first window begins before the plane.
        dilation: step between the cells of a window.
        channels_last: whether the tensors of both sizes are in the channels_last layout.
    """

    full: Int2
    pooled: Int2
    kernel_size: Int2
    stride: Int2
    padding: Int2
    dilation: Int2
    channels_last: bool

    @property
    def tile_the_plane(self) -> bool:
        """Whether windows do not overlap and none begins in the padding.

        Cells may still be outside the plane at its lower and right edges.
        """
        return (
            self.stride == self.kernel_size and self.padding == (0, 0) and self.dilation == (1, 1)
        )

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of the tensors of both sizes."""
        return memory_format(self.channels_last)


@functools.lru_cache(maxsize=1024)
def _native_windows(w: Windows, batch: int, channels: int) -> Any:
    planes, inner = (batch, channels) if w.channels_last else (batch * channels, 1)
    return _native.C().Windows(
        planes, inner, w.full, w.pooled, w.kernel_size, w.stride, w.padding, w.dilation
    )


def native(w: Windows, x: torch.Tensor) -> Any:
    """Return the native description of `w` on the batch and channels of the 4-D `x`."""
    return _native_windows(w, x.size(0), x.size(1))


def empty(
    x: torch.Tensor, size: Int2, w: Windows, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return an uninitialised [N, C, *size] tensor with the batch, channels and device of `x`.

    Its layout is that of `w`, and its dtype is `dtype`, by default that of the 4-D `x`.
    """
    if not w.channels_last:  # new_empty is faster than torch.empty
        return x.new_empty((x.size(0), x.size(1), *size), dtype=dtype)
    return torch.empty(
        (x.size(0), x.size(1), *size),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=w.memory_format,
    )


def codes_of(indices: torch.Tensor, w: Windows) -> torch.Tensor:
    """Return the codes of max pooling's indices [..., *pooled], with torch's functions."""
    row, column = _first_cells(indices, w)
    y = indices // w.full[1]
    x = indices - y * w.full[1]  # not %, which has no ONNX form for a dynamic width
    m, n = (y - row) // w.dilation[0], (x - column) // w.dilation[1]
    return (m * w.kernel_size[1] + n).to(torch.uint8)


def indices_of(codes: torch.Tensor, w: Windows) -> torch.Tensor:
    """Return the int64 indices of codes [..., *pooled], with torch's functions."""
    row, column = _first_cells(codes, w)
    cell = codes.long()
    y = row + cell // w.kernel_size[1] * w.dilation[0]
    return y * w.full[1] + column + cell % w.kernel_size[1] * w.dilation[1]


def _first_cells(positions: torch.Tensor, w: Windows) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the first cell of every window."""
    row, column = (
        torch.arange(positions.size(i - 2), device=positions.device) * w.stride[i] - w.padding[i]
        for i in (0, 1)
    )
    return row[:, None], column


def check_positive(w: Windows, function: str) -> None:
    """Raise RuntimeError, with torch's message, unless size, stride and dilation are positive."""
    (kh, kw), (sh, sw), (dh, dw) = w.kernel_size, w.stride, w.dilation
    if kh <= 0 or kw <= 0:
        raise RuntimeError(
            f"{function}: kernel size should be greater than zero, but got kH: {kh} kW: {kw}"
        )
    if sh <= 0 or sw <= 0:
        raise RuntimeError(
            f"{function}: stride should be greater than zero, but got dH: {sh} dW: {sw}"
        )
    if dh <= 0 or dw <= 0:
        raise RuntimeError(
            f"{function}: dilation should be greater than zero, but got dilationH: {dh} "
            f"dilationW: {dw}"
        )


def check_range(w: Windows, function: str) -> None:
    """Raise ValueError if a coordinate or a cell's index could reach 2^31."""
    if w.kernel_size[0] * w.kernel_size[1] >= _LIMIT:
        raise ValueError(
            f"{function}: kernel_size must have fewer than 2^31 cells, got {w.kernel_size}"
        )
    for axis in range(2):
        extent = (w.kernel_size[axis] - 1) * w.dilation[axis] + 1
        last = w.pooled[axis] * w.stride[axis] + extent
        if w.full[axis] + w.padding[axis] + extent >= _LIMIT or last >= _LIMIT:
            raise ValueError(
                f"{function}: height and width must be below 2^31 with padding and windows, got {w}"
            )
