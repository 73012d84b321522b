"""Gradients of the exact filter, and its dispatcher operators.

`filter_` composes one Function, the filter without normalisation, with the normalisation in torch,
so that autograd finds every path from the features.
"""

from __future__ import annotations

from typing import Any

import torch

from segkernels.ops._op import library, recording_within_an_operator
from segkernels.ops.gaussian_filter.plan import Plan, Precision
from segkernels.ops.gaussian_filter.reference import divisor
from segkernels.ops.permutohedral.lattice import Normalization

_ONCE = (
    "gaussian_filter: it can be differentiated once; second derivatives (create_graph=True and "
    "another backward) are not implemented"
)


class Apply(torch.autograd.Function):
    """K values without normalisation: (values, features, query_features or None, plan)."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        features: torch.Tensor,
        query_features: torch.Tensor | None,
        plan: Plan,
    ) -> torch.Tensor:
        ctx.plan = plan
        ctx.save_for_backward(values, features, query_features)
        return plan.apply(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return *ApplyBackward.apply(grad, *ctx.saved_tensors, ctx.plan, ctx.needs_input_grad), None


class ApplyBackward(torch.autograd.Function):
    """The gradients of `Apply`, which have none themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: torch.Tensor,
        values: torch.Tensor,
        features: torch.Tensor,
        query_features: torch.Tensor | None,
        plan: Plan,
        needs: tuple[bool, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        back = plan if plan.to_itself else plan.transposed()
        grad_values = back.apply(grad) if needs[0] else None
        grad_features = grad_queries = None
        if plan.to_itself:
            if needs[1]:
                both = torch.cat([grad, values], dim=1), torch.cat([values, grad], dim=1)
                grad_features = plan.pull(*both)
        else:
            grad_features = back.pull(values, grad) if needs[1] else None
            grad_queries = plan.pull(grad, values) if needs[2] else None
        return grad_values, grad_features, grad_queries

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        raise RuntimeError(_ONCE)


def filter_(
    values: torch.Tensor,
    features: torch.Tensor,
    query_features: torch.Tensor | None,
    plan: Plan,
    normalization: Normalization,
) -> torch.Tensor:
    """The normalised filter of (B, C, N) values at (B, d, N) features, differentiable."""

    def applied(v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = Apply.apply(v, features, query_features, plan)
        return out

    ones = torch.ones_like(values[:, :1])
    if normalization == "none":
        return applied(values)
    if normalization == "after":
        both = applied(torch.cat([values, ones], dim=1))
        return both[:, :-1] / divisor(both[:, -1:])
    sums = divisor(column_sums(features, query_features, plan))
    if normalization == "before":
        return applied(values / sums)
    values = values * sums.rsqrt()
    if plan.to_itself:
        return applied(values) * sums.rsqrt()
    both = applied(torch.cat([values, ones], dim=1))
    return both[:, :-1] * divisor(both[:, -1:]).rsqrt()


def column_sums(
    features: torch.Tensor, query_features: torch.Tensor | None, plan: Plan
) -> torch.Tensor:
    """What each key's weights sum to over the queries: (B, 1, N), differentiable."""
    queries = features if query_features is None else query_features
    ones = torch.ones_like(queries[:, :1])
    if query_features is None:
        out: torch.Tensor = Apply.apply(ones, features, None, plan)
    else:
        out = Apply.apply(ones, query_features, features, plan.transposed())
    return out


_ARGUMENTS = (
    "Tensor values, Tensor features, Tensor? query_features, str normalization, str precision"
)
library.define(f"gaussian_filter({_ARGUMENTS}) -> Tensor")
library.define(f"gaussian_filter_backward(Tensor grad, {_ARGUMENTS}) -> Tensor[]")
_NAME = "segkernels::gaussian_filter"


def _forward(
    values: torch.Tensor,
    features: torch.Tensor,
    query_features: torch.Tensor | None,
    normalization: Normalization,
    precision: Precision,
) -> torch.Tensor:
    plan = Plan(features, query_features, precision, "gaussian_filter")
    return filter_(values, features, query_features, plan, normalization)


def _backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    features: torch.Tensor,
    query_features: torch.Tensor | None,
    normalization: Normalization,
    precision: Precision,
) -> list[torch.Tensor]:
    given = [values, features] if query_features is None else [values, features, query_features]
    inputs = [t.detach().requires_grad_() for t in given]
    queries = inputs[2] if query_features is not None else None
    plan = Plan(features, query_features, precision, "gaussian_filter")
    with recording_within_an_operator():
        out = filter_(inputs[0], inputs[1], queries, plan, normalization)
    return [g.contiguous() for g in torch.autograd.grad(out, inputs, grad)]


for _device in ("CPU", "CUDA"):
    library.impl("gaussian_filter", _forward, _device)
    library.impl("gaussian_filter_backward", _backward, _device)


@torch.library.register_fake(_NAME)
def _fake(
    values: torch.Tensor, features: torch.Tensor, query_features: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    points = features if query_features is None else query_features
    return values.new_empty(*values.shape[:2], points.shape[2])


@torch.library.register_fake(f"{_NAME}_backward")
def _fake_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    features: torch.Tensor,
    query_features: torch.Tensor | None,
    *rest: Any,
) -> list[torch.Tensor]:
    given = [values, features] if query_features is None else [values, features, query_features]
    return [t.new_empty(t.shape) for t in given]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.normalization, ctx.precision = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    values, features, query_features = ctx.saved_tensors
    grads = torch.ops.segkernels.gaussian_filter_backward(
        grad, values, features, query_features, ctx.normalization, ctx.precision
    )
    return *grads, *[None] * (5 - len(grads))


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(_ONCE)


torch.library.register_autograd(_NAME, _autograd, setup_context=_setup)
torch.library.register_autograd(f"{_NAME}_backward", _refuse, setup_context=_no_setup)
