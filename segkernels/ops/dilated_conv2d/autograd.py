"""dilated_conv2d for autograd and for torch's dispatcher.

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

from typing import Any

import torch

from segkernels._dtypes import compute_dtype
from segkernels.ops import _op
from segkernels.ops.dilated_conv2d import backends
from segkernels.ops.dilated_conv2d.call import FIELDS, SCHEMA, Call, Epilogue, from_schema

_EPILOGUE = "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, str? activation"
_op.library.define(f"dilated_conv2d(Tensor input, Tensor weight, {_EPILOGUE}, {SCHEMA}) -> Tensor")
_op.library.define(
    "dilated_conv2d_backward(Tensor grad, Tensor input, Tensor weight, bool of_input, "
    f"bool of_weight, {SCHEMA}) -> (Tensor, Tensor)"
)

Mask = tuple[bool, bool]


def convolve(x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call) -> torch.Tensor:
    """Convolve the 4-D `x`, with the epilogue `e`."""
    *tensors, _ = e
    if x.is_meta or _op.through_dispatcher(x, weight, *tensors):
        out: torch.Tensor = torch.ops.segkernels.dilated_conv2d(x, weight, *e, *c)
        return out
    if _op.wants_grad(x, weight, *tensors):
        recorded: torch.Tensor = DilatedConv2d.apply(x, weight, *e, c)
        return recorded
    return backends.forward(x, weight, e, c)


def gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: Mask, c: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the plain convolution's input and weight; an empty tensor for one not wanted."""
    found: tuple[torch.Tensor, torch.Tensor]
    if grad.is_meta or _op.through_dispatcher(grad, x, weight):
        found = torch.ops.segkernels.dilated_conv2d_backward(grad, x, weight, *mask, *c)
    elif _op.wants_grad(grad, x, weight):
        found = DilatedConv2dBackward.apply(grad, x, weight, mask, c)
    else:
        found = backends.gradients(grad, x, weight, mask, c)
    return found


class DilatedConv2d(torch.autograd.Function):
    """Convolves; gradients reach the tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        residual: torch.Tensor | None,
        activation: str | None,
        c: Call,
    ) -> Any:
        e = Epilogue(bias, scale, shift, residual, activation)
        out = backends.forward(x, weight, e, c)
        _save(ctx, x, weight, e, c, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*_backward(ctx, grads[0]), None, None)


def _save(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call, out: torch.Tensor
) -> None:
    ctx.call = c
    ctx.shift_dtype = None if e.shift is None else e.shift.dtype
    ctx.save_for_backward(x, weight, e.bias, e.scale, out if e.activation == "relu" else None)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, scale, out = ctx.saved_tensors
    c: Call = ctx.call
    of_x, of_weight, of_bias, of_scale, of_shift, of_residual = ctx.needs_input_grad[:6]
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    per_channel = None if scale is None else scale[:, None, None, None]
    total = dx = dw = d_weight = d_bias = d_scale = None
    if of_bias or of_shift or (of_scale and bias is not None):
        total = grad.sum((0, 2, 3), dtype=compute_dtype(grad.dtype))
    if of_x or of_weight or of_scale:
        scaled = weight if per_channel is None else (weight * per_channel).to(weight.dtype)
        dx, dw = gradients(grad, x, scaled, (of_x, of_weight or of_scale), c)
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
        total.to(ctx.shift_dtype) if of_shift and total is not None else None,
        grad if of_residual else None,
    )


class DilatedConv2dBackward(torch.autograd.Function):
    """The plain convolution's gradients, differentiable again."""

    @staticmethod
    def forward(
        ctx: Any, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: Mask, c: Call
    ) -> Any:
        ctx.save_for_backward(grad, x, weight)
        ctx.mask, ctx.call = mask, c
        return backends.gradients(grad, x, weight, mask, c)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*_backward_twice(ctx, *grads), None, None)


def _backward_twice(
    ctx: Any, to_x: torch.Tensor, to_weight: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `gradients`: input' = T(grad, weight) and weight' = W(grad, input)."""
    grad, x, weight = ctx.saved_tensors
    c: Call = ctx.call
    of_grad, of_x, of_weight = ctx.needs_input_grad[:3]
    to_x_too, to_weight_too = ctx.mask
    d_grad = d_x = d_weight = None
    if of_grad:
        if to_x_too:
            d_grad = convolve(to_x, weight, Epilogue(), c)
        if to_weight_too:
            also = convolve(x, to_weight, Epilogue(), c)
            d_grad = also if d_grad is None else d_grad + also
    if of_x and to_weight_too:
        d_x = gradients(grad, x, to_weight, (True, False), c)[0]
    if of_weight and to_x_too:
        d_weight = gradients(grad, to_x, weight, (False, True), c)[1]
    return d_grad, d_x, d_weight


def _kernel(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    return backends.forward(x, weight, Epilogue(*args[:5]), from_schema(args[5:]))


def _fake(x: torch.Tensor, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    c = from_schema(args[5:])
    shape = (x.size(0), weight.size(0), *c.out_size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=c.memory_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight = inputs[:2]
    _save(ctx, x, weight, Epilogue(*inputs[2:7]), from_schema(inputs[7:]), output)


def _recorded_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return (*_backward(ctx, grad), *[None] * (1 + FIELDS))


def _gradients_kernel(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return backends.gradients(grad, x, weight, (args[0], args[1]), from_schema(args[2:]))


def _gradients_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    of_x, of_weight = args[:2]
    return _fake_gradient(x, of_x), _fake_gradient(weight, of_weight)


def _fake_gradient(given: torch.Tensor, wanted: bool) -> torch.Tensor:
    if not wanted:
        return given.new_empty(0)
    layout = torch.channels_last if _op.is_channels_last(given) else torch.contiguous_format
    return torch.empty(given.shape, dtype=given.dtype, device=given.device, memory_format=layout)


def _setup_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, weight, of_input, of_weight = inputs[:5]
    ctx.save_for_backward(grad, x, weight)
    ctx.mask, ctx.call = (of_input, of_weight), from_schema(inputs[5:])


def _recorded_backward_twice(
    ctx: Any, to_x: torch.Tensor, to_weight: torch.Tensor
) -> tuple[Any, ...]:
    return (*_backward_twice(ctx, to_x, to_weight), *[None] * (2 + FIELDS))


for _key in ("CPU", "CUDA"):
    _op.library.impl("dilated_conv2d", _kernel, _key)
    _op.library.impl("dilated_conv2d_backward", _gradients_kernel, _key)
torch.library.register_fake("segkernels::dilated_conv2d", _fake, lib=_op.library)
torch.library.register_fake("segkernels::dilated_conv2d_backward", _gradients_fake, lib=_op.library)
torch.library.register_autograd(
    "segkernels::dilated_conv2d", _recorded_backward, setup_context=_setup, lib=_op.library
)
torch.library.register_autograd(
    "segkernels::dilated_conv2d_backward",
    _recorded_backward_twice,
    setup_context=_setup_gradients,
    lib=_op.library,
)
