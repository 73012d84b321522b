"""upsample_argmax: labels of upsampled logits, without storing the upsampled logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels.ops import _operator, _registry
from segkernels.ops.interpolate import _logits
from segkernels.ops.upsample_argmax import operator
from segkernels.ops.upsample_argmax.native import LABELS, Argmax

_registry.register(
    _registry.Op(
        name="upsample_argmax",
        functions=("upsample_argmax",),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        layouts=("contiguous", "channels_last", "strided"),
        library_ops=("segkernels::upsample_argmax",),
        note="half precision is compared in float32",
    )
)


def upsample_argmax(
    logits: torch.Tensor,
    size: int | Sequence[int],
    mode: str = "bilinear",
    align_corners: bool = False,
    return_confidence: bool = False,
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Predict the label of each pixel: argmax over the classes of upsampled logits.

    Equals ``F.interpolate(logits, size, mode=mode, align_corners=align_corners).argmax(1)`` without
    storing the upsampled logits. Half precision (float16 and bfloat16) is interpolated and compared
    in float32, without the rounding that would make classes equal.

    Args:
        logits: [N, C, H, W], float16, bfloat16, float32 or float64; any strides.
        size: (H_out, W_out), or one int for both.
        mode: "nearest", "nearest-exact", "bilinear" or "bicubic", as in `interpolate`.
        align_corners: as in `interpolate`.
        return_confidence: also return the softmax probability of the label.
        dtype: dtype of the labels: torch.uint8, int16, int32 or int64.

    Returns:
        labels: [N, H_out, W_out] in `dtype`, from 0 to C - 1. Of equal logits the first wins, and
            NaN is larger than every number, as in `torch.argmax`.
        confidence: only with `return_confidence`: [N, H_out, W_out], float32 (float64 for float64
            logits), from 1 / C to 1; NaN where the largest logit is NaN or infinite. Not
            differentiable.

    Raises:
        ValueError: a shape, size or mode is invalid, or `dtype` cannot represent every class.
        TypeError: the dtype of `logits` or of the labels is not one of the above.
    """
    name = "upsample_argmax"
    _logits.check_logits(name, logits)
    if dtype not in LABELS:
        raise TypeError(f"{name}: dtype must be torch.uint8, int16, int32 or int64, got {dtype}")
    if logits.size(1) - 1 > torch.iinfo(dtype).max:
        raise ValueError(
            f"{name}: dtype must represent labels up to {logits.size(1) - 1}, got {dtype} with a "
            f"maximum of {torch.iinfo(dtype).max}"
        )
    if _operator.must_call_torch():
        upsampled = _logits.upsample(name, logits.detach(), size, mode, align_corners)
        labels = upsampled.argmax(1).to(dtype)
        return (labels, upsampled.softmax(1).amax(1)) if return_confidence else labels
    r = _logits.resampling(name, logits, size, mode, align_corners)
    labels, confidence = operator.argmax(logits.detach(), Argmax(r, return_confidence, dtype))
    return (labels, confidence) if return_confidence else labels
