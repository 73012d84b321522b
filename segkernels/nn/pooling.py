"""MaxPool2d and MaxUnpool2d: pooling and unpooling modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops.max_pool2d import max_pool2d
from segkernels.ops.max_unpool2d import max_unpool2d


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that calls `segkernels.max_pool2d`, and can also return codes.

    Args:
        kernel_size: cells of a window, one int or (rows, columns).
        stride: pixels between neighbouring windows, one int or (rows, columns); default
            `kernel_size`.
        padding: on each side, one int or (rows, columns); at most half of `kernel_size`.
        dilation: pixels between neighbouring cells of a window, one int or (rows, columns).
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
            raise ValueError("MaxPool2d: return_indices and return_codes must not both be True")
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
    """`torch.nn.MaxUnpool2d` that calls `segkernels.max_unpool2d`, and also accepts codes.

    Args:
        kernel_size: of the pooling.
        stride: of the pooling; default `kernel_size`.
        padding: of the pooling.
        dilation: of the pooling.
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
        """Unpool values with their codes or indices; see `segkernels.max_unpool2d`."""
        return max_unpool2d(
            input,
            indices,
            self.kernel_size,
            self.stride,
            self.padding,
            output_size,
            dilation=self.dilation,
        )
