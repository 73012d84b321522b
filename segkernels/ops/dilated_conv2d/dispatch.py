"""Which backend `backend="auto"` takes on CUDA."""

from __future__ import annotations

import torch

from segkernels.ops.dilated_conv2d import sm90
from segkernels.ops.dilated_conv2d.geometry import Problem

_NARROWEST = 128  # channels
_LEAST_DILATION = 10  # cuDNN multiplies the padding, and slows beyond such a dilation


def choose(kind: str, *problems: Problem) -> str:
    """Take "sm90" or "torch" for a "forward", an "input_gradient" or a "weight_gradient".

    Several problems are the branches of one launch, which must all suit the kernel.
    """
    supported = sm90.weight_gradient_supported if kind == "weight_gradient" else sm90.supported
    for problem in problems:
        # Shapes first: every call pays for this.
        if not _gains(problem) or supported(problem):
            return "torch"
    return "sm90" if problems else "torch"


def _gains(problem: Problem) -> bool:
    channels, out_channels = problem.channels, problem.out_channels
    return (
        (problem.dtype is torch.bfloat16 or problem.dtype is torch.float16)
        and channels >= _NARROWEST
        and out_channels >= _NARROWEST
        and channels % 8 == 0
        and out_channels % 8 == 0
        and _farthest(problem) >= _LEAST_DILATION
    )


def _farthest(problem: Problem) -> int:
    """The dilation of an axis with more than one tap."""
    rows, columns = problem.geometry.kernel
    down, along = problem.geometry.dilation
    return max(down if rows > 1 else 1, along if columns > 1 else 1)
