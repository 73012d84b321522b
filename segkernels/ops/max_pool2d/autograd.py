"""The derivatives of max_pool2d.

The gradient is scatter-added to the recorded positions. That is linear, and its own gradient reads
the positions again: the backward of max_unpool2d.
"""

from __future__ import annotations

from typing import Any

import torch

from segkernels.ops import _windows
from segkernels.ops._operator import Operator
from segkernels.ops._windows import Windows
from segkernels.ops.max_pool2d import native
from segkernels.ops.max_pool2d.native import Pooling


def _read(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    from segkernels.ops.max_unpool2d.autograd import read  # which imports this module

    out: torch.Tensor = read(grad, positions, w)
    return out


def _save(x: torch.Tensor, p: Pooling, *found: Any) -> tuple[torch.Tensor]:
    _, codes, indices = found
    return (indices if p.windows.many_cells else codes,)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor]:
    return (send_back(grad, *ctx.saved_tensors, ctx.record.windows),)


def _jvp(ctx: Any, tangent: torch.Tensor) -> tuple[Any, ...]:
    (positions,) = ctx.saved_tensors
    return _read(tangent, positions, ctx.record.windows), None, None


pool: Operator = Operator(
    "max_pool2d",
    "Tensor input",
    Pooling,
    returns="(Tensor values, Tensor codes, Tensor indices)",
    kernel=native.pool,
    fake=native.outputs,
    direct=native.pool_direct,
    save=_save,
    backward=_backward,
    jvp=_jvp,
)
send_back: Operator = Operator(
    "max_pool2d_backward",
    "Tensor grad, Tensor positions",
    Windows,
    kernel=native.send_back,
    fake=lambda grad, positions, w: _windows.empty(grad, w.full, w),
    transpose=_read,
)
