"""interpolate for autograd and for torch's dispatcher: one linear map and its transpose."""

from __future__ import annotations

from typing import Any

import torch

from segkernels.ops import _op
from segkernels.ops.interpolate import _resampling
from segkernels.ops.interpolate._resampling import Resampling

_op.library.define(
    "interpolate(Tensor x, SymInt[] in_size, SymInt[] out_size, float[] factors, str mode, "
    "bool align_corners, int rule, bool transpose) -> Tensor"
)


def apply(x: torch.Tensor, r: Resampling) -> torch.Tensor:
    """Resample `x`, on the way that this call needs."""
    if _op.through_dispatcher(x):
        out: torch.Tensor = torch.ops.segkernels.interpolate(x, *r)
        return out
    if _op.wants_grad(x):
        recorded: torch.Tensor = Interpolate.apply(x, r)
        return recorded
    return _resampling.run(x, r)


class Interpolate(torch.autograd.Function):
    """The resampling; its gradient is the transpose, and that one's the resampling again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, r: Resampling) -> torch.Tensor:
        ctx.resampling = r
        return _resampling.run(x, r)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return apply(grads[0], ctx.resampling.transposed()), None


def _resampling_of(args: tuple[Any, ...]) -> Resampling:
    in_size, out_size, factors, mode, align_corners, rule, transpose = args
    return Resampling(
        tuple(in_size), tuple(out_size), tuple(factors), mode, align_corners, rule, transpose
    )


def _kernel(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return _resampling.run(x, _resampling_of(args))


def _fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return _resampling.empty_result(x, _resampling_of(args).result_size())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.resampling = _resampling_of(inputs[1:])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    out = torch.ops.segkernels.interpolate(grad, *ctx.resampling.transposed())
    return (out, *[None] * 7)


for _key in ("CPU", "CUDA"):
    _op.library.impl("interpolate", _kernel, _key)
torch.library.register_fake("segkernels::interpolate", _fake, lib=_op.library)
torch.library.register_autograd(
    "segkernels::interpolate", _backward, setup_context=_setup_context, lib=_op.library
)
