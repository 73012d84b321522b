"""The native call of upsample_argmax."""

from __future__ import annotations

import torch

from segkernels import _dtypes, _native
from segkernels.ops.interpolate import _tail
from segkernels.ops.interpolate._resampling import Resampling

# enum class LabelType in csrc/upsample_argmax/upsample_argmax.h, and the most classes each holds
LABELS = {torch.uint8: 0, torch.int16: 1, torch.int32: 2, torch.int64: 3}


def empty_results(
    logits: torch.Tensor, size: tuple[int, int], confidence: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised labels and confidences; the latter empty when they are not asked for."""
    shape = (logits.size(0), *size)
    labels = torch.empty(shape, dtype=dtype, device=logits.device)
    compute = _dtypes.compute_dtype(logits.dtype)
    return labels, torch.empty(shape if confidence else (0,), dtype=compute, device=logits.device)


def run(
    logits: torch.Tensor, r: Resampling, confidence: bool, dtype: torch.dtype, plain: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and confidences; plain: by the CUDA kernel's functor, on the CPU."""
    labels, confidences = empty_results(logits, r.out_size, confidence, dtype)
    if labels.numel() == 0:
        return labels, confidences
    native = _native.C()
    where = _native.where(logits)
    call = native.ArgmaxCall(
        *_tail.native_args(r, logits),
        LABELS[dtype],
        logits.data_ptr(),
        labels.data_ptr(),
        confidences.data_ptr() if confidence else 0,
    )
    workspace = None
    if where[0] < 0:
        needed = native.upsample_argmax_workspace(where, call)
        workspace = torch.empty(needed, dtype=torch.uint8)
    native.upsample_argmax(where, call, workspace.data_ptr() if workspace is not None else 0, plain)
    return labels, confidences
