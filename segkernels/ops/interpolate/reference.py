"""interpolate in plain torch: weighted sums of a few inputs, along one axis after the other.

torch's kernels compute source coordinates in the dtype in which they accumulate, so float32 and
float64 results differ by up to 1e-3 on large maps. The reference therefore has separate dtypes for
coordinates and sums.
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
    """As `segkernels.interpolate`; any device, sums in the dtype of `input` or at least float32.

    Args:
        input: [N, C, H, W].
        size: as in `segkernels.interpolate`.
        scale_factor: as in `segkernels.interpolate`.
        mode: as in `segkernels.interpolate`.
        align_corners: as in `segkernels.interpolate`.
        recompute_scale_factor: as in `segkernels.interpolate`.
        coordinates: dtype of source coordinates; default float64 for float64 input, else float32.
    """
    out_size, factors = sizes_and_factors(input, size, scale_factor, recompute_scale_factor)
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    x = input.to(compute)
    on_cpu, same_size = input.device.type == "cpu", tuple(input.shape[2:]) == out_size
    # The width first, as in torch's kernels.
    for axis in (1, 0):
        n_in, n_out = input.size(2 + axis), out_size[axis]
        index, weight = taps(
            n_in, n_out, mode, bool(align_corners), factors[axis], coordinates or compute
        )
        # On the CPU torch copies an axis whose size is unchanged, in bilinear mode only. On CUDA it
        # copies in every mode, if the sizes of both axes are unchanged.
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
    """Return (H_out, W_out) and the scale factors of the coordinates (0: ratio of the sizes)."""
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
    """Return the input indices of each output, int64 [n_out, K], and weights, float64 [n_out, K].

    K is 1 for the nearest modes, 2 for bilinear and 4 for bicubic.

    Args:
        n_in: size of the input.
        n_out: size of the output.
        mode: as in `segkernels.interpolate`.
        align_corners: as in `segkernels.interpolate`.
        factor: scale factor of the coordinates; 0 for n_out / n_in.
        dtype: dtype to which coordinates and weights are rounded, as in torch's kernels.
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
        weights = {0: torch.ones_like(i)}
    elif mode == "nearest-exact":
        index = rounded(rounded(scale * (i + 0.5) - 0.5).clamp(min=0) + 0.5).floor().long()
        weights = {0: torch.ones_like(i)}
    else:
        # torch's compilers fuse this multiplication and subtraction, so it rounds once.
        source = rounded(scale * i if align_corners else scale * (i + 0.5) - 0.5)
        if mode == "bilinear":
            source = source.clamp(min=0)
        index = source.to(torch.float32).floor().long().clamp(max=n_in - 1)
        t = rounded(source - index).clamp(0, 1)
        if mode == "bilinear":
            weights = {0: rounded(1 - t), 1: t}
        else:
            far, near = _cubic_far, _cubic_near
            weights = {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
    index = torch.stack([index + offset for offset in weights], 1).clamp(0, n_in - 1)
    return index, torch.stack(list(weights.values()), 1)


# Cubic convolution with a = -0.75 (Keys 1981, eq. 4), for |x| <= 1 and 1 < |x| < 2.
def _cubic_near(x: torch.Tensor) -> torch.Tensor:
    return (1.25 * x - 2.25) * x * x + 1


def _cubic_far(x: torch.Tensor) -> torch.Tensor:
    return ((-0.75 * x + 3.75) * x - 6) * x + 3
