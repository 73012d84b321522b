"""unpool_nearest and unpool_bed_of_nails for autograd and for torch's dispatcher, and natively.

Both are linear; their gradients sum a block and read a cell of it, and theirs are the unpoolings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from segkernels import _dtypes, _native
from segkernels.ops import _op, _windows
from segkernels.ops._windows import Pair, Windows

_op.library.define("unpool_nearest(Tensor input, int[2] kernel_size) -> Tensor")
_op.library.define("unpool_nearest_backward(Tensor grad, int[2] kernel_size) -> Tensor")
_op.library.define("unpool_bed_of_nails(Tensor input, int[2] kernel_size, int[2] cell) -> Tensor")
_op.library.define(
    "unpool_bed_of_nails_backward(Tensor grad, int[2] kernel_size, int[2] cell) -> Tensor"
)


def nearest(x: torch.Tensor, kernel: Pair) -> torch.Tensor:
    """Repeat the values of the 4-D `x`."""
    return _apply(x, "unpool_nearest", kernel)


def nails(x: torch.Tensor, kernel: Pair, cell: Pair) -> torch.Tensor:
    """The values of the 4-D `x` at `cell` of their blocks."""
    return _apply(x, "unpool_bed_of_nails", kernel, cell)


def _apply(x: torch.Tensor, name: str, *args: Pair) -> torch.Tensor:
    if x.device.type not in ("cpu", "cuda") or _op.through_dispatcher(x):
        out: torch.Tensor = getattr(torch.ops.segkernels, name)(x, *args)
        return out
    if _op.wants_grad(x):
        recorded: torch.Tensor = Unpool.apply(x, name, *args)
        return recorded
    return _RUN[name](x, *args)


class Unpool(torch.autograd.Function):
    """One of the four; its gradient is its transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, *args: Pair) -> torch.Tensor:
        ctx.call = name, args
        return _RUN[name](x, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        name, args = ctx.call
        return (_apply(grads[0], _transpose(name), *args), None, *[None] * len(args))


def _transpose(name: str) -> str:
    forward, backward, _ = name.partition("_backward")
    return forward if backward else f"{name}_backward"


def blocks(height: int, width: int, kernel: Pair, channels_last: bool) -> Windows:
    """The blocks of a plane's values."""
    full = (height * kernel[0], width * kernel[1])
    return Windows(full, (height, width), kernel, kernel, (0, 0), (1, 1), channels_last)


_known_blocks = functools.lru_cache(maxsize=1024)(blocks)


def _blocks_of(x: torch.Tensor, kernel: Pair) -> Windows:
    rows, columns = kernel  # a list where the dispatcher calls
    return _known_blocks(x.size(2), x.size(3), (rows, columns), _op.is_channels_last(x))


def _blocks_of_grad(grad: torch.Tensor, kernel: Pair) -> Windows:
    pooled = (grad.size(2) // kernel[0], grad.size(3) // kernel[1])
    return _known_blocks(*pooled, (kernel[0], kernel[1]), _op.is_channels_last(grad))


def _run(name: str, x: torch.Tensor, size: Pair, w: Windows, *args: int) -> torch.Tensor:
    out = _windows.empty(x, size, w)
    if out.numel() > 0:
        x = x.contiguous(memory_format=w.memory_format)
        getattr(_native.C(), name)(
            _native.where(x),
            _windows.native(w, x),
            _dtypes.FLOATING[x.dtype],
            x.data_ptr(),
            out.data_ptr(),
            *args,
        )
    return out


def _run_nearest(x: torch.Tensor, kernel: Pair) -> torch.Tensor:
    w = _blocks_of(x, kernel)
    return _run("unpool_nearest", x, w.full, w)


def _run_nearest_backward(grad: torch.Tensor, kernel: Pair) -> torch.Tensor:
    w = _blocks_of_grad(grad, kernel)
    return _run("unpool_nearest_backward", grad, w.pooled, w)


def _run_nails(x: torch.Tensor, kernel: Pair, cell: Pair) -> torch.Tensor:
    w = _blocks_of(x, kernel)
    return _run("unpool_bed_of_nails", x, w.full, w, cell[0] * kernel[1] + cell[1])


def _run_nails_backward(grad: torch.Tensor, kernel: Pair, cell: Pair) -> torch.Tensor:
    w = _blocks_of_grad(grad, kernel)
    out = _windows.empty(grad, w.pooled, w)
    return out.copy_(grad[:, :, cell[0] :: kernel[0], cell[1] :: kernel[1]])


def _fake(x: torch.Tensor, kernel: Pair, *_: Pair) -> torch.Tensor:
    w = blocks(x.size(2), x.size(3), kernel, _op.is_channels_last(x))
    return _windows.empty(x, w.full, w)


def _fake_backward(grad: torch.Tensor, kernel: Pair, *_: Pair) -> torch.Tensor:
    pooled = (grad.size(2) // kernel[0], grad.size(3) // kernel[1])
    w = blocks(*pooled, kernel, _op.is_channels_last(grad))
    return _windows.empty(grad, w.pooled, w)


_RUN: dict[str, Callable[..., torch.Tensor]] = {
    "unpool_nearest": _run_nearest,
    "unpool_nearest_backward": _run_nearest_backward,
    "unpool_bed_of_nails": _run_nails,
    "unpool_bed_of_nails_backward": _run_nails_backward,
}


def _register(name: str) -> None:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.args = inputs[1:]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        out = getattr(torch.ops.segkernels, _transpose(name))(grad, *ctx.args)
        return (out, *[None] * len(ctx.args))

    for key in ("CPU", "CUDA"):
        _op.library.impl(name, _RUN[name], key)
    fake = _fake_backward if name.endswith("_backward") else _fake
    torch.library.register_fake(f"segkernels::{name}", fake, lib=_op.library)
    torch.library.register_autograd(
        f"segkernels::{name}", backward, setup_context=setup, lib=_op.library
    )


for _name in _RUN:
    _register(_name)
