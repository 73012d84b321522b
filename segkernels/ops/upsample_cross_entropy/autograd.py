"""The losses of upsampled logits, for autograd and for torch's dispatcher."""

from __future__ import annotations

from typing import Any

import torch

from segkernels.ops import _op
from segkernels.ops.upsample_cross_entropy import _kernel
from segkernels.ops.upsample_cross_entropy._kernel import Loss, Tensors

_TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight"
_LOSS = (
    "bool binary, int ignore_index, str reduction, float label_smoothing, str mode, "
    "bool align_corners, int rule"
)
_op.library.define(f"upsample_cross_entropy({_TENSORS}, {_LOSS}) -> (Tensor, Tensor, Tensor)")
_op.library.define(
    f"upsample_cross_entropy_backward(Tensor grad, {_TENSORS}, Tensor kept, Tensor totals, {_LOSS})"
    " -> Tensor"
)


def apply(t: Tensors, loss: Loss) -> torch.Tensor:
    """The loss, on the way that this call needs: a scalar, or a value a pixel for "none"."""
    if _op.through_dispatcher(*t):
        value: torch.Tensor = torch.ops.segkernels.upsample_cross_entropy(*t, *loss)[0]
        return value
    if _op.wants_grad(t.logits):
        recorded: torch.Tensor = UpsampleLoss.apply(*t, loss)
        return recorded
    return _forward(*t, *loss)[0]


class UpsampleLoss(torch.autograd.Function):
    """Keeps the log of each pixel's sum of exponentials; the backward computes logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        pos_weight: torch.Tensor | None,
        loss: Loss,
    ) -> torch.Tensor:
        value, kept, totals = _forward(logits, target, weight, pos_weight, *loss)
        ctx.save_for_backward(logits, target, weight, pos_weight, kept, totals)
        ctx.loss = loss
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            # create_graph=True: the dispatcher's operator raises where its gradient is asked for.
            out = torch.ops.segkernels.upsample_cross_entropy_backward(
                grads[0], *ctx.saved_tensors, *ctx.loss
            )
        else:
            out = _backward_impl(grads[0], *ctx.saved_tensors, *ctx.loss)
        return out, None, None, None, None


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t, loss = Tensors(*args[:4]), Loss(*args[4:])
    losses, kept, totals = _kernel.forward(t, loss)
    return losses if loss.reduction == "none" else totals[0].clone(), kept, totals


def _fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t, loss = Tensors(*args[:4]), Loss(*args[4:])
    losses, kept, totals = _kernel.empty_results(t, loss)
    return losses if loss.reduction == "none" else totals.new_empty(()), kept, totals


def _backward_impl(grad: torch.Tensor, *args: Any) -> torch.Tensor:
    return _kernel.backward(grad, Tensors(*args[:4]), args[4], args[5], Loss(*args[6:]))


def _backward_fake(grad: torch.Tensor, *args: Any) -> torch.Tensor:
    logits = args[0]
    return _kernel.empty_gradient(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.loss = Loss(*inputs[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    logits, target, weight, pos_weight, kept, totals = ctx.saved_tensors
    out = torch.ops.segkernels.upsample_cross_entropy_backward(
        grad, logits, target, weight, pos_weight, kept, totals, *ctx.loss
    )
    return (out, *[None] * 10)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "upsample_cross_entropy can be differentiated once: its gradient has no gradient"
    )


for _key in ("CPU", "CUDA"):
    _op.library.impl("upsample_cross_entropy", _forward, _key)
    _op.library.impl("upsample_cross_entropy_backward", _backward_impl, _key)
torch.library.register_fake("segkernels::upsample_cross_entropy", _fake, lib=_op.library)
torch.library.register_fake(
    "segkernels::upsample_cross_entropy_backward", _backward_fake, lib=_op.library
)
torch.library.register_autograd(
    "segkernels::upsample_cross_entropy", _backward, setup_context=_setup_context, lib=_op.library
)
torch.library.register_autograd(
    "segkernels::upsample_cross_entropy_backward", _no_second_derivative, lib=_op.library
)
