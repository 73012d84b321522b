"""Matrix products and sums with the same bits for any number of threads.

On the CPU torch splits the inner dimension of a product, and a sum over all elements (the gradient
of a scalar), over the threads, so that rounding depends on their number.
"""

from __future__ import annotations

from typing import Any

import torch

from segkernels import _native
from segkernels.ops._operator import needs_dispatcher


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        b = b.contiguous()
        out = a.new_empty(a.shape[0], b.shape[1])
        sizes = a.shape[0], a.shape[1], b.shape[1]
        is_double = a.dtype == torch.float64
        _native.C().product(_native.where(a), a, *a.stride(), b, out, *sizes, is_double)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (a, b) = grads, ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return product(grad, b.T) if of_a else None, product(a.T, grad) if of_b else None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        (da, db), (a, b) = tangents, ctx.saved_tensors
        parts = [
            product(da, b) if da is not None else None,
            product(a, db) if db is not None else None,
        ]
        first, *more = [part for part in parts if part is not None]
        return first + more[0] if more else first


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply matrices (M, K) and (K, N) in float32 or float64, in their dtype."""
    if a.shape[1] != b.shape[0] or a.dtype != b.dtype:
        raise ValueError(
            f"dense_crf: matrices must fit, got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} "
            f"{b.dtype}"
        )
    if not _native.on_cuda(a.device) and not needs_dispatcher(a, b):
        out: torch.Tensor = _Product.apply(a, b)
        return out
    # Autocast would compute the product in half precision. It does not accept "meta".
    if a.is_meta:
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def spread(scalars: torch.Tensor, count: int) -> torch.Tensor:
    """Expand (n,) to (n, count), with a gradient that is summed in two steps, in a fixed order."""
    if not scalars.requires_grad:
        return scalars.unsqueeze(1).expand(-1, count)
    blocks = scalars.unsqueeze(1).expand(-1, -(-count // 256))
    return blocks.unsqueeze(2).expand(-1, -1, 256).flatten(1)[:, :count]
