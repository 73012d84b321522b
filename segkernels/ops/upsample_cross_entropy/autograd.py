"""The gradient of the losses of upsampled logits.

The forward pass keeps the log of each pixel's sum of exponentials; the backward pass computes the
upsampled logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from segkernels.ops._operator import Operator, unfolded
from segkernels.ops.upsample_cross_entropy import native
from segkernels.ops.upsample_cross_entropy.native import Loss

_TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight"


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return loss_backward(grad, *ctx.saved_tensors, ctx.record), None, None, None


def _no_second_derivative(ctx: Any, grad: torch.Tensor) -> Any:
    raise RuntimeError(
        f"{ctx.record.name()} can be differentiated once: its gradient has no gradient"
    )


def _vmap(size: int, dims: Sequence[int | None], *args: Any) -> tuple[torch.Tensor, ...]:
    record: Loss = args[-1]
    if record.reduction != "none":
        raise NotImplementedError(
            f"{record.name()}: torch.vmap needs reduction='none', got {record.reduction!r}"
        )
    whole = _without_batch(record)
    value, kept, _ = loss.whole(*loss.folded(size, dims, *args, without_batch=whole))
    # The totals are those of the whole batch, and nothing reads them.
    return unfolded(value, size, value), unfolded(kept, size, value), value.new_empty(size, 3)


def _gradient_vmap(size: int, dims: Sequence[int | None], *args: Any) -> torch.Tensor:
    *tensors, totals, record = args
    totals = totals if dims[6] is None else totals.select(dims[6], 0)
    whole = _without_batch(record)
    args = *tensors, totals, record
    out: torch.Tensor = loss_backward.fold(size, (*dims[:6], None), *args, without_batch=whole)
    return out


def _without_batch(record: Loss) -> tuple[str, ...]:
    return ("pos_weight", "totals") if record.binary else ("weight", "pos_weight", "totals")


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
