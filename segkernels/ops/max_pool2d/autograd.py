"""max_pool2d for autograd and for torch's dispatcher, and its native calls.

The gradient sends each value back to its position. That is linear, and its own gradient reads the
position again: the backward of max_unpool2d.
"""

from __future__ import annotations

from typing import Any

import torch

from segkernels import _dtypes, _native
from segkernels.ops import _op, _windows
from segkernels.ops._windows import Windows

# codes or indices that are not there are empty tensors: codes where a window has more than 256
# cells, indices where it has not and nobody asked for them.
_op.library.define(
    f"max_pool2d(Tensor input, {_windows.SCHEMA}, bool return_indices) -> "
    "(Tensor values, Tensor codes, Tensor indices)"
)
_op.library.define(
    f"max_pool2d_backward(Tensor grad, Tensor positions, {_windows.SCHEMA}) -> Tensor"
)

Two = tuple[torch.Tensor, torch.Tensor]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pool(x: torch.Tensor, w: Windows, return_indices: bool) -> Two:
    """Pool the 4-D `x`: values, and indices or codes."""
    if x.is_meta or _op.through_dispatcher(x):
        values, codes, indices = torch.ops.segkernels.max_pool2d(x, *w, return_indices)
        return values, indices if return_indices else codes
    if _op.wants_grad(x):
        recorded: Two = MaxPool2d.apply(x, w, return_indices)
        return recorded
    values = _windows.empty(x, w.pooled, w)
    positions = _windows.empty(x, w.pooled, w, torch.int64 if return_indices else torch.uint8)
    _run(x, w, values, *((None, positions) if return_indices else (positions, None)))
    return values, positions


def pool_values(x: torch.Tensor, w: Windows) -> torch.Tensor:
    """Pool the 4-D `x`: values alone."""
    if x.is_meta or _op.through_dispatcher(x):
        found: torch.Tensor = torch.ops.segkernels.max_pool2d(x, *w, False)[0]
        return found
    if _op.wants_grad(x):
        recorded: torch.Tensor = MaxPool2d.apply(x, w, None)
        return recorded
    values = _windows.empty(x, w.pooled, w)
    _run(x, w, values, None, None)
    return values


