"""upsample_argmax in plain torch: upsample the logits, then take argmax and softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels.ops.interpolate import reference


def upsample_argmax(
    logits: torch.Tensor,
    size: int | Sequence[int],
    mode: str = "bilinear",
    align_corners: bool = False,
    return_confidence: bool = False,
    dtype: torch.dtype = torch.int64,
    *,
    coordinates: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `segkernels.upsample_argmax`; `coordinates` as in the reference of interpolate."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    upsampled = reference.interpolate(
        logits.to(compute), size, None, mode, align_corners, coordinates=coordinates
    )
    labels = upsampled.argmax(1).to(dtype)
    if not return_confidence:
        return labels
    return labels, upsampled.softmax(1).amax(1)
