"""The torch.library operators of dilated_conv2d, their kernels and derivatives.

hopper.py computes the parts of a call that it is chosen for, cudnn.py all others.

The saved tensors are the inputs and, with ReLU, the output, whose sign is the mask. The next layer
usually saves the output too, so this costs no memory; a separate mask would be another byte per
element to write and to store.

Let g be the gradient with respect to the input of the activation, and W(g) the weight gradient of
the plain convolution for g. Then

    d residual = g,  d shift = sum of g,  d bias = scale * d shift
    d input = input gradient of the plain convolution for g, with the weight scale * w
    d weight = scale * W(g)
    d scale = sum of g * (conv + bias) = <w, W(g)> for each output channel + bias * d shift

None of these needs the result of the convolution, and g is not scaled. The plain gradients are
bilinear, so their derivatives are plain convolutions and plain gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from segkernels.ops._dtypes import compute_dtype
from segkernels.ops._operator import (
    Operator,
    is_channels_last,
    memory_format,
    split_vmap_axis,
    vmap_axis_first,
)
from segkernels.ops.dilated_conv2d import cudnn, hopper
from segkernels.ops.dilated_conv2d.call import Call, Epilogue, laid_out

Tensors = tuple[torch.Tensor | None, ...]
_PER_CHANNEL = ("weight", "bias", "scale", "shift")


class Convolution(NamedTuple):
    """Arguments of the operator other than tensors; `activation` is None or "relu"."""

    call: Call
    activation: str | None


class BackwardArgs(NamedTuple):
    """Arguments of the backward operator: which gradients to compute, and of which call."""

    of_input: bool
    of_weight: bool
    call: Call


def forward(x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call) -> torch.Tensor:
    """The convolution of a 4-D `x` with its epilogue, in the layout that `c` requests.

    This is the kernel of `convolve`, which records the gradients.
    """
    out = hopper.forward(x, [weight], e, [c])
    if out is None:
        out = cudnn.forward(x, weight, e, c)
    return laid_out(out, c.channels_last)


def _gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, args: BackwardArgs
) -> Tensors:
    """Gradients of the plain convolution; None where `args` does not request them."""
    of_x, of_weight, c = args
    dx = hopper.input_gradient(grad, x, weight, c) if of_x else None
    dw = hopper.weight_gradient(grad, x, weight, c) if of_weight else None
    missing = (of_x and dx is None, of_weight and dw is None)
    torch_dx, torch_dw = cudnn.gradients(grad, x, weight, c, missing)
    dx = torch_dx if dx is None else dx
    dw = torch_dw if dw is None else dw
    return (
        None if dx is None else laid_out(dx, is_channels_last(x)),
        None if dw is None else laid_out(dw, is_channels_last(weight)),
    )


def plain(x: torch.Tensor, weight: torch.Tensor, c: Call) -> torch.Tensor:
    """The plain convolution, without an epilogue; differentiable."""
    out: torch.Tensor = convolve(x, weight, None, None, None, None, Convolution(c, None))
    return out


def sum_of(*terms: torch.Tensor | None) -> torch.Tensor | None:
    """Sum of the terms that are not None; None if all are."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _forward(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    bias, scale, shift, residual, c = args
    return forward(x, weight, Epilogue(bias, scale, shift, residual, c.activation), c.call)


