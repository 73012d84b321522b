"""The operators of the cross entropy losses of upsampled logits.

The softmax loss saves the log-sum-exp of each pixel. The backward pass computes the upsampled
logits again.
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
    # A mean or a sum is over one call. With "none" the backward pass reads only one of `totals`,
    # the sum of the class weights, which is the same for all calls.
    if args[-1].reduction != "none":
        return loss.vmap_loop(size, dims, *args)
    return loss.vmap_merged(size, dims, *args, without_batch=_without_batch(args[-1]), common=(2,))


def _backward_vmap(size: int, dims: Sequence[int | None], *args: Any) -> Any:
    if args[-1].reduction != "none" or any(dim is not None for dim in dims[3:5]):
        return loss_backward.vmap_loop(size, dims, *args)
    *tensors, totals, record = args
    totals = totals if dims[6] is None else totals.select(dims[6], 0)
    without_batch = (*_without_batch(record), "totals")
    args = *tensors, totals, record
    return loss_backward.vmap_merged(size, (*dims[:6], None), *args, without_batch=without_batch)


def _without_batch(record: Loss) -> tuple[str, ...]:
    """Return the names of the tensors without a batch axis."""
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
    vmap=_backward_vmap,
)
