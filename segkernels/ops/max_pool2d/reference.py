"""max_pool2d in plain torch: the cells of every window side by side, then the largest of each."""

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
    """As `segkernels.max_pool2d`, in `input`'s dtype and on any device."""
    kernel, pad, gap = two(kernel_size), two(padding), two(dilation)
    step = kernel if stride is None else two(stride)
    size = input.shape[-2:]
    count = [
        windows(size[axis], kernel[axis], step[axis], pad[axis], gap[axis], ceil_mode)
        for axis in (0, 1)
    ]
    y, x = (places(count[i], kernel[i], step[i], pad[i], gap[i]) for i in (0, 1))
    inside_y, inside_x = ((at >= 0) & (at < n) for at, n in zip((y, x), size, strict=True))
    y, x, inside_y, inside_x = (t.to(input.device) for t in (y, x, inside_y, inside_x))
    # [..., H_out, kernel height, W_out, kernel width], then the window's cells last.
    cells = input[..., y.clamp(0, size[0] - 1), :][..., x.clamp(0, size[1] - 1)]
    inside = inside_y[:, :, None, None] & inside_x[None, None]
    cells = cells.masked_fill(~inside, -torch.inf).transpose(-2, -3).flatten(-2)
    inside = inside.transpose(-2, -3).flatten(-2)
    begun = ((y >= 0)[:, :, None, None] & (x >= 0)[None, None]).transpose(-2, -3).flatten(-2)
    code = _choose(cells, inside, begun)
    values = cells.gather(-1, code.unsqueeze(-1)).squeeze(-1)
    if return_codes:
        return values, code.to(torch.uint8)
    if not return_indices:
        return values
    m, n = code // kernel[1], code % kernel[1]
    at_y = y[:, :1] + m * gap[0]
    at_x = x[:, 0] + n * gap[1]
    return values, at_y * size[1] + at_x


def _choose(cells: torch.Tensor, inside: torch.Tensor, begun: torch.Tensor) -> torch.Tensor:
    """The last NaN if there is one, else the first of the largest among the cells inside.

    A window with no cell inside has the first that is not before the plane (`begun`).
    """
    count = cells.shape[-1]
    number = torch.arange(count, device=cells.device).expand_as(cells)
    nan = torch.isnan(cells)
    last_nan = torch.where(nan, number, -1).amax(-1)
    largest = torch.where(nan, -torch.inf, cells).amax(-1, keepdim=True)
    best = torch.where(inside.any(-1, keepdim=True), (cells == largest) & inside, begun)
    first = torch.where(best, number, count).amin(-1)
    return torch.where(last_nan >= 0, last_nan, first)


def windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """How many windows there are along one axis."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + padding else count


def places(count: int, kernel: int, stride: int, padding: int, dilation: int) -> torch.Tensor:
    """Coordinates along one axis, [window, cell]; outside the plane in padding."""
    starts = torch.arange(count) * stride - padding
    return starts[:, None] + torch.arange(kernel) * dilation


def two(value: Sizes) -> tuple[int, int]:
    """`value` for rows and columns."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])
