"""The permutohedral lattice in plain torch, as the reference for tests.

Adams, Baek, Davis: Fast High-Dimensional Filtering Using the Permutohedral Lattice, 2010. Rounding
and ties follow Kraehenbuehl and Koltun's code. Differentiable by autograd with respect to values
and features, with the simplex of each point held fixed.
"""

from __future__ import annotations

import math

import torch

EPSILON = 1e-20


def elevate(features: torch.Tensor) -> torch.Tensor:
    """Map features (N, d) onto the plane of sum 0 in d + 1 dimensions, scaled for the blur."""
    d = features.shape[1]
    # In the order of operations of the native code: features on a grid have ties, in which the
    # last bit selects the simplex.
    scale = [1 / math.sqrt((i + 2) * (i + 1)) * (math.sqrt(2 / 3) * (d + 1)) for i in range(d)]
    c = features * features.new_tensor(scale)
    total = torch.zeros_like(c[:, 0])
    elevated = []
    for j in range(d, 0, -1):
        elevated.append(total - j * c[:, j - 1])
        total = total + c[:, j - 1]
    return torch.stack([total, *reversed(elevated)], dim=1)


def simplex(elevated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest remainder-0 vertex and the coordinates' ranks, both (N, d + 1) int64."""
    n = elevated.shape[1]
    rounded = torch.round(elevated * elevated.new_tensor(1 / n))
    offset = elevated - rounded * n
    # rank_j counts the coordinates with a larger offset; of two equal offsets the later coordinate
    # has the higher rank.
    larger = offset.unsqueeze(1) > offset.unsqueeze(2)
    equal = offset.unsqueeze(1) == offset.unsqueeze(2)
    earlier = torch.ones(n, n, dtype=torch.bool, device=offset.device).tril(-1)
    rank = (larger | (equal & earlier)).sum(dim=2) + rounded.sum(dim=1, keepdim=True).long()
    turn = n * ((rank < 0).long() - (rank >= n).long())
    return rounded.long() * n + turn, rank + turn


def barycentric(elevated: torch.Tensor, rem: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Barycentric weights of the simplex's vertices: (N, d + 1)."""
    n = elevated.shape[1]
    offset = (elevated - rem.to(elevated)) * elevated.new_tensor(1 / n)
    by_rank = torch.zeros_like(offset).scatter(1, rank, offset)
    descending = by_rank.flip(1)
    first = descending[:, :1] + (1 - descending[:, -1:])
    return torch.cat([first, descending[:, 1:] - descending[:, :-1]], dim=1)


class ReferenceLattice:
    """The lattice of features (N, d).

    Attributes:
        vertices: (M, d + 1) int64, the coordinates of the occupied vertices.
        entries: (N, d + 1) int64, the vertices of each point's simplex.
        weights: (N, d + 1), the barycentric weights; differentiable with respect to the features.
        neighbours: (d + 1, 2, M) int64, the vertices one step along each axis in both directions;
            M where there is no vertex.
    """

    def __init__(self, features: torch.Tensor) -> None:
        elevated = elevate(features)
        with torch.no_grad():
            rem, rank = simplex(elevated)
        self.weights = barycentric(elevated, rem, rank)
        n = elevated.shape[1]
        k = torch.arange(n, device=features.device).view(1, n, 1)
        keys = rem.unsqueeze(1) + k - n * (rank.unsqueeze(1) > n - 1 - k)
        self.vertices, inverse = torch.unique(keys.reshape(-1, n), dim=0, return_inverse=True)
        self.entries = inverse.view(-1, n)
        self.neighbours = torch.stack(
            [
                torch.stack([self._neighbour(axis, 1), self._neighbour(axis, -1)])
                for axis in range(n)
            ]
        )

    def _neighbour(self, axis: int, sign: int) -> torch.Tensor:
        m, n = self.vertices.shape
        step = torch.full((n,), sign, dtype=torch.int64, device=self.vertices.device)
        step[axis] = -sign * (n - 1)
        both = torch.cat([self.vertices, self.vertices + step])
        _, ids = torch.unique(both, dim=0, return_inverse=True)
        vertex_of = torch.full((2 * m,), m, dtype=torch.int64, device=self.vertices.device)
        vertex_of[ids[:m]] = torch.arange(m, device=self.vertices.device)
        return vertex_of[ids[m:]]

    def apply(self, values: torch.Tensor, transpose: bool = False) -> torch.Tensor:
        """Multiply values by K, or by its transpose, without normalisation: (N, C) -> (N, C)."""
        m, n = self.vertices.shape
        spread = (self.weights.unsqueeze(2) * values.unsqueeze(1)).reshape(-1, values.shape[1])
        rows = values.new_zeros(m, values.shape[1]).index_add(0, self.entries.reshape(-1), spread)
        zero = values.new_zeros(1, values.shape[1])
        for axis in reversed(range(n)) if transpose else range(n):
            padded = torch.cat([rows, zero])
            up, down = self.neighbours[axis]
            rows = rows + 0.5 * (padded[up] + padded[down])
        alpha = 1 / (1 + 2 ** (1 - n))
        return alpha * (self.weights.unsqueeze(2) * rows[self.entries]).sum(dim=1)

    def filter(
        self, values: torch.Tensor, normalization: str = "after", transpose: bool = False
    ) -> torch.Tensor:
        """Same as `segkernels.PermutohedralLattice.filter`, for (N, C) values."""
        before, after = self.scales(normalization)
        if transpose:
            before, after = after, before
        return after * self.apply(before * values, transpose)

    def scales(self, normalization: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the diagonals that multiply K from the right and from the left, each (N, 1)."""
        ones = torch.ones_like(self.weights[:, :1])
        if normalization == "none":
            return ones, ones
        norm = self.apply(ones) + EPSILON
        if normalization == "symmetric":
            return norm.rsqrt(), norm.rsqrt()
        return (ones, 1 / norm) if normalization == "after" else (1 / norm, ones)


def permutohedral_filter(
    values: torch.Tensor,
    features: torch.Tensor,
    normalization: str = "after",
    transpose: bool = False,
) -> torch.Tensor:
    """Same as `segkernels.permutohedral_filter`."""
    if values.dim() == 2:
        return ReferenceLattice(features).filter(values, normalization, transpose)
    flat = zip(values.flatten(2), features.flatten(2), strict=True)
    out = [ReferenceLattice(f.T).filter(v.T, normalization, transpose).T for v, f in flat]
    return torch.stack(out).view_as(values) if out else torch.empty_like(values)
