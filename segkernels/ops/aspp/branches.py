"""The forward pass of aspp: the branches, in one launch or one at a time, and their output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from segkernels.ops.aspp.spec import Spec
from segkernels.ops.dilated_conv2d import backends, torch_path
from segkernels.ops.dilated_conv2d.call import Epilogue, laid_out


def forward(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    pooled: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    spec: Spec,
) -> torch.Tensor:
    """Compute `aspp` of a 4-D `x`, outside autograd."""
    e = Epilogue(None, scale, shift, None, spec.activation)
    dtype = x.dtype
    with torch.no_grad():
        if spec.backend in ("auto", "torch") and torch_path.needs_float32(x):
            x, weights, e = x.float(), [w.float() for w in weights], e.to_float32()
        if spec.summed:
            out = _sum(x, weights, e, spec)
        else:
            out = _concatenate(x, weights, e, pooled, spec)
        return laid_out(out, spec.channels_last).to(dtype)


def _sum(x: torch.Tensor, weights: Sequence[torch.Tensor], e: Epilogue, spec: Spec) -> torch.Tensor:
    out = None
    for i, (weight, call) in enumerate(zip(weights, spec.calls(x, weights), strict=True)):
        scale_and_shift = Epilogue(None, e.scale, None if i else e.shift)
        branch = backends.forward(x, weight, scale_and_shift, call)
        out = branch if out is None else out.add_(branch)
    assert out is not None
    return out.relu_() if spec.activation == "relu" else out


def _concatenate(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    e: Epilogue,
    pooled: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    # The Hopper kernel, which writes several branches in one launch, needs a channels_last output.
    channels_last = spec.channels_last or spec.backend == "sm90" or x.is_cuda
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (x.size(0), spec.channels(weights, pooled), x.size(2), x.size(3))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    slices, calls = spec.channel_slices(weights), spec.calls(x, weights)
    for first, end in _equal_shapes(weights):
        channels = slice(slices[first].start, slices[end - 1].stop)
        if channels_last and backends.forward_into(
            out[:, channels], x, weights[first:end], _slice(e, channels), calls[first:end]
        ):
            continue
        for i in range(first, end):
            out[:, slices[i]] = backends.forward(x, weights[i], _slice(e, slices[i]), calls[i])
    if pooled is not None:
        out[:, slices[-1].stop :] = pooled.relu() if e.activation == "relu" else pooled
    return out


def _equal_shapes(weights: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield runs of at most eight neighbouring weights of the same shape, as (first, end)."""
    first = 0
    for _, run in groupby(weights, key=lambda weight: weight.shape):
        end = first + len(list(run))
        for start in range(first, end, 8):
            yield start, min(start + 8, end)
        first = end


def _slice(e: Epilogue, channels: slice) -> Epilogue:
    """Return the epilogue of some of the channels."""
    return e._replace(
        scale=None if e.scale is None else e.scale[channels],
        shift=None if e.shift is None else e.shift[channels],
    )
