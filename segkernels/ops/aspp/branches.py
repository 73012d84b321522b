"""The branches one by one through dilated_conv2d, each into its place of the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels.ops.aspp.spec import Spec
from segkernels.ops.dilated_conv2d import backends
from segkernels.ops.dilated_conv2d.call import Epilogue


def forward(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    pooled: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    """All of `aspp`, of a 4-D `x`, out of autograd's sight."""
    with torch.no_grad():
        out = _summed(x, weights, scale, shift, spec) if spec.summed else None
        if out is None:
            out = _side_by_side(x, weights, scale, shift, pooled, spec)
        return out.relu_() if spec.activation == "relu" else out


def _summed(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    out = None
    for i, (weight, call) in enumerate(zip(weights, spec.calls(x, weights), strict=True)):
        branch = backends.forward(x, weight, Epilogue(None, scale, None if i else shift), call)
        out = branch if out is None else out.add_(branch)
    assert out is not None
    return out


def _side_by_side(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    pooled: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    shape = (x.size(0), spec.channels(weights, pooled), x.size(2), x.size(3))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    places, calls = spec.places(weights), spec.calls(x, weights)
    for run in _alike(weights):
        place = slice(places[run.start].start, places[run.stop - 1].stop)
        many = run.stop - run.start > 1 and spec.channels_last
        if many and backends.forward_into(
            out[:, place], x, weights[run], _epilogue(scale, shift, place), calls[run]
        ):
            continue
        for weight, call, place in zip(weights[run], calls[run], places[run], strict=True):
            out[:, place] = backends.forward(x, weight, _epilogue(scale, shift, place), call)
    if pooled is not None:
        out[:, places[-1].stop :] = pooled
    return out


def _epilogue(scale: torch.Tensor | None, shift: torch.Tensor | None, place: slice) -> Epilogue:
    return Epilogue(
        None, None if scale is None else scale[place], None if shift is None else shift[place]
    )


def _alike(weights: Sequence[torch.Tensor]) -> list[slice]:
    """Runs of branches whose weights have one shape, which one launch may take."""
    ends = [
        i
        for i in range(1, len(weights) + 1)
        if i == len(weights) or weights[i].shape != weights[i - 1].shape
    ]
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
