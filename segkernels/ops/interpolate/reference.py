"""interpolate in plain torch: outputs are weighted sums of a few inputs, axis after axis.

torch's kernels compute source coordinates in the dtype that they accumulate in, so float32 results
differ from float64 ones by up to 1e-3 on large maps. The reference therefore takes the dtype of the
coordinates apart from the dtype of the sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def interpolate(
    input: torch.Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    *,
    coordinates: torch.dtype | None = None,
) -> torch.Tensor:
    """As `segkernels.interpolate`; sums in `input`'s dtype (float32 at least), any device.

    Args:
        input: [N, C, H, W].
        size: as there, and so the next four.
        scale_factor: as there.
        mode: as there.
        align_corners: as there.
        recompute_scale_factor: as there.
        coordinates: the dtype of source coordinates; default float64 for float64, else float32.
    """
    out_size, factors = sizes_and_factors(input, size, scale_factor, recompute_scale_factor)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    x = input.to(compute)
    on_cpu, same_size = input.device.type == "cpu", tuple(input.shape[2:]) == out_size
    # The width first, as torch's kernels do.
    for axis in (1, 0):
        n_in, n_out = input.size(2 + axis), out_size[axis]
        index, weight = taps(
            n_in, n_out, mode, bool(align_corners), factors[axis], coordinates or compute
        )
        # torch copies an axis that keeps its size in bilinear mode; on CUDA in every mode, where
        # both axes do.
        if n_in == n_out and mode == "bilinear" if on_cpu else same_size:
            index, weight = torch.arange(n_in).unsqueeze(1), torch.ones(n_in, 1)
        x = _along(x, 2 + axis, index.to(x.device), weight.to(x))
    return x.to(input.dtype)


def _along(x: torch.Tensor, dim: int, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    terms = [
        x.index_select(dim, index[:, k]) * weight[:, k].reshape(shape) for k in range(index.size(1))
    ]
    return torch.stack(terms).sum(0)


def sizes_and_factors(
    input: torch.Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    recompute_scale_factor: bool | None,
) -> tuple[tuple[int, int], tuple[float, float]]:
    """(H_out, W_out), and the factors that coordinates are computed with (0: from the sizes)."""
    if size is not None:
        pair = (size, size) if isinstance(size, int) else (size[0], size[1])
        return pair, (0.0, 0.0)
    assert scale_factor is not None
    scale = (
        (scale_factor[0], scale_factor[1])
        if isinstance(scale_factor, Sequence)
        else (scale_factor, scale_factor)
    )
    out = (math.floor(input.size(2) * scale[0]), math.floor(input.size(3) * scale[1]))
    return out, (0.0, 0.0) if recompute_scale_factor else scale


def taps(
    n_in: int, n_out: int, mode: str, align_corners: bool, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which inputs each output reads, int64 [n_out, K], and their weights, float64 [n_out, K].

    K is 1 for the nearest modes, 2 for bilinear, 4 for bicubic.

    Args:
        n_in: the input's size.
        n_out: the output's.
        mode: as in `segkernels.interpolate`.
        align_corners: likewise.
        factor: the scale factor of the coordinates; 0 for n_out / n_in.
        dtype: what coordinates and weights are rounded to, as torch's kernels do.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).to(torch.float64)

    i = torch.arange(n_out, dtype=torch.float64)
    if align_corners:
        step = (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
    else:
        step = 1 / factor if factor else n_in / n_out
    scale = rounded(torch.tensor(step, dtype=torch.float64))
    if mode == "nearest":
        index = rounded(i * scale).floor().long()
        found = {0: torch.ones_like(i)}
    elif mode == "nearest-exact":
        index = rounded(rounded(scale * (i + 0.5) - 0.5).clamp(min=0) + 0.5).floor().long()
        found = {0: torch.ones_like(i)}
    else:
        # Torch's compilers fuse this product and difference: one rounding.
        source = rounded(scale * i if align_corners else scale * (i + 0.5) - 0.5)
        if mode == "bilinear":
            source = source.clamp(min=0)
        index = source.to(torch.float32).floor().long().clamp(max=n_in - 1)
        t = rounded(source - index).clamp(0, 1)
        if mode == "bilinear":
            found = {0: rounded(1 - t), 1: t}
        else:
            far, near = _cubic_far, _cubic_near
            found = {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
    index = torch.stack([index + offset for offset in found], 1).clamp(0, n_in - 1)
    return index, torch.stack(list(found.values()), 1)


# Cubic convolution with a = -0.75 (Keys 1981, eq. 4), for |x| <= 1 and 1 < |x| < 2.
def _cubic_near(x: torch.Tensor) -> torch.Tensor:
    return (1.25 * x - 2.25) * x * x + 1


def _cubic_far(x: torch.Tensor) -> torch.Tensor:
    return ((-0.75 * x + 3.75) * x - 6) * x + 3
