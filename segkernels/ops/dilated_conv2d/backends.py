"""Calls the implementation of a convolution or a gradient: the Hopper kernels or torch.

With backend="auto" the cost model in dispatch.py chooses between them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from segkernels.ops._operator import is_channels_last
from segkernels.ops.dilated_conv2d import dispatch, native, torch_path
from segkernels.ops.dilated_conv2d.call import Call, Epilogue, laid_out
from segkernels.ops.dilated_conv2d.geometry import Problem

BACKENDS = ("auto", "sm90", "torch")


def check(x: torch.Tensor, weight: torch.Tensor, c: Call) -> None:
    """Raise ValueError if the requested backend does not support this call."""
    if c.backend == "sm90" and (why := native.supported(c.problem(x, weight))):
        raise ValueError(f"dilated_conv2d: backend={c.backend!r} does not support this call: {why}")


def forward(x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call) -> torch.Tensor:
    """The convolution of a 4-D `x` with its epilogue, in the layout that `c` requests."""
    if _use_torch(x, c):
        if not torch.is_grad_enabled():  # avoids the overhead of no_grad for small convolutions
            return laid_out(torch_path.forward(x, weight, e, c), c.channels_last)
        with torch.no_grad():
            return laid_out(torch_path.forward(x, weight, e, c), c.channels_last)
    with torch.no_grad():
        problem = c.problem(x, weight)
        out = None
        if _use_sm90("forward", c.backend, problem):
            with _ignore_capture_error(c.backend):
                g, shift = problem.geometry, e.folded_shift()
                out = native.forward(x, weight, g, e.scale, shift, e.residual, e.activation)
        if out is None:
            out = torch_path.forward(x, weight, e, c)
        return laid_out(out, c.channels_last)


def forward_into(
    into: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    e: Epilogue,
    calls: Sequence[Call],
) -> bool:
    """Compute several convolutions of `x` in one launch of the Hopper kernel, if it is chosen.

    Args:
        into: the output, [N, sum of C_out, H, W]: channels of a channels_last tensor.
        x: [N, C, H, W].
        weights: of the branches, at most 8.
        e: the epilogue, with vectors for the channels of all branches and no residual.
        calls: of the branches, all with the same backend.

    Returns:
        Whether `into` was written.
    """
    if e.residual is not None or _use_torch(x, calls[0]):
        return False
    problems = [c.problem(x, w) for w, c in zip(weights, calls, strict=True)]
    if not _use_sm90("forward", calls[0].backend, *problems):
        return False
    done = False
    with torch.no_grad(), _ignore_capture_error(calls[0].backend):
        geometries, shift = [p.geometry for p in problems], e.folded_shift()
        native.forward_branches(x, weights, geometries, e.scale, shift, None, e.activation, into)
        done = True
    return done


def gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: tuple[bool, bool], c: Call
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the plain convolution with respect to its input and weight.

    Args:
        grad: gradient with respect to the output.
        x, weight: of the forward pass.
        mask: which gradients to compute.
        c: the call.

    Returns:
        The gradients of `x` and `weight`, in their layouts; None where `mask` is False.
    """
    dx = dw = None
    with torch.no_grad():
        if not _use_torch(x, c):
            problem = c.problem(x, weight)
            with _ignore_capture_error(c.backend):
                if mask[0] and _use_sm90("input_gradient", c.backend, problem):
                    dx = native.input_gradient(grad, weight, problem.geometry)
            with _ignore_capture_error(c.backend):
                if mask[1] and _use_sm90("weight_gradient", c.backend, problem):
                    dw = native.weight_gradient(grad, x, problem.geometry)
        missing = (mask[0] and dx is None, mask[1] and dw is None)
        if missing[0] or missing[1]:
            torch_dx, torch_dw = torch_path.gradients(grad, x, weight, c, missing)
            dx = torch_dx if missing[0] else dx
            dw = torch_dw if missing[1] else dw
        return (
            None if dx is None else laid_out(dx, is_channels_last(x)),
            None if dw is None else laid_out(dw, is_channels_last(weight)),
        )


def _ignore_capture_error(backend: str) -> contextlib.AbstractContextManager[None]:
    """Suppress the error of a first call during graph capture, unless `backend` is "sm90".

    torch then computes the call.
    """
    if backend == "sm90":
        return contextlib.nullcontext()
    return contextlib.suppress(native.FirstCallInGraphError)


def _use_torch(x: torch.Tensor, c: Call) -> bool:
    """Whether torch computes the call, whatever the cost model estimates.

    This includes contiguous inputs, because the copy to channels_last costs about as much time as
    the Hopper kernel gains.
    """
    if c.backend == "auto":
        return not (x.is_cuda and c.channels_last)
    return c.backend == "torch"


def _use_sm90(kind: str, backend: str, *problems: Problem) -> bool:
    """Whether the Hopper kernel computes this part of a call, or of several calls in one launch.

    With backend="sm90", torch computes the gradients that the kernel does not support.
    """
    if backend == "auto":
        return dispatch.choose(kind, *problems) == "sm90"
    supported = native.weight_gradient_supported if kind == "weight_gradient" else native.supported
    return not any(map(supported, problems))
