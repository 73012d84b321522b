"""What filters between two sets of points share: the points in order, and how far weights reach."""

from __future__ import annotations

import math
from typing import Literal

import torch

from segkernels import _native, _status
from segkernels.ops.gaussian_filter import blocked, native
from segkernels.ops.gaussian_filter.points import TILE, Points

Precision = Literal["default", "high"]
PRECISIONS = ("default", "high")


def reach(dtype: torch.dtype, keys: int, own: bool) -> float:
    """The squared distance beyond which a weight is nothing in `dtype`.

    With `own`, a point's own weight of 1 is in every sum, and what N points beyond this add is less
    than half a unit in its last place. Without it any weight may be the largest: then the distance
    is that at which weights fall below the smallest normal number.
    """
    numbers = torch.finfo(dtype)
    if own:
        return 2 * (math.log(2 * keys) - math.log(numbers.eps))
    return -2 * math.log(numbers.tiny)


class Plan:
    """The filter from keys (B, d, N) to queries (B, d, M), or from points to themselves.

    Args:
        features: of the keys, float32 or float64.
        query_features: of the queries; None: the keys themselves.
        precision: as in `segkernels.gaussian_filter`.
        op: the public function, for what is said of features that are not finite.
    """

    def __init__(
        self,
        features: torch.Tensor,
        query_features: torch.Tensor | None,
        precision: Precision,
        op: str,
    ) -> None:
        self.keys = Points(features)
        self.queries = self.keys if query_features is None else Points(query_features)
        self.precision: Precision = precision
        self.reach = reach(features.dtype, features.shape[2], query_features is None)
        with _status.watch(features, op, features.dtype) as words:
            for points in {self.keys, self.queries}:
                words[:1] = torch.maximum(words[:1], points.out.any().to(words.dtype))

    @property
    def to_itself(self) -> bool:
        """Whether the queries are the keys."""
        return self.queries is self.keys

    def transposed(self) -> Plan:
        """The filter from the queries to the keys."""
        other = object.__new__(Plan)
        other.keys, other.queries = self.queries, self.keys
        other.precision, other.reach = self.precision, self.reach
        return other

    def _on_cuda(self) -> bool:
        return _native.on_cuda(self.keys.features.device)

    def _triton(self) -> bool:
        return self._on_cuda() and self.keys.features.dtype == torch.float32

    def share(self, size: int = TILE) -> float:
        """The share of pairs of `size` queries and `TILE` keys that are not skipped."""
        found = [
            near.double().mean()
            for image in range(self.keys.features.shape[0])
            for near in blocked.tiles_within(self.queries, self.keys, self.reach, size, image)
        ]
        return float(torch.stack(found).mean())

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """K values, (B, C, N) to (B, C, M)."""
        values, bad = _finite(values, self.keys)
        points, rows = (self.queries, self.keys), self.keys.rows(values)
        if not self._on_cuda():
            found = native.apply(*points, rows, self.reach)
        elif self._triton():
            from segkernels.ops.gaussian_filter import triton_kernels

            high = self.precision == "high"
            found = triton_kernels.apply(*points, rows, self.reach, high).transpose(1, 2)
        else:
            found = blocked.apply(*points, rows, self.reach).transpose(1, 2)
        out = self.queries.unsorted(found)
        return out.masked_fill_(bad | self.queries.out.unsqueeze(1), float("nan"))

    def pull(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """sum_j k_ij <a_i, b_j> (f_j - q_i), (B, C, M) and (B, C, N) to (B, d, M)."""
        a, bad_a = _finite(a, self.queries)
        b, bad_b = _finite(b, self.keys)
        bad = bad_a.any(dim=1, keepdim=True) | bad_b.any(dim=1, keepdim=True)
        points = self.queries, self.keys
        if not self._on_cuda():
            pair = self.queries.sorted(a), self.keys.rows(b)
            out = self.queries.unsorted(native.pull(*points, *pair, self.reach))
            return out.masked_fill_(bad | self.queries.out.unsqueeze(1), float("nan"))
        pair = self.queries.rows(a), self.keys.rows(b)
        if self._triton():
            from segkernels.ops.gaussian_filter import triton_kernels

            found = triton_kernels.pull(*points, *pair, self.reach, self.precision == "high")
        else:
            found = blocked.pull(*points, *pair, self.reach)
        out = self.queries.unsorted(found.transpose(1, 2))
        return out.masked_fill_(bad | self.queries.out.unsqueeze(1), float("nan"))


def _finite(values: torch.Tensor, points: Points) -> tuple[torch.Tensor, torch.Tensor]:
    """Values that are 0 where they must not count, and (B, C, 1): channels that are not finite.

    Every weight is above 0, so that one NaN or infinity reaches every point; the kernels, which
    skip most weights, need not see it.
    """
    values = values.masked_fill(points.out.unsqueeze(1), 0)
    bad = ~torch.isfinite(values).all(dim=2, keepdim=True)
    return values.masked_fill(bad, 0), bad
