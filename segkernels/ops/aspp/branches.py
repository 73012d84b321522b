"""The branches into one output: several in one launch where a kernel takes them, or one by one."""

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
    """All of `aspp`, of a 4-D `x`, out of autograd's sight."""
    e = Epilogue(None, scale, shift, None, spec.activation)
    dtype = x.dtype
    with torch.no_grad():
        if spec.backend in ("auto", "torch") and torch_path.to_widen(x):
            x, weights, e = x.float(), [w.float() for w in weights], e.widened()
        if spec.summed:
            out = _summed(x, weights, e, spec)
        else:
            out = _side_by_side(x, weights, e, pooled, spec)
        return laid_out(out, spec.channels_last).to(dtype)


def _summed(
    x: torch.Tensor, weights: Sequence[torch.Tensor], e: Epilogue, spec: Spec
) -> torch.Tensor:
    out = None
    for i, (weight, call) in enumerate(zip(weights, spec.calls(x, weights), strict=True)):
        of_one = Epilogue(None, e.scale, None if i else e.shift)
        branch = backends.forward(x, weight, of_one, call)
        out = branch if out is None else out.add_(branch)
    assert out is not None
    return out.relu_() if spec.activation == "relu" else out


def _side_by_side(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    e: Epilogue,
    pooled: torch.Tensor | None,
    spec: Spec,
) -> torch.Tensor:
    # What writes straight into its channels wants them side by side.
    side_by_side = spec.channels_last or spec.backend == "sm90" or x.is_cuda
    layout = torch.channels_last if side_by_side else torch.contiguous_format
    shape = (x.size(0), spec.channels(weights, pooled), x.size(2), x.size(3))
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    places, calls = spec.places(weights), spec.calls(x, weights)
    for first, end in _alike(weights):
        place = slice(places[first].start, places[end - 1].stop)
        of_these, some = _of(e, place), weights[first:end]
        if side_by_side and backends.forward_into(
            out[:, place], x, some, of_these, calls[first:end]
        ):
            continue
        for i in range(first, end):
            out[:, places[i]] = backends.forward(x, weights[i], _of(e, places[i]), calls[i])
    if pooled is not None:
        out[:, places[-1].stop :] = pooled.relu() if e.activation == "relu" else pooled
    return out


def _alike(weights: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Runs of at most eight neighbours of one shape, as (first, end)."""
    first = 0
    for _, run in groupby(weights, key=lambda weight: weight.shape):
        end = first + len(list(run))
        for start in range(first, end, 8):
            yield start, min(start + 8, end)
        first = end


def _of(e: Epilogue, place: slice) -> Epilogue:
    """The epilogue of some of the channels."""
    return e._replace(
        scale=None if e.scale is None else e.scale[place],
        shift=None if e.shift is None else e.shift[place],
    )
