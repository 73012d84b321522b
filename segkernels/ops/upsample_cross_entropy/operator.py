"""The gradient of the losses of upsampled logits.

The forward pass keeps the log of each pixel's sum of exponentials; the backward pass computes the
upsampled logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops._operator import Operator
from segkernels.ops.upsample_cross_entropy import native
from segkernels.ops.upsample_cross_entropy.native import Loss

_TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight"


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return loss_backward(grad, *ctx.saved_tensors, ctx.record), None, None, None


def _no_second_derivative(ctx: Any, grad: torch.Tensor) -> Any:
    raise RuntimeError(
        f"{ctx.record.name()} can be differentiated once: its gradient has no gradient"
    )


def _vmap(size: int, dims: Sequence[int | None], *args: Any) -> Any:
    # A mean or a sum is that of its own call. Of the totals of "none" only the sum of the class
    # weights is read again.
    if args[-1].reduction != "none":
        return loss.loop(size, dims, *args)
    whole = _without_batch(args[-1])
    return loss.fold(size, dims, *args, without_batch=whole, common=(2,))


def _gradient_vmap(size: int, dims: Sequence[int | None], *args: Any) -> Any:
    if args[-1].reduction != "none" or any(dim is not None for dim in dims[3:5]):
        return loss_backward.loop(size, dims, *args)
    *tensors, totals, record = args
    totals = totals if dims[6] is None else totals.select(dims[6], 0)
    whole = (*_without_batch(record), "totals")
    args = *tensors, totals, record
    return loss_backward.fold(size, (*dims[:6], None), *args, without_batch=whole)


def _without_batch(record: Loss) -> tuple[str, ...]:
    return ("pos_weight",) if record.binary else ("weight", "pos_weight")


loss: Operator = Operator(
    "upsample_cross_entropy",
    _TENSORS,
    Loss,
    returns="(Tensor loss, Tensor kept, Tensor totals)",
    kernel=native.forward,
    fake=native.outputs,
    save=lambda *args: (*args[:4], *args[6:]),
    backward=_backward,
    vmap=_vmap,
)
loss_backward: Operator = Operator(
    "upsample_cross_entropy_backward",
    f"Tensor grad, {_TENSORS}, Tensor? kept, Tensor totals",
    Loss,
    kernel=native.backward,
    fake=lambda grad, logits, *rest: native.empty_gradient(logits),
    backward=_no_second_derivative,
    vmap=_gradient_vmap,
)
