"""Plan: the exact filter between two sets of points, on the implementation for their device.

A plan holds the sorted points and the distance beyond which weights are negligible. It can be used
for several filters and their gradients.
"""

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
    """Return the squared distance beyond which weights are negligible in `dtype`.

    Args:
        dtype: dtype of the weights.
        keys: number of keys.
        own: whether the queries are the keys. If so, every sum contains the point's own weight of
            1, and all keys beyond this distance together add less than half a unit in its last
            place. If not, every weight of a query may be small, and weights beyond this distance
            are below the smallest normal number.
    """
    info = torch.finfo(dtype)
    if own:
        return 2 * (math.log(2 * keys) - math.log(info.eps))
    return -2 * math.log(info.tiny)


class Plan:
    """The filter from keys to queries.

    Args:
        features: (B, d, N) features of the keys, float32 or float64.
        query_features: (B, d, M) features of the queries; None: the queries are the keys.
        precision: as in `segkernels.gaussian_filter`.
        op: name of the public function, for the error message about features that are not finite.
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
                words[:1] = torch.maximum(words[:1], points.invalid.any().to(words.dtype))

    @property
    def same_points(self) -> bool:
        """Whether the queries are the keys."""
        return self.queries is self.keys

    def transposed(self) -> Plan:
        """Return the filter from the queries to the keys."""
        other = object.__new__(Plan)
        other.keys, other.queries = self.queries, self.keys
        other.precision, other.reach = self.precision, self.reach
        return other

    @property
    def is_native(self) -> bool:
        """Whether native code computes the filter, on the CPU."""
        return not _native.on_cuda(self.keys.features.device)

    def _use_triton(self) -> bool:
        return not self.is_native and self.keys.features.dtype == torch.float32

    def share(self, size: int = TILE) -> float:
        """Fraction of the pairs of `size` queries and `TILE` keys that are not skipped."""
        kept = [
            near.double().mean()
            for image in range(self.keys.features.shape[0])
            for near in blocked.tiles_within(self.queries, self.keys, self.reach, size, image)
        ]
        return float(torch.stack(kept).mean())

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Multiply values by K: (B, C, N) to (B, C, M)."""
        points = self.queries, self.keys
        if self.is_native:
            return self.apply_native(values)
        values, not_finite = _zero_not_finite(values, self.keys)
        rows = self.keys.rows(values)
        if self._use_triton():
            from segkernels.ops.gaussian_filter import triton_kernels

            high = self.precision == "high"
            out = triton_kernels.apply(*points, rows, self.reach, high).transpose(1, 2)
        else:
            out = blocked.apply(*points, rows, self.reach).transpose(1, 2)
        return self._in_order(out, not_finite)

    def apply_native(self, values: torch.Tensor, least_sum: float | None = None) -> torch.Tensor:
        """As `apply`, on the CPU.

        With `least_sum`, the result is divided by the sums of the weights, and 0 where they are
        less.
        """
        rows, not_finite = native.sort_values(self.keys, values, True, least_sum)
        out = native.apply(self.queries, self.keys, rows, self.reach)
        return native.unsort_values(self.queries, out, not_finite, least_sum)

    def query_gradient(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Gradient of sum_ij k_ij <a_i, b_j> with respect to the queries: (B, d, M).

        It is sum_j k_ij <a_i, b_j> (f_j - q_i).

        Args:
            a: (B, C, M).
            b: (B, C, N).
        """
        points = self.queries, self.keys
        if self.is_native:
            a, not_finite_a = native.sort_values(self.queries, a, False)
            b, not_finite_b = native.sort_values(self.keys, b, True)
            out = native.query_gradient(*points, a, b, self.reach)
            not_finite = (not_finite_a | not_finite_b).any(dim=1, keepdim=True)
            return native.unsort_values(self.queries, out, not_finite)
        a, not_finite_a = _zero_not_finite(a, self.queries)
        b, not_finite_b = _zero_not_finite(b, self.keys)
        not_finite = (not_finite_a | not_finite_b).any(dim=1, keepdim=True)
        a_rows, b_rows = self.queries.rows(a), self.keys.rows(b)
        if self._use_triton():
            from segkernels.ops.gaussian_filter import triton_kernels

            high = self.precision == "high"
            out = triton_kernels.query_gradient(*points, a_rows, b_rows, self.reach, high)
        else:
            out = blocked.query_gradient(*points, a_rows, b_rows, self.reach)
        return self._in_order(out.transpose(1, 2), not_finite)

    def _in_order(self, out: torch.Tensor, not_finite: torch.Tensor) -> torch.Tensor:
        """Restore the order of the queries; fill `not_finite` and invalid queries with NaN."""
        invalid = not_finite | self.queries.invalid.unsqueeze(1)
        return self.queries.unsorted(out).masked_fill_(invalid, float("nan"))


def _zero_not_finite(values: torch.Tensor, points: Points) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace by 0 the values at invalid points and in channels with a value that is not finite.

    All weights are above 0, so one NaN or infinity reaches every point, but the kernels skip
    weights. Returns the values and a mask (B, C, 1) of the channels that are not finite.
    """
    values = values.masked_fill(points.invalid.unsqueeze(1), 0)
    not_finite = ~torch.isfinite(values).all(dim=2, keepdim=True)
    return values.masked_fill(not_finite, 0), not_finite
