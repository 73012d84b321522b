"""Exact Gaussian filtering in up to 16 dimensions."""

from __future__ import annotations

from typing import Any

import torch

from segkernels import _native
from segkernels.ops import _arguments, _dtypes
from segkernels.ops._operator import match_dtype_and_layout, needs_dispatcher
from segkernels.ops._registry import Op, register
from segkernels.ops.gaussian_filter import operator
from segkernels.ops.gaussian_filter.operator import Kernel
from segkernels.ops.gaussian_filter.plan import PRECISIONS, Plan, Precision
from segkernels.ops.permutohedral.native import MAX_DIMS, NORMALIZATIONS, Normalization

_OP = "gaussian_filter"

register(
    Op(
        name="gaussian_filter",
        functions=("gaussian_filter",),
        backends=(("cpu", "c++ simd"), ("cuda", "triton")),
        dtypes=_dtypes.names(),
        layouts=("contiguous", "channels_last", "strided"),
        deterministic=True,
        differentiable=("values", "features", "query_features"),
        library_ops=("segkernels::gaussian_filter", "segkernels::gaussian_filter_backward"),
        note="half types are computed in float32; 1 to 16 features a point",
    )
)

_MOST_IMAGES = 65_535  # of a launch: an axis of CUDA's grid


def gaussian_filter(
    values: torch.Tensor,
    features: torch.Tensor,
    *,
    query_features: torch.Tensor | None = None,
    normalization: Normalization = "after",
    precision: Precision = "default",
) -> torch.Tensor:
    """Exact Gaussian filtering: `out_i = sum_j exp(-|q_i - f_j|^2 / 2) v_j`, in memory O(N).

    What `permutohedral_filter` approximates in time linear in N, this computes in time N * M. Pairs
    of tiles of points between which no weight is left in the dtype are skipped.

    Args:
        values: `(B, C, *spatial)`, or `(N, C)`; floating point, any C.
        features: `(B, d, *spatial)`, or `(N, d)`; 1 <= d <= 16, floating point, each feature
            already divided by its standard deviation.
        query_features: `(B, d, *query_spatial)`, or `(M, d)`: the points to filter at; None: at the
            points themselves.
        normalization: with K the weights, rows for the queries: "after" divides by the sums of its
            rows (a weighted average), "before" by those of its columns (each value is handed out
            whole), "symmetric" by the square roots of both, "none" by nothing. A sum below 1e-30,
            as a query out of reach of all points has, gives 0.
        precision: on CUDA "default" multiplies weights and values as float16 and sums in float32:
            within 1e-3 of the sum of |weight * value|, weights below 2^-29 less exactly; "high"
            within 4e-6 of it. On the CPU, and for float64, both are the dtype's own precision.

    Returns:
        `(B, C, *query_spatial)` or `(M, C)`, else `values`' own shape and layout; of the dtype of
        `values`. Computed in float64 where an argument is float64, else in float32. Differentiable
        with respect to values, features and query_features, once.

        The same call gives the same bits. Weights between a point and tiles beyond the reach of its
        dtype count as 0: without `query_features` what is left out is less than half a unit in the
        last place of a point's own weight of 1, with it less than the smallest normal number. A NaN
        or infinity in a channel of an image makes that channel of that image NaN.

    Raises:
        ValueError: a wrong rank or number of features, shapes or devices that disagree, an unknown
            normalization or precision; on the CPU also features that are not finite. On CUDA
            `segkernels.check` tells of these; the points in question give NaN and take no part.
        TypeError: arguments that are not floating-point tensors.
        RuntimeError: when differentiated twice.

    Source: P. Kraehenbuehl, V. Koltun: Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials, NIPS 2011, equation 3; the sum itself, as in attention without a softmax.
    """
    _arguments.check_choice(normalization, "normalization", NORMALIZATIONS, _OP)
    _arguments.check_choice(precision, "precision", PRECISIONS, _OP)
    given = [values, features] if query_features is None else [values, features, query_features]
    for tensor, name in zip(given, ("values", "features", "query_features"), strict=False):
        _check_tensor(tensor, name)
    queries = _check_shapes(values, features, query_features)
    spatial = queries.shape[:1] if values.dim() == 2 else queries.shape[2:]
    shape = (*spatial, values.shape[1]) if values.dim() == 2 else (*values.shape[:2], *spatial)
    if values.numel() == 0 or queries.numel() == 0:
        return values.new_zeros(shape)

    if _native.on_cuda(values.device) and values.dim() > 2 and values.shape[0] > _MOST_IMAGES:
        how: Any = {"normalization": normalization, "precision": precision}
        parts = zip(*(tensor.split(_MOST_IMAGES) for tensor in given), strict=True)
        return torch.cat(
            [gaussian_filter(*p[:2], query_features=p[2] if p[2:] else None, **how) for p in parts]
        )
    dtype = torch.float32
    for tensor in given:
        dtype = torch.promote_types(dtype, tensor.dtype)
    v, f = _flat(values, dtype), _flat(features, dtype)
    q = None if query_features is None else _flat(query_features, dtype)
    plan = None
    if not needs_dispatcher(v, f, q):  # for the sums of weights and the backward pass too
        plan = Plan(f.detach(), None if q is None else q.detach(), precision, _OP)
    out = operator.filter_(v, f, q, Kernel(precision, plan), normalization)
    out = out.squeeze(0).T if values.dim() == 2 else out.view(shape)
    return (
        match_dtype_and_layout(out, values) if out.shape == values.shape else out.to(values.dtype)
    )


def _flat(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, C, N)."""
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
    """The points to filter at."""
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
            f"{_OP}: query_features must be {kind} with the batch and the d of the features "
            f"{tuple(features.shape)}, got shape {tuple(queries.shape)}"
        )
    _arguments.check_same_device(features, "features", values.device, "the values are", _OP)
    _arguments.check_same_device(queries, "query_features", values.device, "the values are", _OP)
    return queries
