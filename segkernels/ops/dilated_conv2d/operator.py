"""The derivatives of dilated_conv2d.

Nothing is saved but the inputs and, with ReLU, the output, which whoever comes next keeps anyway:
its sign is the mask. (A mask of its own would be one byte more to write and to keep, to read one
byte less.) With g the gradient behind the activation and W(g) the weight's gradient of the plain
convolution for it:

    d residual = g,  d shift = sum of g,  d bias = scale * d shift
    d input = the plain convolution's for the weight scale * w, so that g is not scaled
    d weight = scale * W(g)
    d scale = sum of g * (conv + bias) = <w, W(g)> of each output channel + bias * d shift

so that the convolution's own result is not needed. The plain gradients are bilinear, and their own
gradients are convolutions and gradients again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops._dtypes import compute_dtype
from segkernels.ops._operator import Operator, is_channels_last, split_vmap_axis, vmap_axis_first
from segkernels.ops.dilated_conv2d import backends
from segkernels.ops.dilated_conv2d.call import Call, Convolution, Epilogue, Wanted

Tensors = tuple[torch.Tensor | None, ...]
_PER_CHANNEL = ("weight", "bias", "scale", "shift")


def plain(x: torch.Tensor, weight: torch.Tensor, c: Call) -> torch.Tensor:
    """The convolution without an epilogue."""
    out: torch.Tensor = convolve(x, weight, None, None, None, None, Convolution(c, None))
    return out


def added(*terms: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of the terms that are there."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _forward(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    bias, scale, shift, residual, c = rest
    return backends.forward(x, weight, Epilogue(bias, scale, shift, residual, c.activation), c.call)


def _fake(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    c = rest[-1].call
    shape = (x.size(0), weight.size(0), *c.out_size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=c.memory_format)


def _save(*args: Any) -> Tensors:
    x, weight, bias, scale, _, _, c, out = args
    return x, weight, bias, scale, out if c.activation == "relu" else None


def _backward(ctx: Any, grad: torch.Tensor) -> Tensors:
    x, weight, bias, scale, out = ctx.saved_tensors
    of_x, of_weight, of_bias, of_scale, of_shift, of_residual = ctx.needs_input_grad[:6]
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    per_channel = None if scale is None else scale[:, None, None, None]
    total = dx = dw = d_weight = d_bias = d_scale = None
    if of_bias or of_shift or (of_scale and bias is not None):
        total = grad.sum((0, 2, 3), dtype=compute_dtype(grad.dtype))
    if of_x or of_weight or of_scale:
        scaled = weight if per_channel is None else (weight * per_channel).to(weight.dtype)
        wanted = Wanted(of_x, of_weight or of_scale, ctx.record.call)
        dx, dw = gradients(grad, x, scaled, wanted)
    if of_weight and dw is not None:
        d_weight = dw if per_channel is None else (dw * per_channel).to(weight.dtype)
    if of_scale and dw is not None:
        wide = compute_dtype(dw.dtype)
        d_scale = (weight.to(wide) * dw.to(wide)).sum((1, 2, 3))
        if bias is not None:
            d_scale = d_scale + bias * total
        d_scale = d_scale.to(scale.dtype)
    if of_bias and total is not None:
        d_bias = (total if scale is None else total * scale).to(bias.dtype)
    return (
        dx if of_x else None,
        d_weight,
        d_bias,
        d_scale,
        total if of_shift else None,
        grad if of_residual else None,
    )


def _jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
    x, weight, bias, scale, out = ctx.saved_tensors
    dx, d_weight, d_bias, d_scale, d_shift, d_residual = tangents
    c = ctx.record.call
    found = added(
        None if dx is None else plain(dx, weight, c),
        None if d_weight is None else plain(x, d_weight, c),
        None if d_bias is None else d_bias[:, None, None],
    )
    if found is not None and scale is not None:
        found = found * scale[:, None, None]
    if d_scale is not None:
        y = plain(x, weight, c)
        y = y if bias is None else y + bias[:, None, None]
        found = added(found, y * d_scale[:, None, None])
    found = added(found, None if d_shift is None else d_shift[:, None, None], d_residual)
    shape = (x.size(0), weight.size(0), *c.out_size)
    assert found is not None  # some tangent is there
    found = found.to(x.dtype).expand(shape)
    return found if out is None else torch.ops.aten.threshold_backward(found, out, 0)


def _vmap(size: int, dims: Sequence[int | None], *args: Any) -> torch.Tensor:
    if dims[1:5] == (None,) * 4:
        out: torch.Tensor = convolve.vmap_merged(size, dims, *args, without_batch=_PER_CHANNEL)
        return out
    # A weight each: the batch becomes groups of channels.
    x, *given, residual = (
        None if t is None else vmap_axis_first(t, dim, size)
        for t, dim in zip(args[:6], dims, strict=False)
    )
    per_channel = (None if t is None else t.flatten(0, 1) for t in given)
    groups = (None if t is None else _as_groups(t) for t in (x, residual))
    c: Convolution = args[6]
    c = c._replace(call=_grouped(c.call, size))
    return _from_groups(convolve(next(groups), *per_channel, next(groups), c), size)


def _as_groups(t: torch.Tensor) -> torch.Tensor:
    """[B, N, C, H, W] as [N, B * C, H, W]."""
    return t.movedim(0, 1).flatten(1, 2)


def _from_groups(t: torch.Tensor, size: int) -> torch.Tensor:
    return t.unflatten(1, (size, t.size(1) // size)).movedim(1, 0)


def _grouped(c: Call, size: int) -> Call:
    return c._replace(groups=c.groups * size)


def _gradients(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, w: Wanted) -> Tensors:
    return backends.gradients(grad, x, weight, w[:2], w.call)


def _gradients_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, w: Wanted
) -> Tensors:
    return _fake_gradient(x, w.of_input), _fake_gradient(weight, w.of_weight)


def _fake_gradient(given: torch.Tensor, wanted: bool) -> torch.Tensor | None:
    if not wanted:
        return None
    layout = torch.channels_last if is_channels_last(given) else torch.contiguous_format
    return torch.empty(given.shape, dtype=given.dtype, device=given.device, memory_format=layout)


def _backward_twice(ctx: Any, to_x: torch.Tensor | None, to_weight: torch.Tensor | None) -> Tensors:
    """Gradients of `gradients`: input' = T(grad, weight) and weight' = W(grad, input)."""
    grad, x, weight = ctx.saved_tensors
    of_grad, of_x, of_weight = ctx.needs_input_grad[:3]
    wanted: Wanted = ctx.record
    c = wanted.call
    to_x = to_x if wanted.of_input else None
    to_weight = to_weight if wanted.of_weight else None
    d_grad = d_x = d_weight = None
    if of_grad:
        d_grad = added(
            None if to_x is None else plain(to_x, weight, c),
            None if to_weight is None else plain(x, to_weight, c),
        )
    if of_x and to_weight is not None:
        d_x = gradients(grad, x, to_weight, Wanted(True, False, c))[0]
    if of_weight and to_x is not None:
        d_weight = gradients(grad, to_x, weight, Wanted(False, True, c))[1]
    return d_grad, d_x, d_weight


def _gradients_jvp(ctx: Any, *tangents: torch.Tensor | None) -> Tensors:
    grad, x, weight = ctx.saved_tensors
    d_grad, d_x, d_weight = tangents
    w: Wanted = ctx.record
    of_x, of_weight = Wanted(True, False, w.call), Wanted(False, True, w.call)
    to_x = to_weight = None
    if w.of_input:
        to_x = added(
            None if d_grad is None else gradients(d_grad, x, weight, of_x)[0],
            None if d_weight is None else gradients(grad, x, d_weight, of_x)[0],
        )
    if w.of_weight:
        to_weight = added(
            None if d_grad is None else gradients(d_grad, x, weight, of_weight)[1],
            None if d_x is None else gradients(grad, d_x, weight, of_weight)[1],
        )
    if w.of_input and to_x is None:
        to_x = torch.zeros_like(x)
    if w.of_weight and to_weight is None:
        to_weight = torch.zeros_like(weight)
    return to_x, to_weight


def _gradients_vmap(
    size: int, dims: Sequence[int | None], *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    w: Wanted = args[3]
    if dims[2] is None and not w.of_weight:
        out: tuple[torch.Tensor, torch.Tensor] = gradients.vmap_merged(
            size, dims, *args, without_batch=("weight",)
        )
        return out
    grad, x, weight = (
        vmap_axis_first(t, dim, size) for t, dim in zip(args[:3], dims, strict=False)
    )
    w = w._replace(call=_grouped(w.call, size))
    dx, dw = gradients.all_outputs(_as_groups(grad), _as_groups(x), weight.flatten(0, 1), w)
    dx = _from_groups(dx, size) if w.of_input else weight.new_empty(size, 0)
    return dx, split_vmap_axis(dw, size) if w.of_weight else weight.new_empty(size, 0)


def count(x_shape: Any, weight_shape: Any, out_shape: Any) -> int:
    """Floating-point operations of a convolution, as torch counts its own."""
    from torch.utils.flop_counter import conv_flop_count  # loaded where this is called

    return int(conv_flop_count(x_shape, weight_shape, out_shape))


def _flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return count(x_shape, weight_shape, out_shape)


def _gradients_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, *rest: Any, **_: Any) -> int:
    of_x, of_weight = rest[:2]
    return (of_x + of_weight) * count(x_shape, weight_shape, grad_shape)


convolve: Operator = Operator(
    "dilated_conv2d",
    "Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual",
    Convolution,
    kernel=_forward,
    fake=_fake,
    save=_save,
    backward=_backward,
    jvp=_jvp,
    vmap=_vmap,
    flops=_flops,
)
gradients: Operator = Operator(
    "dilated_conv2d_backward",
    "Tensor grad, Tensor input, Tensor weight",
    Wanted,
    returns="(Tensor, Tensor)",
    kernel=_gradients,
    fake=_gradients_fake,
    differentiable=2,
    save=lambda grad, x, weight, *_: (grad, x, weight),
    backward=_backward_twice,
    jvp=_gradients_jvp,
    vmap=_gradients_vmap,
    flops=_gradients_flops,
)