def _fake(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    c = args[-1].call
    shape = (x.size(0), weight.size(0), *c.out_size)
    layout = memory_format(c.channels_last)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _save(*args: Any) -> Tensors:
    x, weight, bias, scale, _, _, c, out = args
    return x, weight, bias, scale, out if c.activation == "relu" else None


def _backward(ctx: Any, grad: torch.Tensor) -> Tensors:
    x, weight, bias, scale, out = ctx.saved_tensors
    of_x, of_weight, of_bias, of_scale, of_shift, of_residual = ctx.needs_input_grad[:6]
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    d_shift = d_bias = None
    if of_bias or of_shift or (of_scale and bias is not None):
        d_shift = grad.sum((0, 2, 3), dtype=compute_dtype(grad.dtype))
    needed = (of_x, of_weight, of_scale)
    dx, d_weight, d_scale = scaled_gradients(grad, x, weight, scale, ctx.record.call, needed)
    if d_scale is not None:
        if bias is not None:
            d_scale = d_scale + bias * d_shift
        d_scale = d_scale.to(scale.dtype)
    if of_bias and d_shift is not None:
        d_bias = (d_shift if scale is None else d_shift * scale).to(bias.dtype)
    d_residual = grad if of_residual else None
    return dx, d_weight, d_bias, d_scale, d_shift if of_shift else None, d_residual


def scaled_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    c: Call,
    needed: tuple[bool, bool, bool],
) -> Tensors:
    """Gradients of conv(x, weight) * scale with respect to `x`, `weight` and `scale`.

    Args:
        grad: [N, C_out, H_out, W_out], the gradient with respect to the product.
        x: [N, C, H, W].
        weight: [C_out, C / groups, kh, kw].
        scale: [C_out]; None: 1.
        c: the call.
        needed: which gradients to compute; the others are None. That of `scale` is in the compute
            dtype.
    """
    of_x, of_weight, of_scale = needed
    if not any(needed):
        return None, None, None
    per_channel = None if scale is None else scale[:, None, None, None]
    scaled = weight if per_channel is None else (weight * per_channel).to(weight.dtype)
    dx, dw = gradients(grad, x, scaled, BackwardArgs(of_x, of_weight or of_scale, c))
    d_weight = d_scale = None
    if of_weight:
        d_weight = dw if per_channel is None else (dw * per_channel).to(weight.dtype)
    if of_scale:
        wide = compute_dtype(dw.dtype)
        d_scale = (weight.to(wide) * dw.to(wide)).sum((1, 2, 3))
    return dx if of_x else None, d_weight, d_scale


def _jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
    x, weight, bias, scale, out = ctx.saved_tensors
    dx, d_weight, d_bias, d_scale, d_shift, d_residual = tangents
    c = ctx.record.call
    tangent = sum_of(
        None if dx is None else plain(dx, weight, c),
        None if d_weight is None else plain(x, d_weight, c),
        None if d_bias is None else d_bias[:, None, None],
    )
    if tangent is not None and scale is not None:
        tangent = tangent * scale[:, None, None]
    if d_scale is not None:
        y = plain(x, weight, c)
        y = y if bias is None else y + bias[:, None, None]
        tangent = sum_of(tangent, y * d_scale[:, None, None])
    tangent = sum_of(tangent, None if d_shift is None else d_shift[:, None, None], d_residual)
    shape = (x.size(0), weight.size(0), *c.out_size)
    assert tangent is not None  # at least one input has a tangent
    tangent = tangent.to(x.dtype).expand(shape)
    return tangent if out is None else torch.ops.aten.threshold_backward(tangent, out, 0)


def _vmap(size: int, dims: Sequence[int | None], *args: Any) -> torch.Tensor:
    if dims[1:5] == (None,) * 4:
        out: torch.Tensor = convolve.vmap_merged(size, dims, *args, without_batch=_PER_CHANNEL)
        return out
    # The weights or vectors are batched: the batch becomes groups of channels.
    x, *vectors, residual = (
        None if t is None else vmap_axis_first(t, dim, size)
        for t, dim in zip(args[:6], dims, strict=False)
    )
    per_channel = (None if t is None else t.flatten(0, 1) for t in vectors)
    groups = (None if t is None else _as_groups(t) for t in (x, residual))
    c: Convolution = args[6]
    c = c._replace(call=_grouped(c.call, size))
    return _from_groups(convolve(next(groups), *per_channel, next(groups), c), size)


def _as_groups(t: torch.Tensor) -> torch.Tensor:
    """Reshape [B, N, C, H, W] to [N, B * C, H, W]."""
    return t.movedim(0, 1).flatten(1, 2)


