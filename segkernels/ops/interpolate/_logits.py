"""Argument checks shared by the operators on upsampled logits.

`name` is the name of the public function, for the error message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels.ops import _arguments
from segkernels.ops._dtypes import compute_dtype
from segkernels.ops.interpolate import _resampling, interpolate
from segkernels.ops.interpolate._resampling import Resampling


def check_logits(name: str, logits: torch.Tensor) -> None:
    """Raise unless `logits` is a floating [N, C, H, W] with at least one class, row and column."""
    _arguments.check_device(logits)
    if logits.dim() != 4:
        raise ValueError(f"{name}: logits must be [N, C, H, W], got shape {tuple(logits.shape)}")
    _arguments.check_floating(logits, "logits", name)
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
    """Check the arguments and return the resampling of F.interpolate(logits, size, ...)."""
    _check_mode(name, mode, align_corners)
    pair = _arguments.pair_or_none(size, lengths=(2,))
    if pair is None:
        raise ValueError(f"{name}: size must be an int or (height, width), got {size!r}")
    if pair[0] < 1 or pair[1] < 1:
        raise ValueError(f"{name}: size must be positive, got {size!r}")
    return Resampling(
        (logits.size(2), logits.size(3)),
        (pair[0], pair[1]),
        (0.0, 0.0),
        mode,
        bool(align_corners),
        _resampling.rule_for(logits, mode),
        transpose=False,
    )


def upsample(
    name: str, logits: torch.Tensor, size: int | Sequence[int], mode: str, align_corners: bool
) -> torch.Tensor:
    """Return the upsampled logits in the dtype of the computation, where they must be stored."""
    _check_mode(name, mode, align_corners)
    corners = None if mode.startswith("nearest") else align_corners
    wide = logits.to(compute_dtype(logits.dtype))
    return interpolate(wide, size, mode=mode, align_corners=corners)


def _check_mode(name: str, mode: str, align_corners: bool | None) -> None:
    _arguments.check_choice(mode, "mode", _resampling.MODES, name)
    if align_corners and mode.startswith("nearest"):
        raise ValueError(f"{name}: align_corners must be False for mode {mode!r}, got True")
