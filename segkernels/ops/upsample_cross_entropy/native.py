"""The native calls of the losses of upsampled logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels import _native, _status
from segkernels.ops import _dtypes
from segkernels.ops.interpolate._resampling import Resampling
from segkernels.ops.interpolate.native import empty_result, native_resampling

# enum class Reduction in csrc/upsample_cross_entropy/upsample_cross_entropy.h
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
# enum class TargetType in csrc/upsample_cross_entropy/loss.h
LABELS = {torch.uint8: 0, torch.int16: 1, torch.int32: 2, torch.int64: 3}
TARGETS = {**LABELS, torch.float32: 4, torch.float64: 5}


class Loss(NamedTuple):
    """What the loss is, apart from tensors.

    Attributes:
        binary: binary cross entropy of one logit; else softmax cross entropy over classes.
        ignore_index: the label that does not count.
        reduction: "none", "mean" or "sum".
        label_smoothing: of softmax cross entropy.
        resampling: from the logits' size to the target's.
    """

    binary: bool
    ignore_index: int
    reduction: str
    label_smoothing: float
    resampling: Resampling

    def name(self) -> str:
        """The public function's name, for messages."""
        return "upsample_binary_cross_entropy" if self.binary else "upsample_cross_entropy"


# The loss, or a value a pixel for "none"; what is kept of a pixel; [loss, weight, weights].
Found = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def outputs(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: Loss,
) -> Found:
    """Uninitialised results.

    Nothing is kept of the binary loss: a pixel's gradient needs its own logit alone.
    """
    compute = _dtypes.compute_dtype(logits.dtype)
    device = logits.device
    shape = target.shape if loss.reduction == "none" else ()
    return (
        torch.empty(shape, dtype=compute, device=device),
        None if loss.binary else torch.empty(target.shape, dtype=compute, device=device),
        torch.empty(3, dtype=compute, device=device),
    )


def empty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """An uninitialised gradient of `logits`, in their dtype and layout."""
    return empty_result(logits, (logits.size(2), logits.size(3)))


def _call(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: Loss,
    status: torch.Tensor | None,
) -> object:
    return _native.C().LossCall(
        native_resampling(loss.resampling, logits.size(0), 1),
        logits.size(1),
        logits.stride(),
        _dtypes.FLOATING[logits.dtype],
        loss.binary,
        logits,
        target,
        TARGETS[target.dtype],
        loss.ignore_index,
        weight,
        pos_weight,
        loss.label_smoothing,
        REDUCTIONS[loss.reduction],
        status,
    )


def _workspace(call: object, where: tuple[int, int, int], backward: bool) -> torch.Tensor:
    return torch.empty(
        _native.C().upsample_loss_workspace(where, call, backward), dtype=torch.uint8, device="cpu"
    )


def forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: Loss,
) -> Found:
    """The loss, kept values and totals."""
    value, kept, totals = outputs(logits, target, weight, pos_weight, loss)
    where = _native.where(logits)
    none = loss.reduction == "none"
    with _status.watch(logits, loss.name()) as status:
        call = _call(logits, target, weight, pos_weight, loss, status)
        if where[0] < 0:
            workspace = _workspace(call, where, False)
        else:
            partials = _native.C().LOSS_PARTIALS
            workspace = torch.empty(partials, dtype=torch.float64, device=logits.device)
        losses = value if none else None
        _native.C().upsample_loss(where, call, kept, losses, totals, workspace)
    return value if none else totals[0].clone(), kept, totals


def backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    kept: torch.Tensor | None,
    totals: torch.Tensor,
    loss: Loss,
) -> torch.Tensor:
    """The gradient of the logits, in their dtype and layout."""
    out = empty_gradient(logits)
    if out.numel() == 0:
        return out
    where = _native.where(logits)
    grad = grad.contiguous()
    # Labels out of range were reported by the forward pass; here they are skipped again.
    call = _call(logits, target, weight, pos_weight, loss, None)
    workspace = _workspace(call, where, True) if where[0] < 0 else None
    _native.C().upsample_loss_backward(
        where, call, grad, kept, totals, out, out.stride(), workspace
    )
    return out
