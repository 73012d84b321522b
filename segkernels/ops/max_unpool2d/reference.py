"""max_unpool2d in plain torch: convert codes to indices, then write values in row order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops.max_pool2d.reference import pair

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
    """As `segkernels.max_unpool2d`; any dtype and device, positions are not checked."""
    kernel_size, padding, dilation = pair(kernel_size), pair(padding), pair(dilation)
    stride = kernel_size if stride is None else pair(stride)
    pooled = input.shape[-2:]
    size = [
        (pooled[i] - 1) * stride[i] + dilation[i] * (kernel_size[i] - 1) + 1 - 2 * padding[i]
        for i in (0, 1)
    ]
    if output_size is not None:
        size = list(output_size[-2:])
    if indices.dtype == torch.uint8:
        code = indices.long()
        y = torch.arange(pooled[0], device=input.device)[:, None] * stride[0] - padding[0]
        x = torch.arange(pooled[1], device=input.device) * stride[1] - padding[1]
        m, n = code // kernel_size[1], code % kernel_size[1]
        indices = (y + m * dilation[0]) * size[1] + x + n * dilation[1]
    out: torch.Tensor = _Scatter.apply(input.flatten(-2), indices.flatten(-2), size[0] * size[1])
    return out.unflatten(-1, size)


class _Scatter(torch.autograd.Function):
    """Scatter values; the last value at an index wins, and every value receives its gradient."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, indices: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(indices)
        order = torch.arange(values.shape[-1], device=values.device).expand_as(indices)
        last = torch.full((*values.shape[:-1], size), -1, device=values.device)
        last.scatter_reduce_(-1, indices, order, "amax")
        out = values.gather(-1, last.clamp(min=0)) if values.shape[-1] else values.new_zeros(())
        return torch.where(last >= 0, out, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (indices,) = ctx.saved_tensors
        return grads[0].gather(-1, indices), None, None
