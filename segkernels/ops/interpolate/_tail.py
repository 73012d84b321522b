"""What the ops on upsampled logits share: their checks, and the arguments of native calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels import _dtypes
from segkernels.ops.interpolate import _resampling
from segkernels.ops.interpolate._resampling import Resampling


def check_logits(name: str, logits: torch.Tensor) -> None:
    """Raise unless `logits` is a floating [N, C, H, W] with at least one class and pixel."""
    if logits.dim() != 4:
        raise ValueError(f"{name}: logits must be [N, C, H, W], got shape {tuple(logits.shape)}")
    if logits.dtype not in _dtypes.FLOATING:
        raise TypeError(
            f"{name}: logits must be one of {', '.join(_dtypes.names())}, got {logits.dtype}"
        )
    if 0 in logits.shape[1:]:
        raise ValueError(
            f"{name}: logits must have at least one class, row and column, got shape "
            f"{tuple(logits.shape)}"
        )


def resampling(
    name: str,
    logits: torch.Tensor,
    size: int | Sequence[int],
    mode: str,
    align_corners: bool | None,
) -> Resampling:
    """The resampling of `logits` to `size`, as F.interpolate's with the same arguments."""
    if mode not in _resampling.MODES:
        raise ValueError(
            f"{name}: mode must be one of {', '.join(_resampling.MODES)}, got {mode!r}"
        )
    if align_corners and mode.startswith("nearest"):
        raise ValueError(f"{name}: align_corners must be False for mode {mode!r}, got True")
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) for n in pair):
        raise ValueError(f"{name}: size must be an int or (height, width), got {size!r}")
    if pair[0] < 1 or pair[1] < 1:
        raise ValueError(f"{name}: size must be positive, got {size!r}")
    return Resampling(
        (logits.size(2), logits.size(3)),
        (pair[0], pair[1]),
        (0.0, 0.0),
        mode,
        bool(align_corners),
        _resampling.rule_for(logits, (pair[0], pair[1]), mode),
        transpose=False,
    )


def native_args(r: Resampling, logits: torch.Tensor) -> tuple[object, ...]:
    """The arguments that a native call's description begins with."""
    return (
        _resampling.native_args(r, logits.size(0), 1, channels_last=False),
        logits.size(1),
        logits.stride(),
        _dtypes.FLOATING[logits.dtype],
    )
