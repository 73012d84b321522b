"""One 2-D resampling, described and run: what interpolate and the fused tails share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels import _dtypes, _native
from segkernels.ops._op import is_channels_last

# enum class Mode in csrc/interpolate/axis.h
MODES = {"nearest": 0, "nearest-exact": 1, "bilinear": 2, "bicubic": 3}
# enum class Rule
_CPU, _CPU_SMALL, _CUDA = 0, 1, 2


class Resampling(NamedTuple):
    """From `in_size` to `out_size`, or the transpose of that: the gradient's way.

    Attributes:
        in_size: (height, width) of the low side's input, whichever way it runs.
        out_size: (height, width) of its output.
        factors: scale factors that source coordinates are computed with; 0 for out / in.
        mode: one of `MODES`.
        align_corners: as in `torch.nn.functional.interpolate`.
        rule: whose arithmetic computes the indices of the nearest modes.
        transpose: run from the output's size to the input's.
    """

    in_size: tuple[int, int]
    out_size: tuple[int, int]
    factors: tuple[float, float]
    mode: str
    align_corners: bool
    rule: int
    transpose: bool

    def transposed(self) -> Resampling:
        """The same resampling, the other way."""
        return self._replace(transpose=not self.transpose)

    def result_size(self) -> tuple[int, int]:
        """(height, width) of what it returns."""
        return self.in_size if self.transpose else self.out_size


def rule_for(input: torch.Tensor, out_size: tuple[int, int], mode: str) -> int:
    """Which of torch's arithmetics applies: its CPU kernels compute nearest indices in two ways."""
    if input.device.type == "cuda":
        return _CUDA
    if not mode.startswith("nearest"):
        return _CPU
    channels_last = input.size(1) > 3 and input.is_contiguous(memory_format=torch.channels_last)
    return _CPU_SMALL if channels_last or out_size[0] + out_size[1] <= 128 else _CPU


def native_args(
    r: Resampling, batch: int, channels: int, channels_last: bool
) -> tuple[int | float | bool, ...]:
    """`r` on a batch in the order of csrc/bindings.cpp: channels are planes, or innermost."""
    planes, inner = (batch, channels) if channels_last else (batch * channels, 1)
    return (
        planes,
        inner,
        *r.in_size,
        *r.out_size,
        *r.factors,
        MODES[r.mode],
        r.align_corners,
        r.rule,
    )


def empty_result(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An uninitialised tensor of `x`'s batch, channels, dtype and layout, and another size."""
    return _empty(x, size, is_channels_last(x))


def _empty(x: torch.Tensor, size: tuple[int, int], channels_last: bool) -> torch.Tensor:
    shape = (x.size(0), x.size(1), *size)
    if not channels_last:  # this costs less
        return x.new_empty(shape)
    layout = torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def run(x: torch.Tensor, r: Resampling) -> torch.Tensor:
    """Resample `x` with the native kernels; copies it first when it is a strided view."""
    channels_last = is_channels_last(x)
    out = _empty(x, r.result_size(), channels_last)
    if out.numel() == 0:
        return out
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x.contiguous()
    native = _native.C()
    where = _native.where(x)
    args = native_args(r, x.size(0), x.size(1), channels_last)
    dtype = _dtypes.FLOATING[x.dtype]
    native.interpolate(where, args, dtype, x.data_ptr(), out.data_ptr(), r.transpose)
    return out
