"""The checked arguments of aspp, as a record for the operator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from segkernels.ops.dilated_conv2d.call import Call


class Spec(NamedTuple):
    """Arguments of aspp other than tensors.

    Attributes:
        rates: the dilation of each branch.
        activation: None or "relu", applied last.
        summed: whether the branches are added up; else they are concatenated.
        channels_last: whether the output is channels_last; else it is contiguous.
        backend: the requested backend.
    """

    rates: tuple[int, ...]
    activation: str | None
    summed: bool
    channels_last: bool
    backend: str

    def calls(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[Call]:
        """Return each branch as a call of dilated_conv2d, with padding that keeps the size."""
        return [
            Call(
                (1, 1),
                (rate * (w.size(2) // 2), rate * (w.size(3) // 2)),
                (rate, rate),
                1,
                (x.size(2), x.size(3)),
                self.channels_last,
                self.backend,
            )
            for rate, w in zip(self.rates, weights, strict=True)
        ]

    def channel_slices(self, weights: Sequence[torch.Tensor]) -> list[slice]:
        """Return the channels of each branch in the output, in scale and in shift."""
        ends = [0]
        for weight in weights:
            ends.append(ends[-1] + weight.size(0))
        if self.summed:
            return [slice(0, ends[1])] * len(weights)
        return [slice(start, end) for start, end in pairwise(ends)]

    def channels(self, weights: Sequence[torch.Tensor], pooled: torch.Tensor | None) -> int:
        """Number of channels of the output."""
        of_branches = int(self.channel_slices(weights)[-1].stop)
        return of_branches if pooled is None else of_branches + pooled.size(1)
