"""What an aspp call is, after the checks, as the layers below pass it on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from segkernels.ops.dilated_conv2d.call import Call


class Spec(NamedTuple):
    """How the branches are joined.

    Attributes:
        rates: the dilation of each branch.
        activation: None or "relu", behind everything.
        summed: the branches are added up; else they are one behind the other.
        channels_last: the output's layout.
        backend: what the user asked for.
    """

    rates: tuple[int, ...]
    activation: str | None
    summed: bool
    channels_last: bool
    backend: str

    def calls(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[Call]:
        """Each branch as a call of dilated_conv2d, padded so that the size stays."""
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

    def places(self, weights: Sequence[torch.Tensor]) -> list[slice]:
        """The channels of the output that each branch writes, and its part of scale and shift."""
        ends = [0]
        for weight in weights:
            ends.append(ends[-1] + weight.size(0))
        if self.summed:
            return [slice(0, ends[1])] * len(weights)
        return [slice(start, end) for start, end in pairwise(ends)]

    def channels(self, weights: Sequence[torch.Tensor], pooled: torch.Tensor | None) -> int:
        """Of the output."""
        of_branches = int(self.places(weights)[-1].stop)
        return of_branches if pooled is None else of_branches + pooled.size(1)
