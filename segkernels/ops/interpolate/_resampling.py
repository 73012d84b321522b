"""One 2-D resampling: what interpolate and the operators on upsampled logits share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels.ops._operator import is_contiguous

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
    if input.is_cuda:
        return _CUDA
    if not mode.startswith("nearest"):
        return _CPU
    channels_last = input.size(1) > 3 and is_contiguous(input, torch.channels_last)
    return _CPU_SMALL if channels_last or out_size[0] + out_size[1] <= 128 else _CPU
