"""Which implementation computes a convolution, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from segkernels import _native
from segkernels.ops import _op
from segkernels.ops.dilated_conv2d import dispatch, sm90, torch_path, triton_path, tuning
from segkernels.ops.dilated_conv2d.call import Call, Epilogue, laid_out
from segkernels.ops.dilated_conv2d.geometry import Problem
from segkernels.ops.dilated_conv2d.plan import Config

BACKENDS = ("auto", "sm90", "triton", "torch")


def check(x: torch.Tensor, weight: torch.Tensor, c: Call) -> None:
    """Raise ValueError where the backend that was asked for cannot take this call."""
    if c.backend in ("auto", "torch"):
        return
    supported = sm90.supported if c.backend == "sm90" else triton_path.supported
    if why := supported(_problem(x, weight, c)):
        raise ValueError(f"dilated_conv2d: backend={c.backend!r} cannot take this call: {why}")


def forward(x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call) -> torch.Tensor:
    """The convolution and its epilogue of the 4-D `x`, in the layout that `c` asks for."""
    if c.backend == "torch" or (c.backend == "auto" and x.device.type != "cuda"):
        if not torch.is_grad_enabled():  # small convolutions notice what follows
            return laid_out(torch_path.forward(x, weight, e, c), c.channels_last)
        with torch.no_grad():
            return laid_out(torch_path.forward(x, weight, e, c), c.channels_last)
    with torch.no_grad():
        problem = _problem(x, weight, c)
        g = problem.geometry

        def ours(config: Config | None = None) -> torch.Tensor:
            return triton_path.forward(x, weight, g, e, config)

        def theirs() -> torch.Tensor:
            return torch_path.forward(x, weight, e, c)

        backend = _choose("forward", problem, c.backend, ours, theirs)
        if backend == "sm90":
            shift = e.folded_shift()
            out = sm90.forward(x, weight, g, e.scale, shift, e.residual, e.activation)
        else:
            out = ours() if backend == "triton" else theirs()
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
        into: their channels of a larger channels_last tensor; [N, branches * C_out, H, W].
        x: [N, C, H, W].
        weights: of the branches, at most 8; the Triton kernel takes those of one shape.
        e: of all branches' channels; no residual.
        calls: the branches', of one backend.

    Returns:
        Whether that was done; if not, nothing was.
    """
    if e.residual is not None:
        return False
    problems = [_problem(x, w, c) for w, c in zip(weights, calls, strict=True)]
    geometries = [p.geometry for p in problems]
    backend = calls[0].backend
    if backend == "sm90" and not any(map(sm90.supported, problems)):
        with torch.no_grad():
            shift = e.folded_shift()
            sm90.forward_branches(x, weights, geometries, e.scale, shift, None, e.activation, into)
        return True
    if len({w.shape for w in weights}) != 1:
        return False
    if backend == "auto":
        backend = dispatch.take("forward", *problems)
    if backend != "triton" or any(map(triton_path.supported, problems)):
        return False
    with torch.no_grad():
        triton_path.branches(x, weights, geometries, e, into=into)
    return True


def gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: tuple[bool, bool], c: Call
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the plain convolution, each laid out as what it is the gradient of.

    One that is not wanted is an empty tensor.
    """
    of_x, of_weight = mask
    dx, dw = grad.new_empty(0), grad.new_empty(0)
    with torch.no_grad():
        problem = _problem(x, weight, c)
        g = problem.geometry

        def their_dx() -> torch.Tensor:
            return torch_path.gradients(grad, x, weight, c, (True, False))[0]

        def their_dw() -> torch.Tensor:
            return torch_path.gradients(grad, x, weight, c, (False, True))[1]

        def our_dx(config: Config | None = None) -> torch.Tensor:
            return triton_path.input_gradient(grad, weight, g, config)

        def our_dw(config: Config | None = None) -> torch.Tensor:
            return triton_path.weight_gradient(grad, x, g, config)

        for_x = for_weight = ""
        if of_x:
            for_x = _choose("input_gradient", problem, c.backend, our_dx, their_dx)
        if of_weight:
            for_weight = _choose("weight_gradient", problem, c.backend, our_dw, their_dw)
        if for_x == for_weight == "torch":
            dx, dw = torch_path.gradients(grad, x, weight, c, mask)
        elif for_x:
            dx = {"torch": their_dx, "triton": our_dx}.get(
                for_x, lambda: sm90.input_gradient(grad, weight, g)
            )()
        if for_weight and not for_x == for_weight == "torch":
            dw = {"torch": their_dw, "triton": our_dw}.get(
                for_weight, lambda: sm90.weight_gradient(grad, x, g)
            )()
    if of_x:
        dx = laid_out(dx, _op.is_channels_last(x))
    if of_weight:
        dw = laid_out(dw, _op.is_channels_last(weight))
    return dx, dw


def _problem(x: torch.Tensor, weight: torch.Tensor, c: Call) -> Problem:
    """Of the tensors' own sizes, which are plain integers here."""
    return c.problem(x, weight)


def _choose(
    kind: str,
    problem: Problem,
    asked: str,
    ours: Callable[[Config], torch.Tensor],
    theirs: Callable[[], torch.Tensor],
) -> str:
    """The backend for a part of a call; searches where that is switched on."""
    if asked == "torch" or (asked == "auto" and problem.device.type != "cuda"):
        return "torch"
    if asked == "sm90":
        needed = sm90.weight_gradient_supported if kind == "weight_gradient" else sm90.supported
        if not needed(problem):
            return "sm90"
        # A gradient that the Hopper kernel has not: the portable one's, else torch's.
        return "torch" if triton_path.supported(problem) else "triton"
    if triton_path.supported(problem):
        return "torch"
    searched = _searched(kind, problem, ours, theirs)
    if asked == "triton":
        return "triton"
    if searched is not None:
        return "triton" if searched.beats_torch else "torch"
    return dispatch.take(kind, problem)


def _searched(
    kind: str,
    problem: Problem,
    ours: Callable[[Config], torch.Tensor],
    theirs: Callable[[], torch.Tensor],
) -> tuning.Found | None:
    """What a search found earlier, or now."""
    key = triton_path.key(kind, problem)
    found = tuning.known(key, problem.device)
    if found is not None or not tuning.enabled() or problem.device.type != "cuda":
        return found
    if _native.capturing(problem.device):
        return None
    return tuning.search(
        key, problem.device, triton_path.multiprocessors(problem.device), ours, theirs
    )
