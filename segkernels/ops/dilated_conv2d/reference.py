"""dilated_conv2d in plain torch, as the reference for tests: one shifted image per tap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Sizes = int | Sequence[int]


def dilated_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Same as `segkernels.dilated_conv2d`, in any dtype, on any device; `backend` is ignored."""
    out_channels, per_group, kh, kw = weight.shape
    step, gap = two(stride), two(dilation)
    extent = (gap[0] * (kh - 1), gap[1] * (kw - 1))
    if padding == "same":
        before = (extent[0] // 2, extent[1] // 2)
        after = (extent[0] - before[0], extent[1] - before[1])
    else:
        before = after = (0, 0) if isinstance(padding, str) else two(padding)
    image = F.pad(input, (before[1], after[1], before[0], after[0]))
    rows = (image.shape[-2] - extent[0] - 1) // step[0] + 1
    columns = (image.shape[-1] - extent[1] - 1) // step[1] + 1
    by_group = weight.reshape(groups, out_channels // groups, per_group, kh, kw)
    out = input.new_zeros(())
    for i in range(kh):
        for j in range(kw):
            shifted = image[..., i * gap[0] :, j * gap[1] :][..., :: step[0], :: step[1]]
            shifted = shifted[..., :rows, :columns].unflatten(-3, (groups, per_group))
            tap = torch.einsum("...gcyx,goc->...goyx", shifted, by_group[..., i, j])
            out = out + tap.flatten(-4, -3)
    for vector, apply in ((bias, torch.add), (scale, torch.mul), (shift, torch.add)):
        if vector is not None:
            out = apply(out, vector[:, None, None])
    if residual is not None:
        out = out + residual
    return F.relu(out) if activation == "relu" else out


def two(sizes: Sizes) -> tuple[int, int]:
    """Return (rows, columns) for one number or a pair."""
    return (sizes, sizes) if isinstance(sizes, int) else (sizes[0], sizes[1])
