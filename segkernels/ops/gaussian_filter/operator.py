"""The torch.library operators of the exact filter, and its derivatives.

The operator is the filter without normalisation. `filter_` composes it with the normalisation in
torch operators, so that autograd differentiates the sums of weights too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from segkernels.ops._operator import Operator, wants_grad
from segkernels.ops.gaussian_filter.plan import Plan, Precision

MIN_WEIGHT_SUM = 1e-30  # where a sum of weights is below this, the result is 0


class Filter(NamedTuple):
    """Arguments of the filter other than tensors.

    Attributes:
        precision: as in `segkernels.gaussian_filter`.
        plan: the plan of the features; None: the forward and the backward each make it.
    """

    precision: Precision
    plan: Plan | None = None

    def plan_of(self, features: torch.Tensor, query_features: torch.Tensor | None) -> Plan:
        """Return the plan of these points, making it if necessary."""
        if self.plan is not None:
            return self.plan
        return Plan(features, query_features, self.precision, "gaussian_filter")

    def transposed(self) -> Filter:
        """Return the filter from the queries to the keys."""
        return self if self.plan is None else self._replace(plan=self.plan.transposed())


class BackwardArgs(NamedTuple):
    """Arguments of the backward operator: which gradients to compute, and of which filter.

    Attributes:
        needs: whether to compute the gradients of values, features and query features.
        filter: the filter.
    """

    needs: tuple[bool, ...]
    filter: Filter


def _forward(
    values: torch.Tensor, features: torch.Tensor, query_features: torch.Tensor | None, f: Filter
) -> torch.Tensor:
    return f.plan_of(features, query_features).apply(values)


def _fake(
    values: torch.Tensor, features: torch.Tensor, query_features: torch.Tensor | None, f: Filter
) -> torch.Tensor:
    points = features if query_features is None else query_features
    return values.new_empty(*values.shape[:2], points.shape[2])


def _backward(ctx: Any, grad: torch.Tensor) -> list[torch.Tensor | None]:
    needs = ctx.needs_input_grad[:3]
    grads = apply_backward(grad, *ctx.saved_tensors, BackwardArgs(tuple(needs), ctx.record))
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


def _jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
    d_values, *d_features = tangents
    if d_values is None or any(d is not None for d in d_features):
        raise NotImplementedError(
            "gaussian_filter: forward-mode differentiation with respect to features is not "
            "implemented; use reverse mode"
        )
    out: torch.Tensor = apply(d_values, *ctx.saved_tensors[1:], ctx.record)
    return out


def _gradients(
    grad: torch.Tensor,
    values: torch.Tensor,
    features: torch.Tensor,
    query_features: torch.Tensor | None,
    args: BackwardArgs,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    of_values, of_features, of_queries = args.needs
    plan = args.filter.plan_of(features, query_features)
    transposed = plan if plan.same_points else plan.transposed()
    d_values = transposed.apply(grad).contiguous() if of_values else None
    d_features = d_queries = None
    if plan.same_points:
        # Each point is a query and a key: both gradients in one pass, over 2 C channels.
        if of_features:
            both = torch.cat([grad, values], dim=1), torch.cat([values, grad], dim=1)
            d_features = plan.query_gradient(*both).contiguous()
    else:
        if of_features:
            d_features = transposed.query_gradient(values, grad).contiguous()
        if of_queries:
            d_queries = plan.query_gradient(grad, values).contiguous()
    return d_values, d_features, d_queries


def _gradients_fake(grad: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor | None, ...]:
    *tensors, args = inputs
    pairs = zip(tensors, args.needs, strict=True)
    return tuple(t.new_empty(t.shape) if needed else None for t, needed in pairs)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "gaussian_filter: second derivatives are not implemented; it can be differentiated once"
    )


_TENSORS = "Tensor values, Tensor features, Tensor? query_features"
apply: Operator = Operator(
    "gaussian_filter",
    _TENSORS,
    Filter,
    kernel=_forward,
    fake=_fake,
    save=lambda *args: args[:3],
    backward=_backward,
    jvp=_jvp,
)
apply_backward: Operator = Operator(
    "gaussian_filter_backward",
    f"Tensor grad, {_TENSORS}",
    BackwardArgs,
    returns="(Tensor, Tensor, Tensor)",
    kernel=_gradients,
    fake=_gradients_fake,
    differentiable=3,
    backward=_no_second_derivative,
)


def filter_(
    values: torch.Tensor,
    features: torch.Tensor,
    query_features: torch.Tensor | None,
    f: Filter,
    normalization: str,
) -> torch.Tensor:
    """Filter (B, C, N) values at (B, d, N) features, with normalisation; differentiable.

    `query_features` is (B, d, M) or None, `normalization` as in `segkernels.gaussian_filter`.
    """

    def multiply(v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = apply(v, features, query_features, f)
        return out

    if normalization == "none":
        return multiply(values)
    if normalization == "after":
        constant = not wants_grad(values, features, query_features)
        if constant and f.plan is not None and f.plan.is_native:
            return f.plan.apply_native(values, MIN_WEIGHT_SUM)
        both = multiply(_with_ones(values))
        return _divide(both[:, :-1], both[:, -1:])
    sums = _column_sums(features, query_features, f)
    if normalization == "before":
        return multiply(_divide(values, sums))
    values = _divide(values, sums, root=True)
    if query_features is None:
        return _divide(multiply(values), sums, root=True)
    both = multiply(_with_ones(values))
    return _divide(both[:, :-1], both[:, -1:], root=True)


def _with_ones(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, torch.ones_like(values[:, :1])], dim=1)


def _divide(x: torch.Tensor, sums: torch.Tensor, root: bool = False) -> torch.Tensor:
    """Divide by sums of weights, or by their roots; 0 where a sum is near 0.

    In float64, because powers of 1 / sum in the gradient overflow float32.
    """
    sums = sums.double()
    sums = sums.masked_fill(sums < MIN_WEIGHT_SUM, float("inf"))
    return (x / (sums.sqrt() if root else sums)).to(x.dtype)


def _column_sums(
    features: torch.Tensor, query_features: torch.Tensor | None, f: Filter
) -> torch.Tensor:
    """Sum of each key's weights over the queries: (B, 1, N), differentiable."""
    queries = features if query_features is None else query_features
    ones = torch.ones_like(queries[:, :1])
    if query_features is None:
        out: torch.Tensor = apply(ones, features, None, f)
    else:
        out = apply(ones, query_features, features, f.transposed())
    return out
