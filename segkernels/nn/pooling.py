"""Pooling and unpooling modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops.max_pool2d import max_pool2d
from segkernels.ops.max_unpool2d import max_unpool2d


class MaxPool2d(torch.nn.MaxPool2d):
    """`segkernels.max_pool2d` as a module: `torch.nn.MaxPool2d`, and codes.

    Args:
        kernel_size: height and width of a window, or one int for both, and so the next three.
        stride: from window to window; default `kernel_size`.
        padding: on every side; at most half of `kernel_size`.
        dilation: from cell to cell of a window.
        return_indices: return (values, int64 indices).
        ceil_mode: round the number of windows up instead of down.
        return_codes: return (values, uint8 codes), for `MaxUnpool2d`.

    Raises:
        ValueError: both `return_indices` and `return_codes`.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        return_codes: bool = False,
    ) -> None:
        if return_indices and return_codes:
            raise ValueError("MaxPool2d: give return_indices or return_codes, not both")
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        self.return_codes = return_codes

    def forward(self, input: torch.Tensor) -> Any:
        """[N, C, H, W] or [C, H, W] to what `segkernels.max_pool2d` returns."""
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
            return_codes=self.return_codes,
        )


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """`segkernels.max_unpool2d` as a module: `torch.nn.MaxUnpool2d`, and from codes.

    Args:
        kernel_size: that of the pooling, and so the next three.
        stride: default `kernel_size`.
        padding: as in the pooling.
        dilation: as in the pooling.
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        *,
        dilation: int | tuple[int, int] = 1,
    ) -> None:
        super().__init__(kernel_size, stride, padding)
        self.dilation = dilation

    def forward(
        self, input: torch.Tensor, indices: torch.Tensor, output_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Values and their codes or indices to the plane; see `segkernels.max_unpool2d`."""
        return max_unpool2d(
            input,
            indices,
            self.kernel_size,
            self.stride,
            self.padding,
            output_size,
            dilation=self.dilation,
        )
