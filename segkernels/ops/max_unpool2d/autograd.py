"""max_unpool2d for autograd and for torch's dispatcher, and its native calls.

The gradient of a value is read where it pointed. That is linear, and its own gradient adds the
values up where they pointed: the backward of max_pool2d for codes, torch's scatter_add for indices.
"""

from __future__ import annotations

from typing import Any

import torch

from segkernels import _dtypes, _native, _status
from segkernels.ops import _op, _windows
from segkernels.ops._windows import Windows
from segkernels.ops.max_pool2d.autograd import send_back

_op.library.define(f"max_unpool2d(Tensor input, Tensor positions, {_windows.SCHEMA}) -> Tensor")
_op.library.define(
    f"max_unpool2d_backward(Tensor grad, Tensor positions, {_windows.SCHEMA}) -> Tensor"
)


def unpool(x: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """Unpool the 4-D `x`; `positions` are uint8 codes or int64 indices."""
    if x.is_meta or _op.through_dispatcher(x, positions):
        out: torch.Tensor = torch.ops.segkernels.max_unpool2d(x, positions, *w)
        return out
    if _op.wants_grad(x):
        recorded: torch.Tensor = MaxUnpool2d.apply(x, positions, w)
        return recorded
    return run(x, positions, w)


def read(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """The values of the plane `grad` at the positions; 0 for a position outside the plane."""
    if grad.is_meta or _op.through_dispatcher(grad, positions):
        out: torch.Tensor = torch.ops.segkernels.max_unpool2d_backward(grad, positions, *w)
        return out
    if _op.wants_grad(grad):
        recorded: torch.Tensor = MaxUnpool2dBackward.apply(grad, positions, w)
        return recorded
    return run_backward(grad, positions, w)


class MaxUnpool2d(torch.autograd.Function):
    """Unpools; the gradient is read at the positions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, positions: torch.Tensor, w: Windows) -> Any:
        ctx.save_for_backward(positions)
        ctx.windows = w
        return run(x, positions, w)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (positions,) = ctx.saved_tensors
        return read(grads[0], positions, ctx.windows), None, None


class MaxUnpool2dBackward(torch.autograd.Function):
    """Reads; its gradient adds up at the positions."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> Any:
        ctx.save_for_backward(positions)
        ctx.windows = w
        return run_backward(grad, positions, w)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (positions,) = ctx.saved_tensors
        return _add_up(grads[0], positions, ctx.windows), None, None


def _add_up(x: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    if positions.dtype == torch.uint8:
        return send_back(x, positions, w)
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


def run(x: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """The native forward."""
    out = _windows.empty(x, w.full, w)
    if out.numel() == 0:
        return out
    x = x.contiguous(memory_format=w.memory_format)
    positions = positions.contiguous(memory_format=w.memory_format)
    wide = positions.dtype == torch.int64
    where = _native.where(x)
    winners = None
    if wide and (where[0] >= 0 or where[2] == 0):
        sources = w.pooled[0] * w.pooled[1]
        dtype = torch.int32 if sources < 2**31 else torch.int64
        winners = _windows.empty(x, w.full, w, dtype)
    args = (
        where,
        _windows.native(w, x),
        _dtypes.FLOATING[x.dtype],
        x.data_ptr(),
        positions.data_ptr(),
        wide,
        out.data_ptr(),
        0 if winners is None else winners.data_ptr(),
    )
    if where[0] < 0:
        _status.raise_found(_native.C().max_unpool2d(*args, 0), "max_unpool2d")
        return out
    with _status.watch(x, "max_unpool2d") as status:
        _native.C().max_unpool2d(*args, status.data_ptr())
    return out


def run_backward(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """The native backward. Positions were checked by the forward, and are not reported again."""
    out = _windows.empty(grad, w.pooled, w)
    if out.numel() == 0:
        return out
    if grad.numel() == 0:
        return out.zero_()
    grad = grad.contiguous(memory_format=w.memory_format)
    positions = positions.contiguous(memory_format=w.memory_format)
    _native.C().max_unpool2d_backward(
        _native.where(grad),
        _windows.native(w, grad),
        _dtypes.FLOATING[grad.dtype],
        grad.data_ptr(),
        positions.data_ptr(),
        positions.dtype == torch.int64,
        out.data_ptr(),
        0,
    )
    return out


def _unpool_kernel(x: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
    return run(x, positions, _windows.from_schema(args))


def _unpool_fake(x: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
    w = _windows.from_schema(args)
    return _windows.empty(x, w.full, w)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.windows = _windows.from_schema(inputs[2:])


def _unpool_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (positions,) = ctx.saved_tensors
    out = torch.ops.segkernels.max_unpool2d_backward(grad, positions, *ctx.windows)
    return (out, *[None] * (_windows.FIELDS + 1))


def _read_kernel(grad: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
    return run_backward(grad, positions, _windows.from_schema(args))


def _read_fake(grad: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
    w = _windows.from_schema(args)
    return _windows.empty(grad, w.pooled, w)


def _read_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (positions,) = ctx.saved_tensors
    if positions.dtype == torch.uint8:
        out = torch.ops.segkernels.max_pool2d_backward(grad, positions, *ctx.windows)
    else:
        out = _add_up(grad, positions, ctx.windows)
    return (out, *[None] * (_windows.FIELDS + 1))


for _key in ("CPU", "CUDA"):
    _op.library.impl("max_unpool2d", _unpool_kernel, _key)
    _op.library.impl("max_unpool2d_backward", _read_kernel, _key)
torch.library.register_fake("segkernels::max_unpool2d", _unpool_fake, lib=_op.library)
torch.library.register_fake("segkernels::max_unpool2d_backward", _read_fake, lib=_op.library)
torch.library.register_autograd(
    "segkernels::max_unpool2d", _unpool_backward, setup_context=_setup, lib=_op.library
)
torch.library.register_autograd(
    "segkernels::max_unpool2d_backward", _read_backward, setup_context=_setup, lib=_op.library
)
