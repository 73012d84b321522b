"""Exact Gaussian filtering in plain torch, as the reference for tests.

It computes the full matrix of weights. Differentiable by autograd, any number of times.
"""

from __future__ import annotations

import torch

MIN_WEIGHT_SUM = 1e-30


def kernel(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """K_ij = exp(-|q_i - f_j|^2 / 2) for (..., d, M) and (..., d, N): (..., M, N)."""
    difference = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    return (difference.square().sum(dim=-3) * -0.5).exp()


def divisor(sums: torch.Tensor) -> torch.Tensor:
    """Replace sums near 0 by infinity, so that dividing by them gives 0."""
    return sums.masked_fill(sums < MIN_WEIGHT_SUM, float("inf"))


def normalized(weights: torch.Tensor, normalization: str) -> torch.Tensor:
    """Normalise a matrix of weights: rows are queries, columns are keys."""
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
    """Same as `segkernels.gaussian_filter`; `precision` is ignored."""
    queries = features if query_features is None else query_features
    if values.dim() == 2:
        return normalized(kernel(queries.T, features.T), normalization) @ values
    weights = normalized(kernel(queries.flatten(2), features.flatten(2)), normalization)
    out = values.flatten(2) @ weights.transpose(1, 2)
    return out.view(*values.shape[:2], *queries.shape[2:])


class ReferenceKernel:
    """Exact weights between points (N, d), with the interface of `ReferenceLattice`."""

    def __init__(self, features: torch.Tensor) -> None:
        self.weights = kernel(features.T, features.T)

    def filter(self, values: torch.Tensor, normalization: str = "after") -> torch.Tensor:
        """Same as `ReferenceLattice.filter`, without `transpose`: (N, C) -> (N, C)."""
        return normalized(self.weights, normalization) @ values
