"""The torch.library operator of aspp, and its derivatives.

The saved tensors are the inputs and, with ReLU, the output; the result of a branch is stored in the
output only. The gradients of each branch are those of dilated_conv2d, which are differentiable, and
the input gradients are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops._dtypes import compute_dtype
from segkernels.ops._operator import Operator, memory_format, under_functorch
from segkernels.ops.aspp import branches
from segkernels.ops.aspp.branches import Branches
from segkernels.ops.dilated_conv2d.operator import conv_flops, scaled_gradients, sum_of

Weights = Sequence[torch.Tensor]


def _fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    _, _, pooled, weights, b = args
    return b.empty(x, weights, pooled, b.channels_last)


def _save(*args: Any) -> Sequence[torch.Tensor | None]:
    x, scale, _, pooled, weights, b, out = args
    return x, scale, pooled, out if b.activation == "relu" else None, *weights


def _backward(ctx: Any, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
    """Backward: each branch as in dilated_conv2d; in form v2 d scale is summed over them."""
    x, scale, _, out, *weights = ctx.saved_tensors
    b: Branches = ctx.record
    of_x, of_scale, of_shift, of_pooled, *of_weights = ctx.needs_input_grad[:-1]
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    slices = b.channel_slices(weights)
    channels = slices[-1].stop  # of the branches
    d_shift = d_pooled = dx = d_scale = None
    if of_shift:
        d_shift = grad[:, :channels].sum((0, 2, 3), dtype=compute_dtype(grad.dtype))
    if of_pooled:
        d_pooled = grad[:, channels:].sum((2, 3), keepdim=True)
    d_weights: list[torch.Tensor | None] = []
    d_scales: list[Any] = []
    for i, call in enumerate(b.calls(x, weights)):
        needed = (of_x, of_weights[i], of_scale)
        branch_grad = _laid_out(grad[:, slices[i]], b) if any(needed) else grad
        factor = None if scale is None else scale[slices[i]]
        branch_dx, d_weight, branch_d_scale = scaled_gradients(
            branch_grad, x, weights[i], factor, call, needed
        )
        dx = sum_of(dx, branch_dx)
        d_weights.append(d_weight)
        d_scales.append(branch_d_scale)
    if of_scale:
        d_scale = torch.stack(d_scales).sum(0) if b.summed else torch.cat(d_scales)
        d_scale = d_scale.to(scale.dtype)
    return dx, d_scale, d_shift, d_pooled, *d_weights


def _laid_out(grad: torch.Tensor, b: Branches) -> torch.Tensor:
    if under_functorch():  # tensors have no layout there
        return grad
    return grad.contiguous(memory_format=memory_format(b.channels_last))


def _jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
    x, scale, pooled, out, *weights = ctx.saved_tensors
    b: Branches = ctx.record._replace(activation=None)
    dx, d_scale, d_shift, d_pooled, *d_weights = tangents

    def plain(input: torch.Tensor, weights: Weights) -> torch.Tensor:
        joined: torch.Tensor = join(input, None, None, None, weights, b)
        return joined

    tangent = None if dx is None else plain(dx, weights)
    if any(d is not None for d in d_weights):
        pairs = zip(weights, d_weights, strict=True)
        filled = [torch.zeros_like(w) if d is None else d for w, d in pairs]
        tangent = sum_of(tangent, plain(x, filled))
    if tangent is not None and scale is not None:
        tangent = tangent * scale[:, None, None]
    if d_scale is not None:
        tangent = sum_of(tangent, plain(x, weights) * d_scale[:, None, None])
    tangent = sum_of(tangent, None if d_shift is None else d_shift[:, None, None])
    shape = (x.size(0), b.channels(weights, None), x.size(2), x.size(3))
    tangent = x.new_zeros(shape) if tangent is None else tangent.to(x.dtype).expand(shape)
    if pooled is not None:
        d_pooled = torch.zeros_like(pooled) if d_pooled is None else d_pooled
        tangent = torch.cat([tangent, d_pooled.expand(-1, -1, x.size(2), x.size(3))], dim=1)
    return tangent if out is None else torch.ops.aten.threshold_backward(tangent, out, 0)


def _vmap(size: int, dims: Sequence[int | None], *args: Any) -> torch.Tensor:
    out: torch.Tensor = join.vmap_merged(
        size, dims, *args, without_batch=("weights", "scale", "shift")
    )
    return out


def _flops(x_shape: Any, *args: Any, **_: Any) -> int:
    batch, _, height, width = x_shape
    return sum(conv_flops(x_shape, w, (batch, w[0], height, width)) for w in args[3])


join: Operator = Operator(
    "aspp",
    "Tensor input, Tensor? scale, Tensor? shift, Tensor? pooled, Tensor[] weights",
    Branches,
    kernel=branches.forward,
    fake=_fake,
    save=_save,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap,
    flops=_flops,
)
