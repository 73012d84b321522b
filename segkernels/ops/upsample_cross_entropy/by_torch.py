"""The losses by torch's functions, for torch.jit.trace and torch.onnx.export."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from segkernels.ops.interpolate import _logits


def cross_entropy(
    name: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    mode: str,
    align_corners: bool,
) -> torch.Tensor:
    """See `upsample_cross_entropy`."""
    x = _logits.upsample(name, logits, target.shape[-2:], mode, align_corners)
    weight = None if weight is None else weight.to(x.dtype)
    return F.cross_entropy(
        x, target.long(), weight, None, ignore_index, None, reduction, label_smoothing
    )


def binary_cross_entropy(
    name: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    pos_weight: torch.Tensor | None,
    ignore_index: int,
    mode: str,
    align_corners: bool,
) -> torch.Tensor:
    """See `upsample_binary_cross_entropy`."""
    x = _logits.upsample(name, logits, target.shape[-2:], mode, align_corners)
    counted = torch.ones_like(target, dtype=torch.bool)
    if not target.is_floating_point():
        counted = target != ignore_index
    weight, pos_weight = (None if w is None else w.to(x.dtype) for w in (weight, pos_weight))
    target = torch.where(counted, target, 0).to(x.dtype)
    loss = F.binary_cross_entropy_with_logits(
        x, target, weight, reduction="none", pos_weight=pos_weight
    )
    loss = torch.where(counted, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() / counted.sum() if reduction == "mean" else loss.sum()
