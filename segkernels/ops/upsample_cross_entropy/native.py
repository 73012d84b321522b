"""The native calls of the cross entropy losses of upsampled logits."""

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
    """The arguments of a loss other than tensors.

    Attributes:
        binary: whether it is the binary cross entropy of one logit, or else the softmax cross
            entropy over classes.
        ignore_index: label of pixels that are left out of the loss.
        reduction: "none", "mean" or "sum".
        label_smoothing: as in F.cross_entropy; 0 for the binary loss.
        resampling: from the size of the logits to that of the target.
    """

    binary: bool
    ignore_index: int
    reduction: str
    label_smoothing: float
    resampling: Resampling

    def name(self) -> str:
        """Return the name of the public function, for messages."""
        return "upsample_binary_cross_entropy" if self.binary else "upsample_cross_entropy"


# (loss, kept, totals):
# loss: a scalar, or one value per pixel for "none".
# kept: [*target.shape, 2], for each pixel the largest logit and the sum of exponentials relative to
#     it, for the backward pass; None for the binary loss.
# totals: [sum of the losses, reduced; sum of the pixels' weights; sum of the class weights].
Outputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


def outputs(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    pos_weight: torch.Tensor | None,
    loss: Loss,
) -> Outputs:
    """Return uninitialised outputs.

    `kept` is None for the binary loss, whose gradient needs only the pixel's own logit.
    """
    compute = _dtypes.compute_dtype(logits.dtype)
    device = logits.device
    shape = target.shape if loss.reduction == "none" else ()
    return (
        torch.empty(shape, dtype=compute, device=device),
        None if loss.binary else torch.empty((*target.shape, 2), dtype=compute, device=device),
        torch.empty(3, dtype=compute, device=device),
    )


def empty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised gradient with respect to `logits`, in their dtype and layout."""
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
) -> Outputs:
    """Compute the loss, and `kept` and `totals` for the backward pass."""
    value, kept, totals = outputs(logits, target, weight, pos_weight, loss)
    where = _native.where(logits)
    none = loss.reduction == "none"
    classes = 2 if loss.binary else logits.size(1)
    with _status.watch(
        logits, loss.name(), describe=lambda _: _invalid_labels(target, classes, loss)
    ) as status:
        call = _call(logits, target, weight, pos_weight, loss, status)
        if where[0] < 0:
            workspace = _workspace(call, where, False)
        else:
            partials = _native.C().LOSS_PARTIALS
            workspace = torch.empty(partials, dtype=torch.float64, device=logits.device)
        losses = value if none else None
        _native.C().upsample_loss(where, call, kept, losses, totals, workspace)
    return value if none else totals[0].clone(), kept, totals


def _invalid_labels(target: torch.Tensor, classes: int, loss: Loss) -> str:
    """Say which labels of `target` are invalid."""
    labels = target.long()
    invalid = ((labels < 0) | (labels >= classes)) & (labels != loss.ignore_index)
    at = invalid.nonzero()
    value = int(labels[tuple(at[0])])
    allowed = "0, 1" if loss.binary else f"from 0 to num_classes - 1 = {classes - 1}"
    hint = "; to leave these pixels out, pass ignore_index=255" if value == 255 else ""
    return (
        f"target must be {allowed} or ignore_index = {loss.ignore_index}, got {value} at "
        f"{at[0].tolist()}, the first of {len(at)} invalid labels{hint}"
    )


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
    """Compute the gradient with respect to `logits`, in their dtype and layout."""
    out = empty_gradient(logits)
    if out.numel() == 0:
        return out
    where = _native.where(logits)
    grad = grad.contiguous()
    # The forward pass has reported labels out of range; the backward pass ignores those pixels.
    call = _call(logits, target, weight, pos_weight, loss, None)
    workspace = _workspace(call, where, True) if where[0] < 0 else None
    _native.C().upsample_loss_backward(
        where, call, grad, kept, totals, out, out.stride(), workspace
    )
    return out
