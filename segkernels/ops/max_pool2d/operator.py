"""The operator max_pool2d.

Its backward pass scatter-adds to the recorded positions, its forward-mode derivative gathers from
them.
"""

from __future__ import annotations

from typing import Any

import torch

from segkernels.ops import _positions, _windows
from segkernels.ops._operator import Operator
from segkernels.ops.max_pool2d import native
from segkernels.ops.max_pool2d.native import Pooling


def _save(x: torch.Tensor, p: Pooling, *outputs: Any) -> tuple[torch.Tensor]:
    _, codes, indices = outputs
    return (indices if _windows.too_large_for_codes(p.windows.kernel_size) else codes,)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor]:
    return (_positions.scatter_add(grad, *ctx.saved_tensors, ctx.record.windows),)


def _jvp(ctx: Any, tangent: torch.Tensor) -> tuple[Any, ...]:
    return _positions.gather(tangent, *ctx.saved_tensors, ctx.record.windows), None, None


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
