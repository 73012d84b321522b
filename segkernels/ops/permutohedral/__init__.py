"""Gaussian filtering in up to 16 dimensions on the permutohedral lattice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from segkernels.ops import _arguments
from segkernels.ops._operator import (
    check_not_traced,
    describing_features,
    match_dtype_and_layout,
    needs_dispatcher,
    wants_grad,
    with_zero_gradients,
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
        layouts=("contiguous", "channels_last", "strided"),
        differentiable=("values", "features"),
        library_ops=(
            "segkernels::permutohedral_filter",
            "segkernels::permutohedral_filter_backward",
        ),
        note="half precision is computed in float32; 1 to 16 features per point",
    )
)


class PermutohedralLattice:
    """Permutohedral lattice of a set of points: build it once, filter with it many times.

    Filtering approximates `out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j` over all points j of an
    image, including point i, in time linear in the number of points.

    A copy shares the lattice. A deep copy or a pickle holds the features, and builds the lattice
    again. It raises TypeError if the features require grad, because their graph cannot be copied,
    or have been modified in place since.

    Args:
        features: `(B, d, *spatial)`, or `(N, d)` for one set of points; floating point, 1 <= d <=
            16, each feature already divided by its standard deviation. float16 and bfloat16 are
            converted to float32.
        max_vertices: an upper bound for the number of occupied vertices, summed over the batch.
            With it, and while a CUDA graph is captured, the build does not synchronise with a CUDA
            device; without it, it synchronises once. A bound that is too small raises ValueError
            on the CPU. On CUDA `segkernels.check` reports it, and the points without a vertex
            return NaN.

    Raises:
        ValueError: a wrong rank or number of features; on the CPU also features that are not
            finite, or so large that their dtype cannot hold the lattice coordinates as exact
            integers. On CUDA `segkernels.check` reports such points; they return NaN and do not
            affect other points.
        TypeError: features that are not floating point.

    Source: A. Adams, J. Baek, M. A. Davis: Fast High-Dimensional Filtering Using the Permutohedral
    Lattice, Computer Graphics Forum 29(2), 2010. The arithmetic follows the implementation of
    P. Kraehenbuehl and V. Koltun, so results agree with pydensecrf's.
    """

    def __init__(self, features: torch.Tensor, *, max_vertices: int | None = None) -> None:
        self._spatial = _check_features(features, "PermutohedralLattice")
        check_max_vertices(max_vertices, "PermutohedralLattice")
        self.shape = features.shape
        self._flat = _flatten_features(features)
        self._max_vertices = max_vertices
        self._build()

    def _build(self) -> None:
        self._lattice: Lattice | None = None
        self._version = 0
        if self._flat.numel() > 0 and not needs_dispatcher(self._flat):
            features = self._flat[0].T if len(self.shape) == 2 else self._flat.view(self.shape)
            with describing_features({"features": features}, self._flat.dtype):
                (self._lattice,) = native.build(
                    [self._flat.detach()],
                    self._spatial,
                    max_vertices=self._max_vertices,
                    op="PermutohedralLattice",
                )
            self._version = _version(self._flat)

    def __copy__(self) -> PermutohedralLattice:
        same = object.__new__(type(self))
        same.__dict__.update(self.__dict__)
        return same

    def __getstate__(self) -> dict[str, Any]:
        if self._flat.requires_grad:
            raise TypeError(
                "PermutohedralLattice: features must not require grad in a deep copy or a pickle, "
                "got requires_grad=True; build the lattice from features.detach()"
            )
        if self._lattice is not None and _version(self._flat) != self._version:
            raise TypeError(
                "PermutohedralLattice: features must not be modified in place before a deep copy "
                "or a pickle, which builds the lattice again; build it from features.clone()"
            )
        return {name: value for name, value in self.__dict__.items() if name != "_lattice"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    @property
    def num_vertices(self) -> list[int]:
        """Occupied vertices of each image; reading it synchronises with a CUDA device."""
        if self._flat.numel() == 0:
            return [0] * self._flat.shape[0]
        if self._lattice is None:
            raise RuntimeError(
                "PermutohedralLattice.num_vertices: features have no values to build a lattice "
                f"from: they are on {self._flat.device}, or traced by torch.func or torch.compile"
            )
        return self._lattice.num_vertices()

    def filter(
        self,
        values: torch.Tensor,
        normalization: Normalization = "after",
        transpose: bool = False,
    ) -> torch.Tensor:
        """Filter values given at the lattice's points.

        Args:
            values: `(B, C, *spatial)`, or `(N, C)`, floating point, any C, on the lattice's device.
                The filter is computed in the lattice's dtype.
            normalization: with D = diag(K 1): "after" D^-1 K (a weighted average), "before"
                K D^-1, "symmetric" D^-1/2 K D^-1/2, "none" K.
            transpose: apply the transposed operator: the blurs in reverse order, the normalisation
                on the other side.

        Returns:
            A tensor with the shape, dtype and layout of `values`. Differentiable once, with respect
            to values and features. The simplex of each point is held fixed, because the lattice is
            not continuous across simplices.

        Raises:
            ValueError: shapes or devices that disagree, an unknown normalization.
            TypeError: values that are not floating point.
        """
        function = "PermutohedralLattice.filter"
        _arguments.check_choice(normalization, "normalization", NORMALIZATIONS, function)
        flat = _flatten_values(values, self.shape, self._flat, function)
        if self._flat.numel() == 0 or flat.numel() == 0:
            return with_zero_gradients(values.clone(), self._flat)
        record = Filter(normalization, transpose, self._spatial, self._lattice)
        out = operator.filter_(flat.to(self._flat.dtype), self._flat, record)
        return _restore_shape(out, values)


def permutohedral_filter(
    values: torch.Tensor,
    features: torch.Tensor,
    normalization: Normalization = "after",
    transpose: bool = False,
) -> torch.Tensor:
    """Gaussian filtering on a permutohedral lattice that is built for this call.

    `PermutohedralLattice` builds a lattice for several calls.

    Args:
        values: `(B, C, *spatial)`, or `(N, C)`; floating point, any C.
        features: `(B, d, *spatial)`, or `(N, d)`; 1 <= d <= 16, already divided by their standard
            deviations.
        normalization, transpose: as in `PermutohedralLattice.filter`.

    Returns:
        A tensor with the shape, dtype and layout of `values`; computed in float64 if either
        argument is float64, else in float32. Differentiable once, with respect to values and
        features.

    Raises:
        ValueError, TypeError: as `PermutohedralLattice` and `PermutohedralLattice.filter`.
    """
    function = "permutohedral_filter"
    _arguments.check_choice(normalization, "normalization", NORMALIZATIONS, function)
    spatial = _check_features(features, function)
    flat = _flatten_values(values, features.shape, features, function)
    flat_features = _flatten_features(features)
    if flat.numel() == 0 or flat_features.numel() == 0:
        return with_zero_gradients(values.clone(), features)
    dtype = torch.promote_types(torch.promote_types(values.dtype, features.dtype), torch.float32)
    flat, flat_features = flat.to(dtype), flat_features.to(dtype)
    lattice = None
    with describing_features({"features": features}, dtype):
        if wants_grad(flat, flat_features) and not needs_dispatcher(flat, flat_features):
            # Built here, so that the backward pass can use it too.
            (lattice,) = native.build([flat_features.detach()], spatial, op=function)
        record = Filter(normalization, transpose, spatial, lattice)
        return _restore_shape(operator.filter_(flat, flat_features, record), values)


def _version(features: torch.Tensor) -> int:
    """The number of times that `features` was modified in place; 0 for an inference tensor."""
    return 0 if features.is_inference() else features._version


def _check_features(features: torch.Tensor, function: str) -> tuple[int, ...]:
    """Check features and return the sizes of their grid."""
    check_not_traced(function)
    _check_tensor(features, "features", function)
    if features.dim() < 2:
        raise ValueError(
            f"{function}: features must be (N, d) or (B, d, *spatial), "
            f"got shape {tuple(features.shape)}"
        )
    if not 1 <= features.shape[1] <= MAX_DIMS:
        raise ValueError(
            f"{function}: features must have 1 to {MAX_DIMS} channels in dimension 1, "
            f"got shape {tuple(features.shape)}"
        )
    batch, spatial = 1, tuple(features.shape[:1])
    if features.dim() > 2:
        batch, spatial = features.shape[0], tuple(features.shape[2:])
    if features.numel() > 0 and not is_compiling():
        native.check_size(features.device, batch, spatial, features.shape[1], function)
    return spatial


def _flatten_features(features: torch.Tensor) -> torch.Tensor:
    """Return checked features as (B, d, N), contiguous, float32 or float64."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    flat = features.T.unsqueeze(0) if features.dim() == 2 else features.flatten(2)
    return flat.to(dtype).resolve_neg().contiguous()


