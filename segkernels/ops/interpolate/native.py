"""The native call of interpolate, and the native description of a resampling."""

from __future__ import annotations

import functools
from typing import Any

import torch

from segkernels import _native
from segkernels.ops import _dtypes
from segkernels.ops._operator import is_channels_last
from segkernels.ops.interpolate._resampling import MODES, Resampling, native_rule


@functools.lru_cache(maxsize=1024)
def native_resampling(r: Resampling, planes: int, inner: int) -> Any:
    """Return the native description of `r` on `planes` planes of `inner` innermost channels."""
    rule = native_rule(r)
    return _native.C().Resampling(
        planes, inner, r.in_size, r.out_size, r.factors, MODES[r.mode], r.align_corners, rule
    )


def empty_result(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return an uninitialised [N, C, *size] tensor in the dtype and layout of the 4-D `x`."""
    return _empty(x, size, is_channels_last(x))


def _empty(x: torch.Tensor, size: tuple[int, int], channels_last: bool) -> torch.Tensor:
    shape = (x.size(0), x.size(1), *size)
    if not channels_last:  # new_empty is faster than torch.empty
        return x.new_empty(shape)
    layout = torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def resample(x: torch.Tensor, r: Resampling) -> torch.Tensor:
    """Resample the 4-D `x`; a strided view is copied first."""
    channels_last = is_channels_last(x)
    out = _empty(x, r.result_size(), channels_last)
    if out.numel() == 0:
        return out
    where = _native.where(x)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x.contiguous()
    planes, inner = (x.size(0), x.size(1)) if channels_last else (x.size(0) * x.size(1), 1)
    resampling, dtype = native_resampling(r, planes, inner), _dtypes.FLOATING[x.dtype]
    _native.C().interpolate(where, resampling, dtype, x, out, r.transpose)
    return out
