"""The derivatives of aspp.

Nothing is saved but the inputs and, with ReLU, the output: each branch's result lives in its place
of the output only. The gradients are those of dilated_conv2d, branch by branch, the input's added
up; they are differentiable again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops._dtypes import compute_dtype
from segkernels.ops._operator import Operator, under_functorch
from segkernels.ops.aspp import branches
from segkernels.ops.aspp.spec import Spec
from segkernels.ops.dilated_conv2d.call import Wanted
from segkernels.ops.dilated_conv2d.operator import added, count, gradients

Weights = Sequence[torch.Tensor]


def _fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    _, _, pooled, weights, spec = args
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    shape = (x.size(0), spec.channels(weights, pooled), x.size(2), x.size(3))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _save(*args: Any) -> Sequence[torch.Tensor | None]:
    x, scale, _, pooled, weights, spec, out = args
    return x, scale, pooled, out if spec.activation == "relu" else None, *weights


def _backward(ctx: Any, grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
    """As of dilated_conv2d: with W the weight's gradient of the plain convolution, a branch has

    d weight = scale * W, and d scale = <weight, W> of each output channel, summed over the branches
    in the sum.
    """
    x, scale, _, out, *weights = ctx.saved_tensors
    spec: Spec = ctx.record
    of_x, of_scale, of_shift, of_pooled, *of_weights = ctx.needs_input_grad[:-1]
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    places = spec.places(weights)
    total = places[-1].stop
    d_shift = d_pooled = dx = None
    if of_shift:
        d_shift = grad[:, :total].sum((0, 2, 3), dtype=compute_dtype(grad.dtype))
    if of_pooled:
        d_pooled = grad[:, total:].sum((2, 3), keepdim=True)
    d_weights: list[torch.Tensor | None] = []
    d_scales = []
    calls = spec.calls(x, weights)
    for weight, call, place, of_weight in zip(weights, calls, places, of_weights, strict=True):
        per_channel = None if scale is None else scale[place][:, None, None, None]
        wanted = Wanted(of_x, of_weight or of_scale, call)
        d_weight = None
        if wanted.of_input or wanted.of_weight:
            scaled = weight if per_channel is None else (weight * per_channel).to(weight.dtype)
            to_x, dw = gradients(_laid_out(grad[:, place], spec), x, scaled, wanted)
            if of_x:
                dx = to_x if dx is None else dx + to_x
            if of_weight:
                d_weight = dw if per_channel is None else (dw * per_channel).to(weight.dtype)
            if of_scale:
                wide = compute_dtype(dw.dtype)
                d_scales.append((weight.to(wide) * dw.to(wide)).sum((1, 2, 3)))
        d_weights.append(d_weight)
    d_scale = None
    if of_scale and scale is not None:
        joined = torch.stack(d_scales).sum(0) if spec.summed else torch.cat(d_scales)
        d_scale = joined.to(scale.dtype)
    return dx, d_scale, d_shift, d_pooled, *d_weights


def _laid_out(grad: torch.Tensor, spec: Spec) -> torch.Tensor:
    if under_functorch():  # whose tensors have no layout
        return grad
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    return grad.contiguous(memory_format=layout)


def _jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
    x, scale, pooled, out, *weights = ctx.saved_tensors
    spec: Spec = ctx.record._replace(activation=None)
    dx, d_scale, d_shift, d_pooled, *given = tangents

    def plain(input: torch.Tensor, of: Weights) -> torch.Tensor:
        joined: torch.Tensor = join(input, None, None, None, of, spec)
        return joined

    found = None if dx is None else plain(dx, weights)
    if any(d is not None for d in given):
        d_weights = [
            torch.zeros_like(w) if d is None else d for w, d in zip(weights, given, strict=True)
        ]
        found = added(found, plain(x, d_weights))
    if found is not None and scale is not None:
        found = found * scale[:, None, None]
    if d_scale is not None:
        found = added(found, plain(x, weights) * d_scale[:, None, None])
    found = added(found, None if d_shift is None else d_shift[:, None, None])
    shape = (x.size(0), spec.channels(weights, None), x.size(2), x.size(3))
    found = x.new_zeros(shape) if found is None else found.to(x.dtype).expand(shape)
    if pooled is not None:
        rest = torch.zeros_like(pooled) if d_pooled is None else d_pooled
        found = torch.cat([found, rest.expand(-1, -1, x.size(2), x.size(3))], dim=1)
    return found if out is None else torch.ops.aten.threshold_backward(found, out, 0)


def _vmap(size: int, dims: Sequence[int | None], *args: Any) -> torch.Tensor:
    out: torch.Tensor = join.vmap_merged(
        size, dims, *args, without_batch=("weights", "scale", "shift")
    )
    return out


def _flops(x_shape: Any, *args: Any, **_: Any) -> int:
    batch, _, height, width = x_shape
    return sum(count(x_shape, w, (batch, w[0], height, width)) for w in args[3])


join: Operator = Operator(
    "aspp",
    "Tensor input, Tensor? scale, Tensor? shift, Tensor? pooled, Tensor[] weights",
    Spec,
    kernel=branches.forward,
    fake=_fake,
    save=_save,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap,
    flops=_flops,
)
