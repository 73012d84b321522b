"""Autograd and the dispatcher operator of the lattice filter.

`filter_` composes two Functions -- features to weights, and the filter without normalisation --
with the normalisation in torch, so that autograd finds every path from the features: through the
splat, the slice and the norm.
"""

from __future__ import annotations

from typing import Any

import torch

from segkernels.ops._op import library, recording_within_an_operator
from segkernels.ops.permutohedral import lattice as native
from segkernels.ops.permutohedral.lattice import Lattice, Normalization
from segkernels.ops.permutohedral.reference import EPSILON


class Weights(torch.autograd.Function):
    """The barycentric weights of a built lattice as a function of its features (B, d, N)."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, lattice: Lattice) -> torch.Tensor:
        ctx.lattice = lattice
        ctx.save_for_backward(features)  # torch then tells when they were changed in place
        return lattice.weights.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        _ = ctx.saved_tensors
        return ctx.lattice.embed_grad(grad), None


class Apply(torch.autograd.Function):
    """K values or K^T values, (B, C, N), without normalisation."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, weights: torch.Tensor, lattice: Lattice, transpose: bool
    ) -> torch.Tensor:
        ctx.lattice, ctx.transpose = lattice, transpose
        ctx.save_for_backward(values)
        rows = native.pack(lattice.grid, values, "values")
        rows = lattice.slice(lattice.splat(rows, None, transpose), None)
        return native.unpack(lattice.grid, rows, torch.empty_like(values))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        lattice: Lattice = ctx.lattice
        (values,) = ctx.saved_tensors
        g = native.pack(lattice.grid, grad, "values")
        grad_vertices = lattice.splat(g, None, not ctx.transpose)
        grad_values = grad_weights = None
        if ctx.needs_input_grad[0]:
            rows = lattice.slice(grad_vertices, None)
            grad_values = native.unpack(lattice.grid, rows, torch.empty_like(values))
        if ctx.needs_input_grad[1]:
            x = native.pack(lattice.grid, values, "values")
            vertices = lattice.splat(x, None, ctx.transpose)
            grad_weights = lattice.weights_grad(x, g, vertices, grad_vertices)
        return grad_values, grad_weights, None, None


Scales = tuple[torch.Tensor | None, torch.Tensor | None]


def scales(lattice: Lattice, weights: torch.Tensor, normalization: Normalization) -> Scales:
    """The diagonals before and after K as (B, 1, N), differentiable with respect to the weights."""
    if normalization == "none":
        return None, None
    batch, _, points = lattice.features.shape
    ones = torch.ones(batch, 1, points, dtype=lattice.dtype, device=lattice.device)
    norm = Apply.apply(ones, weights, lattice, False) + EPSILON
    if normalization == "symmetric":
        root = norm.rsqrt()
        return root, root
    return (norm.reciprocal(), None) if normalization == "before" else (None, norm.reciprocal())


def apply_scaled(
    values: torch.Tensor,
    weights: torch.Tensor,
    lattice: Lattice,
    diagonals: Scales,
    transpose: bool,
) -> torch.Tensor:
    """The filter with its diagonals."""
    before, after = diagonals[::-1] if transpose else diagonals
    if before is not None:
        values = values * before
    values = Apply.apply(values, weights, lattice, transpose)
    return values if after is None else values * after


def filter_(
    values: torch.Tensor,
    features: torch.Tensor,
    lattice: Lattice,
    normalization: Normalization,
    transpose: bool,
) -> torch.Tensor:
    """The normalised filter of (B, C, N) values, differentiable; the features are the lattice's."""
    weights = Weights.apply(features, lattice)
    diagonals = scales(lattice, weights, normalization)
    return apply_scaled(values, weights, lattice, diagonals, transpose)


library.define(
    "permutohedral_filter(Tensor values, Tensor features, str normalization, bool transpose, "
    "SymInt[] spatial) -> Tensor"
)
library.define(
    "permutohedral_filter_backward(Tensor grad, Tensor values, Tensor features, "
    "str normalization, bool transpose, SymInt[] spatial) -> (Tensor, Tensor)"
)
_NAME = "segkernels::permutohedral_filter"


def _forward(
    values: torch.Tensor,
    features: torch.Tensor,
    normalization: Normalization,
    transpose: bool,
    spatial: list[int],
) -> torch.Tensor:
    features = features.contiguous()
    (lattice,) = native.build([features], spatial, op="permutohedral_filter")
    return lattice.filter(values, normalization, transpose)


def _backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    features: torch.Tensor,
    normalization: Normalization,
    transpose: bool,
    spatial: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    features = features.detach().contiguous().requires_grad_()
    values = values.detach().requires_grad_()
    (lattice,) = native.build([features.detach()], spatial, op="permutohedral_filter")
    with recording_within_an_operator():
        out = filter_(values, features, lattice, normalization, transpose)
    grad_values, grad_features = torch.autograd.grad(out, (values, features), grad)
    return grad_values, grad_features


for _device in ("CPU", "CUDA"):
    library.impl("permutohedral_filter", _forward, _device)
    library.impl("permutohedral_filter_backward", _backward, _device)


@torch.library.register_fake(_NAME)
def _fake(
    values: torch.Tensor, features: torch.Tensor, normalization: str, transpose: bool, spatial: Any
) -> torch.Tensor:
    return torch.empty_like(values)


@torch.library.register_fake(f"{_NAME}_backward")
def _fake_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    features: torch.Tensor,
    normalization: str,
    transpose: bool,
    spatial: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(values), torch.empty(features.shape, **_like(features))


def _like(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": tensor.dtype, "device": tensor.device}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    values, features, *ctx.rest = inputs
    ctx.save_for_backward(values, features)


def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    values, features = ctx.saved_tensors
    grads = torch.ops.segkernels.permutohedral_filter_backward(grad, values, features, *ctx.rest)
    return *grads, None, None, None


torch.library.register_autograd(_NAME, _autograd, setup_context=_setup)
