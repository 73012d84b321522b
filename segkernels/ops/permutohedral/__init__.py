"""Gaussian filtering in up to 16 dimensions on the permutohedral lattice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels.ops import _arguments, _dtypes
from segkernels.ops._operator import (
    check_not_traced,
    match_dtype_and_layout,
    needs_dispatcher,
    wants_grad,
)
from segkernels.ops._registry import Op, register
from segkernels.ops.permutohedral import native, operator
from segkernels.ops.permutohedral.native import (
    MAX_DIMS,
    NORMALIZATIONS,
    Lattice,
    Normalization,
)
from segkernels.ops.permutohedral.operator import Filter

register(
    Op(
        name="permutohedral",
        functions=("PermutohedralLattice", "permutohedral_filter"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        dtypes=_dtypes.names(),
        layouts=("contiguous", "channels_last", "strided"),
        deterministic=True,
        differentiable=("values", "features"),
        library_ops=(
            "segkernels::permutohedral_filter",
            "segkernels::permutohedral_filter_backward",
        ),
        note="half types are computed in float32; 1 to 16 features a point",
    )
)


class PermutohedralLattice:
    """The permutohedral lattice of a set of points, built once and used to filter many times.

    Filtering approximates `out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j` over all points j of an
    image, the point itself among them, in time linear in the number of points.

    Args:
        features: `(B, d, *spatial)`, or `(N, d)` for one set of points; floating point, 1 <= d <=
            16, each feature already divided by its standard deviation. float16 and bfloat16 are
            taken to float32.
        max_vertices: an upper bound for the number of occupied vertices of the whole batch. With
            it, and while a CUDA graph is captured, the build does not synchronise with a CUDA
            device; without it, it does so once. Too small a bound is an error (on CUDA: see
            `segkernels.check`; the points that found no place give NaN).

    Raises:
        ValueError: a wrong rank or number of features; on the CPU also features that are not
            finite, or so large that lattice coordinates leave their dtype's exact integers. On CUDA
            these are told by `segkernels.check`; the points in question give NaN and take no part.
        TypeError: features that are not floating point.

    Source: A. Adams, J. Baek, M. A. Davis: Fast High-Dimensional Filtering Using the Permutohedral
    Lattice, Computer Graphics Forum 29(2), 2010. The arithmetic follows the implementation of
    P. Kraehenbuehl and V. Koltun, so that results agree with pydensecrf's.
    """

    def __init__(self, features: torch.Tensor, *, max_vertices: int | None = None) -> None:
        flat, spatial = _features(features, "PermutohedralLattice")
        check_bound(max_vertices, "PermutohedralLattice")
        self.shape = features.shape
        self._flat = flat
        self._spatial = tuple(spatial)
        self._lattice: Lattice | None = None
        if flat.numel() > 0 and not needs_dispatcher(flat):
            (self._lattice,) = native.build(
                [flat.detach()], spatial, max_vertices=max_vertices, op="PermutohedralLattice"
            )

    @property
    def num_vertices(self) -> list[int]:
        """Occupied vertices of each image. Reading it synchronises with a CUDA device."""
        if self._flat.numel() == 0:
            return [0] * self._flat.shape[0]
        if self._lattice is None:
            raise RuntimeError(
                "PermutohedralLattice.num_vertices: the features have no values to build a lattice "
                f"from (device {self._flat.device}, or under torch.func or torch.compile)"
            )
        return self._lattice.num_vertices()

    def filter(
        self,
        values: torch.Tensor,
        normalization: Normalization = "after",
        transpose: bool = False,
    ) -> torch.Tensor:
        """Filter values that lie at the lattice's points.

        Args:
            values: `(B, C, *spatial)`, or `(N, C)`, floating point, any C, on the lattice's device.
                Computed in the lattice's dtype.
            normalization: with D = diag(K 1): "after" D^-1 K (a weighted average), "before"
                K D^-1, "symmetric" D^-1/2 K D^-1/2, "none" K.
            transpose: apply the transpose of that operator: the blurs in reverse order, the
                normalisation on the other side.

        Returns:
            A tensor of the shape, dtype and layout of `values`. Gradients reach values and features
            (the simplex of each point held fixed: the lattice is not continuous across simplices).

        Raises:
            ValueError: shapes or devices that disagree, an unknown normalization.
            TypeError: values that are not floating point.
        """
        what = "PermutohedralLattice.filter"
        _arguments.check_choice(normalization, "normalization", NORMALIZATIONS, what)
        flat = _values(values, self.shape, self._flat, what)
        if self._flat.numel() == 0 or flat.numel() == 0:
            return values.clone()
        record = Filter(normalization, transpose, self._spatial, self._lattice)
        return _shaped(operator.filter_(flat.to(self._flat.dtype), self._flat, record), values)


def permutohedral_filter(
    values: torch.Tensor,
    features: torch.Tensor,
    normalization: Normalization = "after",
    transpose: bool = False,
) -> torch.Tensor:
    """Gaussian filtering on the permutohedral lattice: `PermutohedralLattice` built for one call.

    Args:
        values: `(B, C, *spatial)`, or `(N, C)`; floating point, any C.
        features: `(B, d, *spatial)`, or `(N, d)`; 1 <= d <= 16, already divided by their standard
            deviations.
        normalization, transpose: as in `PermutohedralLattice.filter`.

    Returns:
        A tensor of the shape, dtype and layout of `values`; computed in float64 where either
        argument is float64, else in float32. Differentiable with respect to values and features,
        once.

    Raises:
        ValueError, TypeError: as `PermutohedralLattice`.
    """
    what = "permutohedral_filter"
    _arguments.check_choice(normalization, "normalization", NORMALIZATIONS, what)
    flat_features, spatial = _features(features, what)
    flat = _values(values, features.shape, flat_features, what)
    if flat.numel() == 0 or flat_features.numel() == 0:
        return values.clone()
    dtype = torch.promote_types(torch.promote_types(values.dtype, features.dtype), torch.float32)
    flat, flat_features = flat.to(dtype), flat_features.to(dtype)
    built = None
    if wants_grad(flat, flat_features) and not needs_dispatcher(flat, flat_features):
        # For the backward pass too.
        (built,) = native.build([flat_features.detach()], spatial, op=what)
    record = Filter(normalization, transpose, tuple(spatial), built)
    return _shaped(operator.filter_(flat, flat_features, record), values)


def _features(features: torch.Tensor, what: str) -> tuple[torch.Tensor, Sequence[int]]:
    """(B, d, N), contiguous, float32 or float64, and the sizes of the grid."""
    check_not_traced(what)
    _check_tensor(features, "features", what)
    if features.dim() < 2:
        raise ValueError(
            f"{what}: features must be (N, d) or (B, d, *spatial), "
            f"got shape {tuple(features.shape)}"
        )
    if not 1 <= features.shape[1] <= MAX_DIMS:
        raise ValueError(
            f"{what}: features must have 1 to {MAX_DIMS} channels in dimension 1, "
            f"got shape {tuple(features.shape)}"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    if features.dim() == 2:
        flat, spatial = features.T.unsqueeze(0), features.shape[:1]
    else:
        flat, spatial = features.flatten(2), features.shape[2:]
    return flat.to(dtype).resolve_neg().contiguous(), spatial


def _values(
    values: torch.Tensor, shape: Sequence[int], features: torch.Tensor, what: str
) -> torch.Tensor:
    """(B, C, N) values, a view where that can be."""
    _check_tensor(values, "values", what)
    _arguments.check_matches(values, "values", shape, "features", what)
    _arguments.check_same_device(values, "values", features.device, "the features are", what)
    return values.T.unsqueeze(0) if values.dim() == 2 else values.flatten(2)


def _shaped(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    out = out.squeeze(0).T if values.dim() == 2 else out.view(values.shape)
    return match_dtype_and_layout(out, values)


def _check_tensor(tensor: torch.Tensor, name: str, what: str) -> None:
    _arguments.check_tensor(tensor, name, what)
    _arguments.check_floating(tensor, name, what)
    _arguments.check_device(tensor)


def check_bound(max_vertices: int | None, what: str) -> None:
    """Refuse a `max_vertices` that is no positive int."""
    if max_vertices is not None and (
        isinstance(max_vertices, bool) or not isinstance(max_vertices, int) or max_vertices < 1
    ):
        raise ValueError(f"{what}: max_vertices must be a positive int, got {max_vertices!r}")
