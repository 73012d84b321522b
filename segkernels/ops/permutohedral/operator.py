"""The derivatives of the lattice filter.

The gradient of the features holds the simplex of each point fixed, and reaches them through the
splat, the slice and the norm.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from segkernels.ops._operator import Operator
from segkernels.ops.permutohedral import native
from segkernels.ops.permutohedral.native import Lattice, Normalization


class Filter(NamedTuple):
    """How to filter.

    Attributes:
        normalization, transpose: as in `segkernels.PermutohedralLattice.filter`.
        spatial: sizes of the grid that the points lie on.
        lattice: of the features, where it was built before; else each pass builds it.
    """

    normalization: Normalization
    transpose: bool
    spatial: tuple[int, ...]
    lattice: Lattice | None = None

    def on(self, features: torch.Tensor) -> Lattice:
        """The lattice."""
        if self.lattice is not None:
            return self.lattice
        plain = features.detach().contiguous()
        return native.build([plain], self.spatial, op="permutohedral_filter")[0]


class Wanted(NamedTuple):
    """Which gradients of a filter's values and features are wanted."""

    of_values: bool
    of_features: bool
    filter: Filter


def _forward(values: torch.Tensor, features: torch.Tensor, f: Filter) -> torch.Tensor:
    return f.on(features).filter(values, f.normalization, f.transpose)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, Any]:
    of_values, of_features = ctx.needs_input_grad[:2]
    wanted = Wanted(of_values, of_features, ctx.record)
    d_values, d_features = filter_backward(grad, *ctx.saved_tensors, wanted)
    return d_values if of_values else None, d_features if of_features else None


def _jvp(ctx: Any, d_values: torch.Tensor | None, d_features: torch.Tensor | None) -> torch.Tensor:
    if d_values is None or d_features is not None:
        raise NotImplementedError(
            "permutohedral_filter: forward-mode differentiation with respect to features is not "
            "implemented; use reverse mode"
        )
    out: torch.Tensor = filter_(d_values, ctx.saved_tensors[1], ctx.record)
    return out


def _gradients(
    grad: torch.Tensor, values: torch.Tensor, features: torch.Tensor, w: Wanted
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    f = w.filter
    return f.on(features).filter_grad(grad, values, f.normalization, f.transpose, w[:2])


def _gradients_fake(
    grad: torch.Tensor, values: torch.Tensor, features: torch.Tensor, w: Wanted
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (
        torch.empty_like(values) if w.of_values else None,
        features.new_empty(features.shape) if w.of_features else None,
    )


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "permutohedral_filter can be differentiated once: its gradient has no gradient"
    )


filter_: Operator = Operator(
    "permutohedral_filter",
    "Tensor values, Tensor features",
    Filter,
    kernel=_forward,
    fake=lambda values, features, f: torch.empty_like(values),
    save=lambda values, features, *_: (values, features),
    backward=_backward,
    jvp=_jvp,
)
filter_backward: Operator = Operator(
    "permutohedral_filter_backward",
    "Tensor grad, Tensor values, Tensor features",
    Wanted,
    returns="(Tensor, Tensor)",
    kernel=_gradients,
    fake=_gradients_fake,
    differentiable=2,
    backward=_no_second_derivative,
)
