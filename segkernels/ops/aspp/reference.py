"""aspp in plain torch, as the reference for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels.ops.dilated_conv2d.reference import dilated_conv2d


def aspp(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    rates: Sequence[int],
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None,
    activation: str | None = None,
    form: str = "v3",
    backend: str = "auto",
) -> torch.Tensor:
    """Same as `segkernels.aspp`, in any dtype, on any device; `backend` is ignored."""
    branches = [
        dilated_conv2d(input, weight, padding="same", dilation=rate)
        for weight, rate in zip(weights, rates, strict=True)
    ]
    out = sum(branches[1:], branches[0]) if form == "v2" else torch.cat(branches, dim=1)
    if scale is not None:
        out = out * scale[:, None, None]
    if shift is not None:
        out = out + shift[:, None, None]
    if pooled is not None:
        out = torch.cat([out, pooled.expand(-1, -1, *out.shape[2:])], dim=1)
    return torch.relu(out) if activation == "relu" else out
