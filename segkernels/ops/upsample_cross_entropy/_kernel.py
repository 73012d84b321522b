"""The native calls of the losses of upsampled logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels import _dtypes, _native, _status
from segkernels.ops.interpolate import _resampling, _tail
from segkernels.ops.interpolate._resampling import Resampling

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
        mode: of the resampling.
        align_corners: likewise.
        rule: likewise.
    """

    binary: bool
    ignore_index: int
    reduction: str
    label_smoothing: float
    mode: str
    align_corners: bool
    rule: int

    def name(self) -> str:
        """The public function's name, for messages."""
        return "upsample_binary_cross_entropy" if self.binary else "upsample_cross_entropy"


class Tensors(NamedTuple):
    """logits [N, C, h, w]; target [N, H, W] (binary: [N, 1, H, W]); weight, pos_weight or None."""

    logits: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None
    pos_weight: torch.Tensor | None


def resampling(t: Tensors, loss: Loss) -> Resampling:
    """From the logits' size to the target's."""
    in_size = (t.logits.size(2), t.logits.size(3))
    out_size = (t.target.size(-2), t.target.size(-1))
    return Resampling(
        in_size, out_size, (0.0, 0.0), loss.mode, loss.align_corners, loss.rule, transpose=False
    )


def empty_results(t: Tensors, loss: Loss) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised losses (a pixel each for "none"), kept values, and [loss, weight, weights]."""
    compute = _dtypes.compute_dtype(t.logits.dtype)
    device = t.logits.device
    none = loss.reduction == "none"
    losses = torch.empty(t.target.shape if none else (0,), dtype=compute, device=device)
    # Of the binary loss nothing is kept: a pixel's gradient needs its own logit alone.
    kept = torch.empty((0,) if loss.binary else t.target.shape, dtype=compute, device=device)
    return losses, kept, torch.empty(3, dtype=compute, device=device)


def empty_gradient(logits: torch.Tensor) -> torch.Tensor:
    """An uninitialised gradient of `logits`, in their dtype and layout."""
    return _resampling.empty_result(logits, (logits.size(2), logits.size(3)))


def _call(t: Tensors, loss: Loss, status: torch.Tensor | None) -> object:
    return _native.C().LossCall(
        *_tail.native_args(resampling(t, loss), t.logits),
        loss.binary,
        t.logits.data_ptr(),
        t.target.data_ptr(),
        TARGETS[t.target.dtype],
        loss.ignore_index,
        0 if t.weight is None else t.weight.data_ptr(),
        0 if t.pos_weight is None else t.pos_weight.data_ptr(),
        loss.label_smoothing,
        REDUCTIONS[loss.reduction],
        0 if status is None else status.data_ptr(),
    )


def _workspace(call: object, where: tuple[int, int, int], backward: bool) -> torch.Tensor:
    return torch.empty(
        _native.C().upsample_loss_workspace(where, call, backward), dtype=torch.uint8
    )


def forward(
    t: Tensors, loss: Loss, plain: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, kept values and totals; plain: by the CUDA kernel's functor, on the CPU."""
    losses, kept, totals = empty_results(t, loss)
    where = _native.where(t.logits)
    with _status.watch(t.logits, loss.name()) as status:
        call = _call(t, loss, status)
        if where[0] < 0:
            workspace = _workspace(call, where, False)
        else:
            partials = _native.C().LOSS_PARTIALS
            workspace = torch.empty(partials, dtype=torch.float64, device=t.logits.device)
        _native.C().upsample_loss(
            where,
            call,
            kept.data_ptr(),
            losses.data_ptr() if loss.reduction == "none" else 0,
            totals.data_ptr(),
            workspace.data_ptr(),
            plain,
        )
    return losses, kept, totals


def backward(
    grad: torch.Tensor,
    t: Tensors,
    kept: torch.Tensor,
    totals: torch.Tensor,
    loss: Loss,
    plain: bool = False,
) -> torch.Tensor:
    """The gradient of the logits, in their dtype and layout."""
    out = empty_gradient(t.logits)
    if out.numel() == 0:
        return out
    grad = grad.contiguous()
    where = _native.where(t.logits)
    # Labels out of range were reported by the forward pass; here they are skipped again.
    call = _call(t, loss, None)
    workspace = None
    if plain:
        workspace = torch.full((48 * 1024 // 8,), float("nan"), dtype=torch.float64)
    elif where[0] < 0:
        workspace = _workspace(call, where, True)
    _native.C().upsample_loss_backward(
        where,
        call,
        grad.data_ptr(),
        kept.data_ptr(),
        totals.data_ptr(),
        out.data_ptr(),
        out.stride(),
        0 if workspace is None else workspace.data_ptr(),
        plain,
    )
    return out