def _from_groups(t: torch.Tensor, size: int) -> torch.Tensor:
    """Reshape [N, B * C, H, W] to [B, N, C, H, W], with B = `size`."""
    return t.unflatten(1, (size, t.size(1) // size)).movedim(1, 0)


def _grouped(c: Call, size: int) -> Call:
    return c._replace(groups=c.groups * size)


def _gradients_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, args: BackwardArgs
) -> Tensors:
    return _fake_gradient(x, args.of_input), _fake_gradient(weight, args.of_weight)


def _fake_gradient(like: torch.Tensor, needed: bool) -> torch.Tensor | None:
    if not needed:
        return None
    layout = memory_format(is_channels_last(like))
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _double_backward(
    ctx: Any, grad_dx: torch.Tensor | None, grad_dw: torch.Tensor | None
) -> Tensors:
    """Backward of `gradients`, which computes dx = T(grad, weight) and dw = W(grad, x).

    T and W are the plain input and weight gradients; `grad_dx` and `grad_dw` are the gradients with
    respect to dx and dw.
    """
    grad, x, weight = ctx.saved_tensors
    of_grad, of_x, of_weight = ctx.needs_input_grad[:3]
    args: BackwardArgs = ctx.record
    c = args.call
    grad_dx = grad_dx if args.of_input else None
    grad_dw = grad_dw if args.of_weight else None
    d_grad = d_x = d_weight = None
    if of_grad:
        d_grad = sum_of(
            None if grad_dx is None else plain(grad_dx, weight, c),
            None if grad_dw is None else plain(x, grad_dw, c),
        )
    if of_x and grad_dw is not None:
        d_x = gradients(grad, x, grad_dw, BackwardArgs(True, False, c))[0]
    if of_weight and grad_dx is not None:
        d_weight = gradients(grad, grad_dx, weight, BackwardArgs(False, True, c))[1]
    return d_grad, d_x, d_weight


def _gradients_jvp(ctx: Any, *tangents: torch.Tensor | None) -> Tensors:
    grad, x, weight = ctx.saved_tensors
    d_grad, d_x, d_weight = tangents
    args: BackwardArgs = ctx.record
    of_x, of_weight = BackwardArgs(True, False, args.call), BackwardArgs(False, True, args.call)
    tangent_dx = tangent_dw = None
    if args.of_input:
        tangent_dx = sum_of(
            None if d_grad is None else gradients(d_grad, x, weight, of_x)[0],
            None if d_weight is None else gradients(grad, x, d_weight, of_x)[0],
        )
    if args.of_weight:
        tangent_dw = sum_of(
            None if d_grad is None else gradients(d_grad, x, weight, of_weight)[1],
            None if d_x is None else gradients(grad, d_x, weight, of_weight)[1],
        )
    if args.of_input and tangent_dx is None:
        tangent_dx = torch.zeros_like(x)
    if args.of_weight and tangent_dw is None:
        tangent_dw = torch.zeros_like(weight)
    return tangent_dx, tangent_dw


def _gradients_vmap(
    size: int, dims: Sequence[int | None], *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    record: BackwardArgs = args[3]
    if dims[2] is None and not record.of_weight:
        out: tuple[torch.Tensor, torch.Tensor] = gradients.vmap_merged(
            size, dims, *args, without_batch=("weight",)
        )
        return out
    grad, x, weight = (
        vmap_axis_first(t, dim, size) for t, dim in zip(args[:3], dims, strict=False)
    )
    record = record._replace(call=_grouped(record.call, size))
    dx, dw = gradients.all_outputs(_as_groups(grad), _as_groups(x), weight.flatten(0, 1), record)
    dx = _from_groups(dx, size) if record.of_input else weight.new_empty(size, 0)
    return dx, split_vmap_axis(dw, size) if record.of_weight else weight.new_empty(size, 0)


def conv_flops(x_shape: Any, weight_shape: Any, out_shape: Any) -> int:
    """Floating-point operations of a convolution, counted as torch does."""
    from torch.utils.flop_counter import conv_flop_count  # imported late: see ops/_flops.py

    return int(conv_flop_count(x_shape, weight_shape, out_shape))


def _flops(x_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flops(x_shape, weight_shape, out_shape)


def _gradients_flops(grad_shape: Any, x_shape: Any, weight_shape: Any, *args: Any, **_: Any) -> int:
    of_x, of_weight = args[:2]
    return (of_x + of_weight) * conv_flops(x_shape, weight_shape, grad_shape)


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
    BackwardArgs,
    returns="(Tensor, Tensor)",
    kernel=_gradients,
    fake=_gradients_fake,
    differentiable=2,
    save=lambda grad, x, weight, *_: (grad, x, weight),
    backward=_double_backward,
    jvp=_gradients_jvp,
    vmap=_gradients_vmap,
    flops=_gradients_flops,
)
