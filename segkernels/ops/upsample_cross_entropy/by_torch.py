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
    target, weight = target.long(), None if weight is None else weight.to(x.dtype)
    loss = F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction)
    if label_smoothing == 0.0:
        return loss
    # Not F.cross_entropy's own argument, which torch.onnx.export ignores.
    weight = x.new_ones(x.size(1)) if weight is None else weight
    counted = target != ignore_index
    uniform = -(x.log_softmax(1) * weight[:, None, None]).mean(1)
    uniform = torch.where(counted, uniform, 0)
    if reduction != "none":
        uniform = uniform.sum()
    if reduction == "mean":
        of_pixels = weight[torch.where(counted, target, 0)]
        uniform = uniform / torch.where(counted, of_pixels, 0).sum()
    return (1 - label_smoothing) * loss + label_smoothing * uniform


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
