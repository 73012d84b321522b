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
    places = spec.places(weights)
    for weight, call, place in zip(weights, spec.calls(x, weights), places, strict=True):
        e = Epilogue(
            None,
            None if scale is None else scale[place],
            None if shift is None else shift[place],
        )
        out[:, place] = backends.forward(x, weight, e, call)
    if pooled is not None:
        out[:, places[-1].stop :] = pooled
    return out
