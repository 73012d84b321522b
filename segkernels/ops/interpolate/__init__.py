"""interpolate: a drop-in for torch's with a deterministic backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segkernels.ops import _arguments, _operator, _registry
from segkernels.ops.interpolate import _resampling, operator
from segkernels.ops.interpolate._resampling import Resampling

_registry.register(
    _registry.Op(
        name="interpolate",
        functions=("interpolate",),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        layouts=("contiguous", "channels_last"),
        differentiable=("input",),
        library_ops=("segkernels::interpolate",),
        note="twice differentiable; antialias=True, 3-D and 5-D inputs, integer dtypes and the "
        "other modes are computed by torch",
    )
)


def interpolate(
    input: torch.Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """Resize `input`, with the arguments and results of `torch.nn.functional.interpolate`.

    Source coordinates and nearest indices are computed with torch's own arithmetic for the device
    (in float32 for float32 and half precision, with a fused multiply-add), so float32 results
    differ from torch's only by the rounding of the final sums. Half precision (float16 and
    bfloat16) is computed and accumulated in float32 and rounded once: results equal
    ``F.interpolate(input.float(), ...)`` rounded.

    The backward pass gathers in a fixed order and accumulates in float32 (float64 for float64
    input), so it is deterministic, also under `torch.use_deterministic_algorithms`, where torch's
    bicubic backward pass raises on CUDA. It can be differentiated again.

    Unpooling methods that resample are this function with an integer `scale_factor`:
    nearest-neighbour unpooling (mode "nearest"), bilinear and bicubic upsampling.

    Args:
        input: [N, C, H, W], float16, bfloat16, float32 or float64. Contiguous and channels_last
            tensors are read without a copy and the layout is preserved; tensors with other strides
            are copied first.
        size: (H_out, W_out), or one int for both.
        scale_factor: multiplier of (H, W), or one for both. Give either this or `size`.
        mode: "nearest" (floor(i * H / H_out), as in torch and OpenCV), "nearest-exact" (nearest
            pixel centre), "bilinear" or "bicubic" (Keys 1981, a = -0.75).
        align_corners: for "bilinear" and "bicubic": align the centres of the corner pixels of input
            and output (True), or their outer corners (False, the default).
        recompute_scale_factor: compute coordinates from the sizes (True), or from `scale_factor`
            itself (None, False).
        antialias: as in torch, which computes it.

    Returns:
        [N, C, H_out, W_out] in the dtype and layout of `input`.

    Raises:
        ValueError, NotImplementedError, RuntimeError, TypeError: as
            `torch.nn.functional.interpolate`, with its messages.

    torch computes other modes ("area"), dtypes and numbers of dimensions, and every call under
    torch.jit.trace and in torch.onnx.export.
    """
    arguments = size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
    r = _resampling_for(input, *arguments)
    if r is None:
        return F.interpolate(input, *arguments)
    out: torch.Tensor = operator.interpolate(input, r)
    return out


def _resampling_for(
    input: torch.Tensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
    antialias: bool,
) -> Resampling | None:
    """Return the resampling, or None if torch computes the call or raises for it."""
    if (
        not isinstance(input, torch.Tensor)
        or input.dim() != 4
        or not _arguments.is_supported(input)
        or mode not in _resampling.MODES
        or antialias
        or _operator.must_call_torch()
        or (size is None) == (scale_factor is None)
        or (size is not None and recompute_scale_factor)
        or (align_corners is not None and mode.startswith("nearest"))
    ):
        return None
    height, width = input.size(2), input.size(3)
    factors = (0.0, 0.0)
    if size is not None:
        pair = _arguments.pair_or_none(size, lengths=(2,))
        if pair is None:
            return None
        out_size = (pair[0], pair[1])
    else:
        scales = _arguments.pair_or_none(scale_factor, _is_number, lengths=(2,))
        if scales is None:
            return None
        out_size = _scaled(height, scales[0]), _scaled(width, scales[1])
        if not recompute_scale_factor:
            factors = (float(scales[0]), float(scales[1]))
    if out_size[0] <= 0 or out_size[1] <= 0 or height == 0 or width == 0 or input.size(1) == 0:
        return None
    rule = _resampling.rule_for(input, mode)
    return Resampling(
        (height, width), out_size, factors, mode, bool(align_corners), rule, transpose=False
    )


def _scaled(size: int, factor: float) -> int:
    """Return the product as torch computes it: in float64, rounded down."""
    if float(factor).is_integer():
        return size * int(factor)
    return math.floor(torch.sym_float(size) * factor)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
