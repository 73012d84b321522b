"""The derivatives of max_unpool2d.

The gradient of a value is read where it pointed. That is linear, and its own gradient adds the
values up where they pointed: the backward of max_pool2d for codes, torch's scatter_add for indices.
"""

from __future__ import annotations

import torch

from segkernels.ops import _windows
from segkernels.ops._operator import Operator
from segkernels.ops._windows import Windows
from segkernels.ops.max_pool2d.autograd import send_back
from segkernels.ops.max_unpool2d import native


def _add_up(x: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    if positions.dtype == torch.uint8:
        out: torch.Tensor = send_back(x, positions, w)
        return out
    places = w.full[0] * w.full[1]
    index = positions.flatten(-2)
    inside = (index >= 0) & (index < places)
    values = x.flatten(-2).masked_fill(~inside, 0)
    if x.is_cuda:  # scatter_add would add in any order there
        planes = torch.arange(values.numel() // max(1, index.size(-1)), device=x.device)
        first = (planes * places).view(*values.shape[:-1], 1)
        at = (first + index.masked_fill(~inside, 0)).flatten()
        sums = values.new_zeros(planes.numel() * places)
        sums = sums.index_put((at,), values.flatten(), accumulate=True)
        return sums.view(*values.shape[:-1], *w.full)
    zeros = values.new_zeros((*values.shape[:-1], places))
    return zeros.scatter_add(-1, index.masked_fill(~inside, 0), values).unflatten(-1, w.full)


unpool: Operator = Operator(
    "max_unpool2d",
    "Tensor input, Tensor positions",
    Windows,
    kernel=native.unpool,
    fake=lambda x, positions, w: _windows.empty(x, w.full, w),
    transpose=lambda grad, positions, w: read(grad, positions, w),
)
read: Operator = Operator(
    "max_unpool2d_backward",
    "Tensor grad, Tensor positions",
    Windows,
    kernel=native.read,
    fake=lambda grad, positions, w: _windows.empty(grad, w.pooled, w),
    transpose=_add_up,
)
