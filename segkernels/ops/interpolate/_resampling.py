"""Description of a 2-D resampling, shared by interpolate and the operators on upsampled logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels.ops._operator import is_contiguous

# enum class Mode in csrc/interpolate/axis.h
MODES = {"nearest": 0, "nearest-exact": 1, "bilinear": 2, "bicubic": 3}
# enum class Rule, in the same file
_CPU, _CPU_SMALL, _CUDA = 0, 1, 2
# _CPU_SMALL for a small output, else _CPU.
_CPU_BY_SIZE = 3


class Resampling(NamedTuple):
    """Resampling from `in_size` to `out_size`, or its transpose, which computes the gradient.

    Attributes:
        in_size: (height, width) of the forward pass's input, also if `transpose` is set.
        out_size: (height, width) of the forward pass's output, also if `transpose` is set.
        factors: scale factors (height, width) from which source coordinates are computed; 0 for
            out_size / in_size.
        mode: one of `MODES`.
        align_corners: as in `torch.nn.functional.interpolate`.
        rule: which of torch's formulas computes the indices of the nearest modes; see `rule_for`.
        transpose: map a tensor of `out_size` to one of `in_size`.
    """

    in_size: tuple[int, int]
    out_size: tuple[int, int]
    factors: tuple[float, float]
    mode: str
    align_corners: bool
    rule: int
    transpose: bool

    def transposed(self) -> Resampling:
        """Return the transpose of this resampling."""
        return self._replace(transpose=not self.transpose)

    def result_size(self) -> tuple[int, int]:
        """Return (height, width) of the result."""
        return self.in_size if self.transpose else self.out_size


def rule_for(input: torch.Tensor, mode: str) -> int:
    """Return the formula that torch uses for coordinates on the device of `input`.

    torch's CPU kernels have two for nearest indices: a general one, and one for small outputs and
    channels_last tensors. `native_rule` compares the sizes, so that a program of torch.export
    runs for both.
    """
    if input.is_cuda:
        return _CUDA
    if not mode.startswith("nearest"):
        return _CPU
    channels_last = input.size(1) > 3 and is_contiguous(input, torch.channels_last)
    return _CPU_SMALL if channels_last else _CPU_BY_SIZE


def native_rule(r: Resampling) -> int:
    """Return the rule of `r` as the native code numbers it."""
    if r.rule != _CPU_BY_SIZE:
        return r.rule
    return _CPU_SMALL if r.out_size[0] + r.out_size[1] <= 128 else _CPU
