"""The native call of upsample_argmax."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels import _native
from segkernels.ops import _dtypes
from segkernels.ops.interpolate._resampling import Resampling
from segkernels.ops.interpolate.native import native_resampling

# enum class LabelType in csrc/upsample_argmax/upsample_argmax.h
LABELS = {torch.uint8: 0, torch.int16: 1, torch.int32: 2, torch.int64: 3}


class Argmax(NamedTuple):
    """The resampling, whether to compute confidences, and the dtype of the labels."""

    resampling: Resampling
    confidence: bool
    dtype: torch.dtype


# (labels, confidences); None if confidences are not computed.
Outputs = tuple[torch.Tensor, torch.Tensor | None]


def outputs(logits: torch.Tensor, a: Argmax) -> Outputs:
    """Return uninitialised labels, and confidences if requested."""
    shape = (logits.size(0), *a.resampling.out_size)
    labels = torch.empty(shape, dtype=a.dtype, device=logits.device)
    if not a.confidence:
        return labels, None
    compute = _dtypes.compute_dtype(logits.dtype)
    return labels, torch.empty(shape, dtype=compute, device=logits.device)


def argmax(logits: torch.Tensor, a: Argmax) -> Outputs:
    """Compute the labels, and confidences if requested."""
    labels, confidences = outputs(logits, a)
    if labels.numel() == 0:
        return labels, confidences
    native = _native.C()
    where = _native.where(logits)
    call = native.ArgmaxCall(
        native_resampling(a.resampling, logits.size(0), 1),
        logits.size(1),
        logits.stride(),
        _dtypes.FLOATING[logits.dtype],
        LABELS[a.dtype],
        logits,
        labels,
        confidences,
    )
    workspace = None
    if where[0] < 0:
        needed = native.upsample_argmax_workspace(where, call)
        workspace = torch.empty(needed, dtype=torch.uint8, device="cpu")
    native.upsample_argmax(where, call, workspace)
    return labels, confidences
