"""Exact Gaussian filtering in up to 16 dimensions."""

from __future__ import annotations

from typing import Any

import torch

from segkernels import _native
from segkernels.ops import _arguments
from segkernels.ops._operator import (
    check_not_traced,
    describing_features,
    match_dtype_and_layout,
    needs_dispatcher,
    with_zero_gradients,
)
from segkernels.ops._registry import Op, register
from segkernels.ops.gaussian_filter import operator
from segkernels.ops.gaussian_filter.operator import Filter
from segkernels.ops.gaussian_filter.plan import PRECISIONS, Plan, Precision
from segkernels.ops.permutohedral.native import MAX_DIMS, NORMALIZATIONS, Normalization

_OP = "gaussian_filter"

register(
    Op(
        name="gaussian_filter",
        functions=("gaussian_filter",),
        backends=(("cpu", "c++ simd"), ("cuda", "triton")),
        layouts=("contiguous", "channels_last", "strided"),
        differentiable=("values", "features", "query_features"),
        library_ops=("segkernels::gaussian_filter", "segkernels::gaussian_filter_backward"),
        note="half precision is computed in float32; 1 to 16 features per point",
    )
)

_MAX_BATCH = 65_535  # of one launch: the limit of CUDA's grid along y and z


def gaussian_filter(
    values: torch.Tensor,
    features: torch.Tensor,
    *,
    query_features: torch.Tensor | None = None,
    normalization: Normalization = "after",
    precision: Precision = "default",
) -> torch.Tensor:
    """Exact Gaussian filtering: by default, the average of the values with Gaussian weights.

        out_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = exp(-|q_i - f_j|^2 / 2)

    `permutohedral_filter` approximates this in time linear in the number of points N. This function
    takes time proportional to N times the number of query points M, and memory linear in N + M.
    Pairs of tiles of points are skipped where all weights between them are negligible in the dtype.

    Args:
        values: `(B, C, *spatial)`, or `(N, C)`; floating point, any C.
        features: `(B, d, *spatial)`, or `(N, d)`; 1 <= d <= 16, floating point, each feature
            already divided by its standard deviation.
        query_features: `(B, d, *query_spatial)`, or `(M, d)`: features of the points at which the
            output is computed. None: the same points as `features`.
        normalization: with K the matrix of the weights, one row per query: "after" divides by the
            sums of its rows (a weighted average), "before" by the sums of its columns (the weights
            of each value sum to 1), "symmetric" by the square roots of both, "none" does not
            divide: `out_i = sum_j w_ij v_j`. Where a sum is below 1e-30, for example at a query far
            from all points, the result is 0.
        precision: "default" or "high". On CUDA "default" multiplies weights and values in float16
            and accumulates in float32; the error is at most 1e-3 of the sum of |weight * value|,
            larger for weights below 2^-29. "high" has an error of at most 4e-6 of that sum. On the
            CPU, and for float64, both compute in the dtype itself.

    Returns:
        `(B, C, *query_spatial)` or `(M, C)` with `query_features`, else a tensor with the shape and
        layout of `values`; in the dtype of `values`. Computed in float64 if an argument is float64,
        else in float32. Differentiable once, with respect to values, features and query_features.

        Deterministic. The weights of skipped tiles count as 0. Without `query_features` the skipped
        weights of a point sum to less than half a unit in the last place of 1, which is its own
        weight; with it each of them is below the smallest normal number. A NaN or infinity in a
        channel of an image makes that channel of that image NaN.

    Raises:
        ValueError: a wrong rank or number of features, shapes or devices that disagree, an unknown
            normalization or precision; on the CPU also features that are not finite. On CUDA
            `segkernels.check` reports such points; they return NaN and do not affect other points.
        TypeError: arguments that are not floating-point tensors.
        RuntimeError: a second derivative is requested.

    Source: P. Kraehenbuehl, V. Koltun: Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials, NIPS 2011, equation 3.
    """
    check_not_traced(_OP)
    _arguments.check_choice(normalization, "normalization", NORMALIZATIONS, _OP)
    _arguments.check_choice(precision, "precision", PRECISIONS, _OP)
    inputs = [values, features] if query_features is None else [values, features, query_features]
    for tensor, name in zip(inputs, ("values", "features", "query_features"), strict=False):
        _check_tensor(tensor, name)
    queries = _check_shapes(values, features, query_features)
    spatial = queries.shape[:1] if values.dim() == 2 else queries.shape[2:]
    shape = (*spatial, values.shape[1]) if values.dim() == 2 else (*values.shape[:2], *spatial)
    if values.numel() == 0 or queries.numel() == 0:
        return with_zero_gradients(values.new_zeros(shape), *inputs)

    if _native.on_cuda(values.device) and values.dim() > 2 and values.shape[0] > _MAX_BATCH:
        options: Any = {"normalization": normalization, "precision": precision}
        parts = zip(*(tensor.split(_MAX_BATCH) for tensor in inputs), strict=True)
        outs = [
            gaussian_filter(*p[:2], query_features=p[2] if p[2:] else None, **options)
            for p in parts
        ]
        return torch.cat(outs)
    dtype = torch.float32
    for tensor in inputs:
        dtype = torch.promote_types(dtype, tensor.dtype)
    v, f = _flatten(values, dtype), _flatten(features, dtype)
    q = None if query_features is None else _flatten(query_features, dtype)
    plan = None
    named = dict(zip(("features", "query_features"), inputs[1:], strict=False))
    with describing_features(named, dtype):
        if not needs_dispatcher(v, f, q):  # shared by the sums of weights and the backward pass
            plan = Plan(f.detach(), None if q is None else q.detach(), precision, _OP)
        out = operator.filter_(v, f, q, Filter(precision, plan), normalization)
    out = out.squeeze(0).T if values.dim() == 2 else out.view(shape)
    return (
        match_dtype_and_layout(out, values) if out.shape == values.shape else out.to(values.dtype)
    )