def _flatten_values(
    values: torch.Tensor, shape: Sequence[int], features: torch.Tensor, function: str
) -> torch.Tensor:
    """Check values against the features; return them as (B, C, N), a view where possible."""
    _check_tensor(values, "values", function)
    _arguments.check_matches(values, "values", shape, "features", function)
    _arguments.check_same_device(values, "values", features.device, "the features are", function)
    return values.T.unsqueeze(0) if values.dim() == 2 else values.flatten(2)


def _restore_shape(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return (B, C, N) results in the shape, dtype and layout of `values`."""
    out = out.squeeze(0).T if values.dim() == 2 else out.view(values.shape)
    return match_dtype_and_layout(out, values)


def _check_tensor(tensor: torch.Tensor, name: str, function: str) -> None:
    _arguments.check_tensor(tensor, name, function)
    _arguments.check_floating(tensor, name, function)
    _arguments.check_device(tensor)


def check_max_vertices(max_vertices: int | None, function: str) -> None:
    """Raise ValueError unless `max_vertices` is None or a positive int."""
    if max_vertices is not None and (
        isinstance(max_vertices, bool) or not isinstance(max_vertices, int) or max_vertices < 1
    ):
        raise ValueError(f"{function}: max_vertices must be a positive int, got {max_vertices!r}")