def send_back(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """To each place the sum of the values of `grad` whose position it is."""
    if grad.is_meta or _op.through_dispatcher(grad, positions):
        out: torch.Tensor = torch.ops.segkernels.max_pool2d_backward(grad, positions, *w)
        return out
    if _op.wants_grad(grad):
        recorded: torch.Tensor = MaxPool2dBackward.apply(grad, positions, w)
        return recorded
    return run_backward(grad, positions, w)


class MaxPool2d(torch.autograd.Function):
    """Values, and positions unless `return_indices` is None; the gradient goes back to those."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: Windows, return_indices: bool | None) -> Any:
        values = _windows.empty(x, w.pooled, w)
        codes = None if w.many_cells else _windows.empty(x, w.pooled, w, torch.uint8)
        indices = None
        if w.many_cells or return_indices:
            indices = _windows.empty(x, w.pooled, w, torch.int64)
        _run(x, w, values, codes, indices)
        ctx.save_for_backward(indices if codes is None else codes)
        ctx.windows = w
        if return_indices is None:
            return values
        positions = indices if return_indices else codes
        ctx.mark_non_differentiable(positions)
        return values, positions

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (positions,) = ctx.saved_tensors
        return send_back(grads[0], positions, ctx.windows), None, None


class MaxPool2dBackward(torch.autograd.Function):
    """Sends back; its gradient reads at the positions."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> Any:
        ctx.save_for_backward(positions)
        ctx.windows = w
        return run_backward(grad, positions, w)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (positions,) = ctx.saved_tensors
        read = torch.ops.segkernels.max_unpool2d_backward(grads[0], positions, *ctx.windows)
        return read, None, None


def run(x: torch.Tensor, w: Windows, return_indices: bool) -> Three:
    """The native forward, with positions."""
    values, codes, indices = _outputs(x, w, return_indices)
    _run(x, w, values, None if w.many_cells else codes, indices if indices.numel() else None)
    return values, codes, indices


def _outputs(x: torch.Tensor, w: Windows, return_indices: bool) -> Three:
    many = w.many_cells
    return (
        _windows.empty(x, w.pooled, w),
        _windows.empty(x, (0, 0) if many else w.pooled, w, torch.uint8),
        _windows.empty(x, w.pooled if many or return_indices else (0, 0), w, torch.int64),
    )


def _run(
    x: torch.Tensor,
    w: Windows,
    values: torch.Tensor,
    codes: torch.Tensor | None,
    indices: torch.Tensor | None,
) -> None:
    if values.numel() == 0:
        return
    x = x.contiguous(memory_format=w.memory_format)
    _native.C().max_pool2d(
        _native.where(x),
        _windows.native(w, x),
        _dtypes.FLOATING[x.dtype],
        x.data_ptr(),
        values.data_ptr(),
        0 if codes is None else codes.data_ptr(),
        0 if indices is None else indices.data_ptr(),
    )


def run_backward(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> torch.Tensor:
    """The native backward."""
    out = _windows.empty(grad, w.full, w)
    if out.numel() > 0:
        grad = grad.contiguous(memory_format=w.memory_format)
        positions = positions.contiguous(memory_format=w.memory_format)
        where = _native.where(grad)
        sums = None
        if where[0] < 0 and _needs_sums(grad, positions, w):
            planes = min(max(where[2], 1), grad.size(0) * grad.size(1))
            sums = torch.empty((planes, *w.full), dtype=torch.float32, device="cpu")
        _native.C().max_pool2d_backward(
            where,
            _windows.native(w, grad),
            _dtypes.FLOATING[grad.dtype],
            grad.data_ptr(),
            positions.data_ptr(),
            positions.dtype == torch.int64,
            out.data_ptr(),
            0 if sums is None else sums.data_ptr(),
        )
    return out


def _needs_sums(grad: torch.Tensor, positions: torch.Tensor, w: Windows) -> bool:
    """Whether the CPU adds up in float planes, one a thread, and rounds them."""
    if w.channels_last or grad.dtype not in (torch.float16, torch.bfloat16):
        return False
    return positions.dtype == torch.int64 or not w.tile_the_plane


def _pool_kernel(x: torch.Tensor, *args: Any) -> Three:
    return run(x, _windows.from_schema(args), args[-1])


def _pool_fake(x: torch.Tensor, *args: Any) -> Three:
    return _outputs(x, _windows.from_schema(args), args[-1])


def _pool_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, codes, indices = output
    ctx.windows = _windows.from_schema(inputs[1:])
    ctx.save_for_backward(indices if ctx.windows.many_cells else codes)
    ctx.mark_non_differentiable(codes, indices)


def _pool_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    (positions,) = ctx.saved_tensors
    out = torch.ops.segkernels.max_pool2d_backward(grad, positions, *ctx.windows)
    return (out, *[None] * (_windows.FIELDS + 1))


def _send_kernel(grad: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
    return run_backward(grad, positions, _windows.from_schema(args))


def _send_fake(grad: torch.Tensor, positions: torch.Tensor, *args: Any) -> torch.Tensor:
    w = _windows.from_schema(args)
    return _windows.empty(grad, w.full, w)


def _send_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.windows = _windows.from_schema(inputs[2:])


def _send_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (positions,) = ctx.saved_tensors
    out = torch.ops.segkernels.max_unpool2d_backward(grad, positions, *ctx.windows)
    return (out, *[None] * (_windows.FIELDS + 1))


for _key in ("CPU", "CUDA"):
    _op.library.impl("max_pool2d", _pool_kernel, _key)
    _op.library.impl("max_pool2d_backward", _send_kernel, _key)
torch.library.register_fake("segkernels::max_pool2d", _pool_fake, lib=_op.library)
torch.library.register_fake("segkernels::max_pool2d_backward", _send_fake, lib=_op.library)
torch.library.register_autograd(
    "segkernels::max_pool2d", _pool_backward, setup_context=_pool_setup, lib=_op.library
)
torch.library.register_autograd(
    "segkernels::max_pool2d_backward",
    _send_backward,
    setup_context=_send_setup,
    lib=_op.library,
)
