"""The branches of aspp as calls of dilated_conv2d, and the forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch

from segkernels.ops._operator import memory_format
from segkernels.ops.dilated_conv2d import cudnn, hopper, operator
from segkernels.ops.dilated_conv2d.call import Call, Epilogue, laid_out


class Branches(NamedTuple):
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

    def empty(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        pooled: torch.Tensor | None,
        channels_last: bool,
    ) -> torch.Tensor:
        """Allocate the output, [N, channels, H, W] for `x` of [N, C, H, W]."""
        shape = (x.size(0), self.channels(weights, pooled), x.size(2), x.size(3))
        layout = memory_format(channels_last)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def forward(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    pooled: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    b: Branches,
) -> torch.Tensor:
    """Compute `aspp` of a 4-D `x`, outside autograd."""
    e = Epilogue(None, scale, shift, None, b.activation)
    dtype = x.dtype
    if b.backend in ("auto", "torch") and cudnn.needs_float32(x):
        x, weights, e = x.float(), [w.float() for w in weights], e.to_float32()
    out = _sum(x, weights, e, b) if b.summed else _concatenate(x, weights, e, pooled, b)
    return laid_out(out, b.channels_last).to(dtype)


def _sum(
    x: torch.Tensor, weights: Sequence[torch.Tensor], e: Epilogue, b: Branches
) -> torch.Tensor:
    out = None
    for i, (weight, call) in enumerate(zip(weights, b.calls(x, weights), strict=True)):
        scale_and_shift = Epilogue(None, e.scale, None if i else e.shift)
        branch = operator.forward(x, weight, scale_and_shift, call)
        out = branch if out is None else out.add_(branch)
    assert out is not None
    return out.relu_() if b.activation == "relu" else out


def _concatenate(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    e: Epilogue,
    pooled: torch.Tensor | None,
    b: Branches,
) -> torch.Tensor:
    # The Hopper kernel, which writes several branches in one launch, needs a channels_last output.
    may_share = b.channels_last or b.backend == "sm90"
    out = b.empty(x, weights, pooled, may_share)
    slices, calls = b.channel_slices(weights), b.calls(x, weights)
    for first, end in _equal_shapes(weights):
        channels, run = slice(slices[first].start, slices[end - 1].stop), slice(first, end)
        launched = None
        if may_share:
            part, into = _slice(e, channels), out[:, channels]
            launched = hopper.forward(x, weights[run], part, calls[run], into)
        if launched is None:
            for i in range(first, end):
                own = _slice(e, slices[i])
                out[:, slices[i]] = operator.forward(x, weights[i], own, calls[i])
    if pooled is not None:
        out[:, slices[-1].stop :] = pooled.relu() if e.activation == "relu" else pooled
    return out


def _equal_shapes(weights: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of each run of neighbouring weights of one shape, for one launch a run."""
    first = 0
    for _, run in groupby(weights, key=lambda weight: weight.shape):
        end = first + len(list(run))
        for start in range(first, end, hopper.MAX_BRANCHES):
            yield start, min(start + hopper.MAX_BRANCHES, end)
        first = end


def _slice(e: Epilogue, channels: slice) -> Epilogue:
    """Return the epilogue of some of the channels."""
    return e._replace(
        scale=None if e.scale is None else e.scale[channels],
        shift=None if e.shift is None else e.shift[channels],
    )
