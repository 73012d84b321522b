"""max_pool2d in plain torch: gather the cells of every window, then take their maximum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Sizes = int | Sequence[int]


def max_pool2d(
    input: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    return_codes: bool = False,
) -> Any:
    """As `segkernels.max_pool2d`; any device, computed in the dtype of `input`."""
    kernel_size, padding, dilation = pair(kernel_size), pair(padding), pair(dilation)
    stride = kernel_size if stride is None else pair(stride)
    size = input.shape[-2:]
    y, x = (
        window_coordinates(size[i], kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in (0, 1)
    )
    inside_y, inside_x = ((at >= 0) & (at < n) for at, n in zip((y, x), size, strict=True))
    y, x, inside_y, inside_x = (t.to(input.device) for t in (y, x, inside_y, inside_x))
    # [..., H_out, kernel height, W_out, kernel width], then the window's cells last.
    cells = input[..., y.clamp(0, size[0] - 1), :][..., x.clamp(0, size[1] - 1)]
    inside = inside_y[:, :, None, None] & inside_x[None, None]
    cells = cells.masked_fill(~inside, -torch.inf).transpose(-2, -3).flatten(-2)
    inside = inside.transpose(-2, -3).flatten(-2)
    not_before = ((y >= 0)[:, :, None, None] & (x >= 0)[None, None]).transpose(-2, -3).flatten(-2)
    code = _argmax(cells, inside, not_before)
    values = cells.gather(-1, code.unsqueeze(-1)).squeeze(-1)
    if return_codes:
        return values, code.to(torch.uint8)
    if not return_indices:
        return values
    m, n = code // kernel_size[1], code % kernel_size[1]
    row = y[:, :1] + m * dilation[0]
    column = x[:, 0] + n * dilation[1]
    return values, row * size[1] + column


def _argmax(cells: torch.Tensor, inside: torch.Tensor, not_before: torch.Tensor) -> torch.Tensor:
    """Return the code of each window's maximum: its last NaN, else the first of its largest cells.

    A window without a cell inside the plane has its first cell that is `not_before`, that is,
    neither above nor left of the plane.
    """
    count = cells.shape[-1]
    code = torch.arange(count, device=cells.device).expand_as(cells)
    nan = torch.isnan(cells)
    last_nan = torch.where(nan, code, -1).amax(-1)
    largest = torch.where(nan, -torch.inf, cells).amax(-1, keepdim=True)
    best = torch.where(inside.any(-1, keepdim=True), (cells == largest) & inside, not_before)
    first = torch.where(best, code, count).amin(-1)
    return torch.where(last_nan >= 0, last_nan, first)


def window_coordinates(
    size: int, kernel_size: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> torch.Tensor:
    """Return the coordinates [window, cell] along one axis; outside [0, size) in the padding."""
    span = size + 2 * padding - dilation * (kernel_size - 1) - 1
    count = span // stride + 1
    if ceil_mode:
        count = -(-span // stride) + 1
        # The last window must begin inside the input or its first padding.
        if (count - 1) * stride >= size + padding:
            count -= 1
    starts = torch.arange(count) * stride - padding
    return starts[:, None] + torch.arange(kernel_size) * dilation


def pair(value: Sizes) -> tuple[int, int]:
    """Return `value` as a pair (rows, columns)."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])
