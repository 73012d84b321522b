"""The windows of a pooling, as pooling and unpooling describe them to the native code."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from segkernels import _native
from segkernels.ops._arguments import Int2

# Codes are one byte.
MAX_CELLS = 256
_LIMIT = 2**31


def many_cells(kernel_size: Int2) -> bool:
    """Whether a window has too many cells for codes."""
    return kernel_size[0] * kernel_size[1] > MAX_CELLS


class Windows(NamedTuple):
    """Windows over planes, (rows, columns) each.

    Attributes:
        full: size of the plane that the windows lie on.
        pooled: number of windows.
        kernel_size: cells of a window.
        stride: from window to window.
        padding: how far the first window begins before the plane.
        dilation: from cell to cell.
        channels_last: whether both sides lie in memory channels last.
    """

    full: Int2
    pooled: Int2
    kernel_size: Int2
    stride: Int2
    padding: Int2
    dilation: Int2
    channels_last: bool

    @property
    def many_cells(self) -> bool:
        """Whether a window has too many cells for codes."""
        return many_cells(self.kernel_size)

    @property
    def tile_the_plane(self) -> bool:
        """Whether no place is in two windows, nor any cell outside the plane's upper left sides."""
        return (
            self.stride == self.kernel_size and self.padding == (0, 0) and self.dilation == (1, 1)
        )

    @property
    def memory_format(self) -> torch.memory_format:
        """That of every tensor on either side."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@functools.lru_cache(maxsize=1024)
def _native_windows(w: Windows, batch: int, channels: int) -> Any:
    planes, inner = (batch, channels) if w.channels_last else (batch * channels, 1)
    return _native.C().Windows(
        planes, inner, w.full, w.pooled, w.kernel_size, w.stride, w.padding, w.dilation
    )


def native(w: Windows, x: torch.Tensor) -> Any:
    """`w` on the 4-D `x`'s batch and channels, as the native functions take it."""
    return _native_windows(w, x.size(0), x.size(1))


def empty(
    x: torch.Tensor, size: Int2, w: Windows, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An uninitialised tensor with the 4-D `x`'s batch, channels and device."""
    if not w.channels_last:  # this costs less
        return x.new_empty((x.size(0), x.size(1), *size), dtype=dtype)
    return torch.empty(
        (x.size(0), x.size(1), *size),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=w.memory_format,
    )


def check_positive(w: Windows, function: str) -> None:
    """Raise RuntimeError, as torch words it, unless sizes, strides and dilations are positive."""
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
    """Raise ValueError when a coordinate or a cell of a window could pass 2^31."""
    if w.kernel_size[0] * w.kernel_size[1] >= _LIMIT:
        raise ValueError(
            f"{function}: kernel_size must have fewer than 2^31 cells, got {w.kernel_size}"
        )
    for axis in range(2):
        extent = (w.kernel_size[axis] - 1) * w.dilation[axis] + 1
        last = w.pooled[axis] * w.stride[axis] + extent
        if w.full[axis] + w.padding[axis] + extent >= _LIMIT or last >= _LIMIT:
            raise ValueError(
                f"{function}: input's height and width, with padding and windows, must stay below "
                f"2^31, got {w}"
            )
