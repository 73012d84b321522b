"""The losses in plain torch: upsample the logits, then apply torch's losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from segkernels.ops.interpolate import reference


def upsample_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    mode: str = "bilinear",
    align_corners: bool = False,
    *,
    coordinates: torch.dtype | None = None,
) -> torch.Tensor:
    """As `segkernels.upsample_cross_entropy`; `coordinates` as in the reference of interpolate."""
    upsampled = _upsampled(logits, target, mode, align_corners, coordinates)
    if weight is not None:
        weight = weight.to(upsampled.dtype)
    return F.cross_entropy(
        upsampled,
        target.long(),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def upsample_binary_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    mode: str = "bilinear",
    align_corners: bool = False,
    *,
    coordinates: torch.dtype | None = None,
) -> torch.Tensor:
    """As `segkernels.upsample_binary_cross_entropy`; `coordinates` as above."""
    upsampled = _upsampled(logits, target, mode, align_corners, coordinates)
    valid = torch.ones_like(target, dtype=torch.bool)
    if not target.is_floating_point():
        valid = target.long() != ignore_index
    losses = F.binary_cross_entropy_with_logits(
        upsampled,
        torch.where(valid, target, 0).to(upsampled.dtype),
        None if weight is None else weight.to(upsampled.dtype),
        pos_weight=None if pos_weight is None else pos_weight.to(upsampled.dtype),
        reduction="none",
    )
    losses = torch.where(valid, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / valid.sum() if reduction == "mean" else losses.sum()


def _upsampled(
    logits: torch.Tensor,
    target: torch.Tensor,
    mode: str,
    align_corners: bool,
    coordinates: torch.dtype | None,
) -> torch.Tensor:
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return reference.interpolate(
        logits.to(compute),
        tuple(target.shape[-2:]),
        None,
        mode,
        align_corners,
        coordinates=coordinates,
    )
