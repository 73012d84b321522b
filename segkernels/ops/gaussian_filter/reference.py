"""Exact Gaussian filtering in plain torch: the oracle of the tests, and the formulas to read.

It holds the whole matrix of weights. Differentiable by autograd, twice.
"""

from __future__ import annotations

import torch

LEAST_SUM = 1e-30


def kernel(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """K_ij = exp(-|q_i - f_j|^2 / 2) for (..., d, M) and (..., d, N): (..., M, N)."""
    apart = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    return (apart.square().sum(dim=-3) * -0.5).exp()


def divisor(sums: torch.Tensor) -> torch.Tensor:
    """Sums of weights to divide by: where there is next to none, the result is 0."""
    return sums.masked_fill(sums < LEAST_SUM, float("inf"))


def normalized(weights: torch.Tensor, normalization: str) -> torch.Tensor:
    """The weights with their normalisation: rows are queries, columns are keys."""
    if normalization == "none":
        return weights
    rows = divisor(weights.sum(dim=-1, keepdim=True))
    columns = divisor(weights.sum(dim=-2, keepdim=True))
    if normalization == "symmetric":
        return weights * rows.rsqrt() * columns.rsqrt()
    return weights / (rows if normalization == "after" else columns)


def gaussian_filter(
    values: torch.Tensor,
    features: torch.Tensor,
    *,
    query_features: torch.Tensor | None = None,
    normalization: str = "after",
    precision: str = "default",
) -> torch.Tensor:
    """As `segkernels.gaussian_filter`."""
    queries = features if query_features is None else query_features
    if values.dim() == 2:
        return normalized(kernel(queries.T, features.T), normalization) @ values
    weights = normalized(kernel(queries.flatten(2), features.flatten(2)), normalization)
    out = values.flatten(2) @ weights.transpose(1, 2)
    return out.view(*values.shape[:2], *queries.shape[2:])


class ReferenceKernel:
    """The weights between points (N, d), in place of a `ReferenceLattice`."""

    def __init__(self, features: torch.Tensor) -> None:
        self.weights = kernel(features.T, features.T)

    def filter(self, values: torch.Tensor, normalization: str = "after") -> torch.Tensor:
        """As `ReferenceLattice.filter`, (N, C) -> (N, C)."""
        return normalized(self.weights, normalization) @ values
