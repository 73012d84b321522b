"""The derivatives of the exact filter.

`filter_` composes one operator, the filter without normalisation, with the normalisation in torch,
so that autograd finds every path from the features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from segkernels.ops._operator import Operator
from segkernels.ops.gaussian_filter.plan import Plan, Precision

LEAST_SUM = 1e-30  # of weights to divide by: below it the result is 0


class Kernel(NamedTuple):
    """How to filter.

    Attributes:
        precision: as in `segkernels.gaussian_filter`.
        plan: of the features, where it was made before; else each pass makes it.
    """

    precision: Precision
    plan: Plan | None = None

    def on(self, features: torch.Tensor, query_features: torch.Tensor | None) -> Plan:
        """The plan."""
        if self.plan is not None:
            return self.plan
        return Plan(features, query_features, self.precision, "gaussian_filter")

    def transposed(self) -> Kernel:
        """From the queries to the keys."""
        return self if self.plan is None else self._replace(plan=self.plan.transposed())


class Wanted(NamedTuple):
    """Which gradients of values, features and query features are wanted."""

    needs: tuple[bool, ...]
    kernel: Kernel


def _forward(
    values: torch.Tensor, features: torch.Tensor, query_features: torch.Tensor | None, k: Kernel
) -> torch.Tensor:
    return k.on(features, query_features).apply(values)


def _fake(
    values: torch.Tensor, features: torch.Tensor, query_features: torch.Tensor | None, k: Kernel
) -> torch.Tensor:
    points = features if query_features is None else query_features
    return values.new_empty(*values.shape[:2], points.shape[2])


def _backward(ctx: Any, grad: torch.Tensor) -> list[torch.Tensor | None]:
    needs = ctx.needs_input_grad[:3]
    found = apply_backward(grad, *ctx.saved_tensors, Wanted(tuple(needs), ctx.record))
    return [g if needed else None for g, needed in zip(found, needs, strict=True)]


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
    w: Wanted,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    plan = w.kernel.on(features, query_features)
    back = plan if plan.to_itself else plan.transposed()
    to_values = back.apply(grad).contiguous() if w.needs[0] else None
    to_features = to_queries = None
    if plan.to_itself:
        if w.needs[1]:
            both = torch.cat([grad, values], dim=1), torch.cat([values, grad], dim=1)
            to_features = plan.pull(*both).contiguous()
    else:
        to_features = back.pull(values, grad).contiguous() if w.needs[1] else None
        to_queries = plan.pull(grad, values).contiguous() if w.needs[2] else None
    return to_values, to_features, to_queries


def _gradients_fake(grad: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, ...]:
    *tensors, w = rest
    pairs = zip(tensors, w.needs, strict=True)
    return tuple(t.new_empty(t.shape) if needed else None for t, needed in pairs)


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "gaussian_filter: it can be differentiated once; second derivatives (create_graph=True and "
        "another backward) are not implemented"
    )


_TENSORS = "Tensor values, Tensor features, Tensor? query_features"
apply: Operator = Operator(
    "gaussian_filter",
    _TENSORS,
    Kernel,
    kernel=_forward,
    fake=_fake,
    save=lambda *args: args[:3],
    backward=_backward,
    jvp=_jvp,
)
apply_backward: Operator = Operator(
    "gaussian_filter_backward",
    f"Tensor grad, {_TENSORS}",
    Wanted,
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
    kernel: Kernel,
    normalization: str,
) -> torch.Tensor:
    """The normalised filter of (B, C, N) values at (B, d, N) features, differentiable."""

    def applied(v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = apply(v, features, query_features, kernel)
        return out

    ones = torch.ones_like(values[:, :1])
    if normalization == "none":
        return applied(values)
    if normalization == "after":
        both = applied(torch.cat([values, ones], dim=1))
        return both[:, :-1] / _divisor(both[:, -1:])
    sums = _divisor(_column_sums(features, query_features, kernel))
    if normalization == "before":
        return applied(values / sums)
    values = values * sums.rsqrt()
    if query_features is None:
        return applied(values) * sums.rsqrt()
    both = applied(torch.cat([values, ones], dim=1))
    return both[:, :-1] * _divisor(both[:, -1:]).rsqrt()


def _divisor(sums: torch.Tensor) -> torch.Tensor:
    return sums.masked_fill(sums < LEAST_SUM, float("inf"))


def _column_sums(
    features: torch.Tensor, query_features: torch.Tensor | None, kernel: Kernel
) -> torch.Tensor:
    """What each key's weights sum to over the queries: (B, 1, N), differentiable."""
    queries = features if query_features is None else query_features
    ones = torch.ones_like(queries[:, :1])
    if query_features is None:
        out: torch.Tensor = apply(ones, features, None, kernel)
    else:
        out = apply(ones, query_features, features, kernel.transposed())
    return out
