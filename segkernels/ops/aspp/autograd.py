"""aspp for autograd and for torch's dispatcher.

Nothing is saved but the inputs and, with ReLU, the output: each branch's result lives in its place
of the output only. The gradients are those of dilated_conv2d, branch by branch, the input's added
up; they are differentiable again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels._dtypes import compute_dtype
from segkernels.ops import _op
from segkernels.ops.aspp import branches
from segkernels.ops.aspp.spec import FIELDS, SCHEMA, Spec, from_schema
from segkernels.ops.dilated_conv2d.autograd import gradients

_op.library.define(
    "aspp(Tensor input, Tensor[] weights, Tensor? scale, Tensor? shift, Tensor? pooled, "
    f"{SCHEMA}) -> Tensor"
)

Grads = tuple[Any, ...]


def join(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    pooled: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    """`aspp` of the 4-D `x`, on the way that this call needs."""
    if x.is_meta or _op.through_dispatcher(x, *weights, scale, shift, pooled):
        out: torch.Tensor = torch.ops.segkernels.aspp(x, weights, scale, shift, pooled, *spec)
        return out
    if _op.wants_grad(x, *weights, scale, shift, pooled):
        recorded: torch.Tensor = ASPP.apply(x, scale, shift, pooled, spec, *weights)
        return recorded
    return branches.forward(x, weights, scale, shift, pooled, spec)


class ASPP(torch.autograd.Function):
    """Joins the branches; gradients reach the tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        pooled: torch.Tensor | None,
        spec: Spec,
        *weights: torch.Tensor,
    ) -> Any:
        out = branches.forward(x, weights, scale, shift, pooled, spec)
        _save(ctx, x, weights, scale, shift, pooled, spec, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad
        wanted = (needs[0], needs[5:], *needs[1:4])
        dx, d_weights, d_scale, d_shift, d_pooled = _backward(ctx, grads[0], wanted)
        return dx, d_scale, d_shift, d_pooled, None, *d_weights


def _save(
    ctx: Any,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    pooled: torch.Tensor | None,
    spec: Spec,
    out: torch.Tensor,
) -> None:
    ctx.spec = spec
    ctx.dtypes = [None if t is None else t.dtype for t in (shift, pooled)]
    ctx.save_for_backward(x, scale, out if spec.activation == "relu" else None, *weights)


def _backward(ctx: Any, grad: torch.Tensor, wanted: Grads) -> Grads:
    """Gradients of input, weights, scale, shift and pooled.

    As of dilated_conv2d: with W the weight's gradient of the plain convolution, a branch has
    d weight = scale * W, and d scale = <weight, W> of each output channel, summed over the
    branches in the sum.
    """
    x, scale, out, *weights = ctx.saved_tensors
    spec: Spec = ctx.spec
    of_x, of_weights, of_scale, of_shift, of_pooled = wanted
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    places = spec.places(weights)
    total = places[-1].stop
    d_shift = d_pooled = dx = None
    if of_shift:
        wide = compute_dtype(grad.dtype)
        d_shift = grad[:, :total].sum((0, 2, 3), dtype=wide).to(ctx.dtypes[0])
    if of_pooled:
        d_pooled = grad[:, total:].sum((2, 3), keepdim=True)
    d_weights: list[torch.Tensor | None] = []
    d_scales = []
    calls = spec.calls(x, weights)
    for weight, call, place, of_weight in zip(weights, calls, places, of_weights, strict=True):
        per_channel = None if scale is None else scale[place][:, None, None, None]
        mask = (of_x, of_weight or of_scale)
        d_weight = None
        if any(mask):
            scaled = weight if per_channel is None else (weight * per_channel).to(weight.dtype)
            to_x, dw = gradients(_laid_out(grad[:, place], spec), x, scaled, mask, call)
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
    return dx, d_weights, d_scale, d_shift, d_pooled


def _laid_out(grad: torch.Tensor, spec: Spec) -> torch.Tensor:
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    return grad.contiguous(memory_format=layout)


def _impl(x: torch.Tensor, weights: list[torch.Tensor], *args: Any) -> torch.Tensor:
    scale, shift, pooled, *spec = args
    return branches.forward(x, weights, scale, shift, pooled, from_schema(spec))


def _fake(x: torch.Tensor, weights: list[torch.Tensor], *args: Any) -> torch.Tensor:
    _, _, pooled, *fields = args
    spec = from_schema(fields)
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    shape = (x.size(0), spec.channels(weights, pooled), x.size(2), x.size(3))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, scale, shift, pooled, *spec = inputs
    _save(ctx, x, weights, scale, shift, pooled, from_schema(spec), output)


def _recorded_backward(ctx: Any, grad: torch.Tensor) -> Grads:
    return (*_backward(ctx, grad, ctx.needs_input_grad[:5]), *[None] * FIELDS)


for _key in ("CPU", "CUDA"):
    _op.library.impl("aspp", _impl, _key)
torch.library.register_fake("segkernels::aspp", _fake, lib=_op.library)
torch.library.register_autograd(
    "segkernels::aspp", _recorded_backward, setup_context=_setup_context, lib=_op.library
)
