"""max_unpool2d in plain torch: codes become indices, and sources are written in row order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops.max_pool2d import reference as pool

Sizes = int | Sequence[int]


def max_unpool2d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    output_size: Sequence[int] | None = None,
    *,
    dilation: Sizes = 1,
) -> torch.Tensor:
    """As `segkernels.max_unpool2d`, in any dtype and on any device; positions are not checked."""
    kernel, pad, gap = pool.two(kernel_size), pool.two(padding), pool.two(dilation)
    step = kernel if stride is None else pool.two(stride)
    count = input.shape[-2:]
    size = [(count[i] - 1) * step[i] + gap[i] * (kernel[i] - 1) + 1 - 2 * pad[i] for i in (0, 1)]
    if output_size is not None:
        size = list(output_size[-2:])
    if indices.dtype == torch.uint8:
        code = indices.long()
        y = torch.arange(count[0], device=input.device)[:, None] * step[0] - pad[0]
        x = torch.arange(count[1], device=input.device) * step[1] - pad[1]
        m, n = code // kernel[1], code % kernel[1]
        indices = (y + m * gap[0]) * size[1] + x + n * gap[1]
    out: torch.Tensor = _Scatter.apply(input.flatten(-2), indices.flatten(-2), size[0] * size[1])
    return out.unflatten(-1, size)


class _Scatter(torch.autograd.Function):
    """The last source of each place; every source reads the gradient where it pointed."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        sources = torch.arange(values.shape[-1], device=values.device).expand_as(places)
        last = torch.full((*values.shape[:-1], size), -1, device=values.device)
        last.scatter_reduce_(-1, places, sources, "amax")
        found = values.gather(-1, last.clamp(min=0)) if values.shape[-1] else values.new_zeros(())
        return torch.where(last >= 0, found, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (places,) = ctx.saved_tensors
        return grads[0].gather(-1, places), None, None
