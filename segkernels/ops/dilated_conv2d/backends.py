"""Which implementation computes a convolution, and its gradients."""

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
    """Raise ValueError where the backend that was asked for cannot take this call."""
    if c.backend == "sm90" and (why := native.supported(c.problem(x, weight))):
        raise ValueError(f"dilated_conv2d: backend={c.backend!r} cannot take this call: {why}")


def forward(x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call) -> torch.Tensor:
    """The convolution and its epilogue of the 4-D `x`, in the layout that `c` asks for."""
    if _is_torchs(x, c):
        if not torch.is_grad_enabled():  # small convolutions notice what follows
            return laid_out(torch_path.forward(x, weight, e, c), c.channels_last)
        with torch.no_grad():
            return laid_out(torch_path.forward(x, weight, e, c), c.channels_last)
    with torch.no_grad():
        problem = c.problem(x, weight)
        out = None
        if _is_sm90s("forward", c.backend, problem):
            with _or_torch(c.backend):
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
    """Several convolutions of `x` in one launch, where there is a kernel for it.

    Args:
        into: their channels of a larger channels_last tensor; [N, sum of C_out, H, W].
        x: [N, C, H, W].
        weights: of the branches, at most 8.
        e: of all branches' channels; no residual.
        calls: the branches', of one backend.

    Returns:
        Whether that was done; if not, nothing was.
    """
    if e.residual is not None or _is_torchs(x, calls[0]):
        return False
    problems = [c.problem(x, w) for w, c in zip(weights, calls, strict=True)]
    if not _is_sm90s("forward", calls[0].backend, *problems):
        return False
    done = False
    with torch.no_grad(), _or_torch(calls[0].backend):
        geometries, shift = [p.geometry for p in problems], e.folded_shift()
        native.forward_branches(x, weights, geometries, e.scale, shift, None, e.activation, into)
        done = True
    return done


def gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: tuple[bool, bool], c: Call
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the plain convolution, each laid out as what it is the gradient of, or None."""
    dx = dw = None
    with torch.no_grad():
        if not _is_torchs(x, c):
            problem = c.problem(x, weight)
            with _or_torch(c.backend):
                if mask[0] and _is_sm90s("input_gradient", c.backend, problem):
                    dx = native.input_gradient(grad, weight, problem.geometry)
            with _or_torch(c.backend):
                if mask[1] and _is_sm90s("weight_gradient", c.backend, problem):
                    dw = native.weight_gradient(grad, x, problem.geometry)
        rest = (mask[0] and dx is None, mask[1] and dw is None)
        if rest[0] or rest[1]:
            their_dx, their_dw = torch_path.gradients(grad, x, weight, c, rest)
            dx = their_dx if rest[0] else dx
            dw = their_dw if rest[1] else dw
        return (
            None if dx is None else laid_out(dx, is_channels_last(x)),
            None if dw is None else laid_out(dw, is_channels_last(weight)),
        )


def _or_torch(asked: str) -> contextlib.AbstractContextManager[None]:
    """Leaves what a captured graph cannot hold undone, unless "sm90" was asked for."""
    if asked == "sm90":
        return contextlib.nullcontext()
    return contextlib.suppress(native.FirstCallInGraphError)


def _is_torchs(x: torch.Tensor, c: Call) -> bool:
    """Whether the call is torch's without a further look.

    Contiguous maps are: a copy into channels_last takes about as long as what is gained.
    """
    if c.backend == "auto":
        return not (x.is_cuda and c.channels_last)
    return c.backend == "torch"


def _is_sm90s(kind: str, asked: str, *problems: Problem) -> bool:
    """Whether the Hopper kernel does this part of a call, or of several in one launch.

    Where "sm90" was asked for, torch has the gradients that the kernel has not.
    """
    if asked == "auto":
        return dispatch.choose(kind, *problems) == "sm90"
    supported = native.weight_gradient_supported if kind == "weight_gradient" else native.supported
    return not any(map(supported, problems))