def _flatten(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of points as contiguous (B, C, N) in `dtype`."""
    tensor = tensor.T.unsqueeze(0) if tensor.dim() == 2 else tensor.flatten(2)
    return tensor.to(dtype).contiguous()


def _check_tensor(tensor: torch.Tensor, name: str) -> None:
    _arguments.check_tensor(tensor, name, _OP)
    _arguments.check_floating(tensor, name, _OP)
    if tensor.device.type != "cuda" or torch.version.hip is not None:
        _arguments.check_device(tensor)
    if tensor.dim() < 2:
        raise ValueError(
            f"{_OP}: {name} must be (N, n) or (B, n, *spatial), got shape {tuple(tensor.shape)}"
        )


def _check_shapes(
    values: torch.Tensor, features: torch.Tensor, query_features: torch.Tensor | None
) -> torch.Tensor:
    """Check the shapes and devices; return the features of the query points."""
    dims = features.shape[1]
    if not 1 <= dims <= MAX_DIMS:
        raise ValueError(
            f"{_OP}: features must have 1 to {MAX_DIMS} channels in dimension 1, "
            f"got shape {tuple(features.shape)}"
        )
    _arguments.check_matches(values, "values", features.shape, "features", _OP)
    queries = features if query_features is None else query_features
    same_kind = (queries.dim() == 2) == (features.dim() == 2)
    same_batch = features.dim() == 2 or queries.shape[0] == features.shape[0]
    if not same_kind or not same_batch or queries.shape[1] != dims:
        kind = "(M, d)" if features.dim() == 2 else "(B, d, *spatial)"
        raise ValueError(
            f"{_OP}: query_features must be {kind} with the batch size and d of the features "
            f"{tuple(features.shape)}, got shape {tuple(queries.shape)}"
        )
    _arguments.check_same_device(features, "features", values.device, "the values are", _OP)
    _arguments.check_same_device(queries, "query_features", values.device, "the values are", _OP)
    return queries
