"""The torch.library operators of the lattice filter, and its derivatives.

The gradient with respect to the features holds the simplex of each point fixed. It goes through the
barycentric weights of the splat, of the slice and of the normalisation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from segkernels.ops._operator import Operator
from segkernels.ops.permutohedral import native
from segkernels.ops.permutohedral.native import Lattice, Normalization


class Filter(NamedTuple):
    """Arguments of the filter other than tensors.

    Attributes:
        normalization, transpose: as in `segkernels.PermutohedralLattice.filter`.
        spatial: sizes of the grid of points.
        lattice: the features' lattice; None: the forward and the backward each build it.
    """

    normalization: Normalization
    transpose: bool
    spatial: tuple[int, ...]
    lattice: Lattice | None = None

    def lattice_of(self, features: torch.Tensor) -> Lattice:
        """Return the lattice of `features`, building it if necessary."""
        if self.lattice is not None:
            return self.lattice
        plain = features.detach().contiguous()
        return native.build([plain], self.spatial, op="permutohedral_filter")[0]


class BackwardArgs(NamedTuple):
    """Arguments of the backward operator: which gradients to compute, and of which filter."""

    of_values: bool
    of_features: bool
    filter: Filter


def _forward(values: torch.Tensor, features: torch.Tensor, f: Filter) -> torch.Tensor:
    return f.lattice_of(features).filter(values, f.normalization, f.transpose)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, Any]:
    of_values, of_features = ctx.needs_input_grad[:2]
    record = BackwardArgs(of_values, of_features, ctx.record)
    d_values, d_features = filter_backward(grad, *ctx.saved_tensors, record)
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
    grad: torch.Tensor, values: torch.Tensor, features: torch.Tensor, args: BackwardArgs
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    f = args.filter
    lattice = f.lattice_of(features)
    return lattice.filter_grad(grad, values, f.normalization, f.transpose, args[:2])


def _gradients_fake(
    grad: torch.Tensor, values: torch.Tensor, features: torch.Tensor, args: BackwardArgs
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (
        torch.empty_like(values) if args.of_values else None,
        features.new_empty(features.shape) if args.of_features else None,
    )


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "permutohedral_filter: second derivatives are not implemented; it can be differentiated "
        "once"
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
    BackwardArgs,
    returns="(Tensor, Tensor)",
    kernel=_gradients,
    fake=_gradients_fake,
    differentiable=2,
    backward=_no_second_derivative,
)
