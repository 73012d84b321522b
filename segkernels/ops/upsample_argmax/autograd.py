"""upsample_argmax for torch's dispatcher. It has no gradient."""

from __future__ import annotations

import torch

from segkernels.ops import _op
from segkernels.ops.interpolate._resampling import Resampling
from segkernels.ops.upsample_argmax import _kernel

_op.library.define(
    "upsample_argmax(Tensor logits, SymInt[] size, str mode, bool align_corners, int rule, "
    "bool confidence, ScalarType dtype) -> (Tensor, Tensor)"
)


def apply(
    logits: torch.Tensor, r: Resampling, confidence: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and confidences, on the way that this call needs."""
    logits = logits.detach()
    if _op.through_dispatcher(logits):
        labels, confidences = torch.ops.segkernels.upsample_argmax(
            logits, r.out_size, r.mode, r.align_corners, r.rule, confidence, dtype
        )
        return labels, confidences
    return _kernel.run(logits, r, confidence, dtype)


def _impl(
    logits: torch.Tensor,
    size: list[int],
    mode: str,
    align_corners: bool,
    rule: int,
    confidence: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    in_size = (logits.size(2), logits.size(3))
    r = Resampling(in_size, (size[0], size[1]), (0.0, 0.0), mode, align_corners, rule, False)
    return _kernel.run(logits, r, confidence, dtype)


def _fake(
    logits: torch.Tensor,
    size: list[int],
    mode: str,
    align_corners: bool,
    rule: int,
    confidence: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _kernel.empty_results(logits, (size[0], size[1]), confidence, dtype)


for _key in ("CPU", "CUDA"):
    _op.library.impl("upsample_argmax", _impl, _key)
torch.library.register_fake("segkernels::upsample_argmax", _fake, lib=_op.library)
