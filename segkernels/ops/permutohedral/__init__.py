"""Gaussian filtering in up to 16 dimensions on the permutohedral lattice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from segkernels import _native
from segkernels._registry import Op, register
from segkernels.ops._op import laid_out_like, through_dispatcher, wants_grad
from segkernels.ops.permutohedral import autograd, lattice
from segkernels.ops.permutohedral.lattice import (
    MAX_DIMS,
    NORMALIZATIONS,
    Lattice,
    Normalization,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

register(
    Op(
        name="permutohedral",
        functions=("PermutohedralLattice", "permutohedral_filter"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        dtypes=("float16", "bfloat16", "float32", "float64"),
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
        self._lattice: Lattice | None = None
        if flat.numel() > 0:
            (self._lattice,) = lattice.build(
                [flat.detach()], spatial, max_vertices=max_vertices, op="PermutohedralLattice"
            )

    @property
    def num_vertices(self) -> list[int]:
        """Occupied vertices of each image. Reading it synchronises with a CUDA device."""
        if self._lattice is None:
            return [0] * self._flat.shape[0]
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
        _check_normalization(normalization, what)
        flat = _values(values, self.shape, self._flat, what)
        if self._lattice is None or flat.numel() == 0:
            return values.clone()
        flat = flat.to(self._flat.dtype)
        if wants_grad(flat, self._flat):
            out = autograd.filter_(flat, self._flat, self._lattice, normalization, transpose)
        else:
            out = self._lattice.filter(flat, normalization, transpose)
        return _shaped(out, values)


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
    _check_normalization(normalization, what)
    flat_features, spatial = _features(features, what)
    flat = _values(values, features.shape, flat_features, what)
    if flat.numel() == 0 or flat_features.numel() == 0:
        return values.clone()
    dtype = torch.promote_types(torch.promote_types(values.dtype, features.dtype), torch.float32)
    flat, flat_features = flat.to(dtype), flat_features.to(dtype)
    if through_dispatcher(values, features):
        out = torch.ops.segkernels.permutohedral_filter(
            flat, flat_features, normalization, transpose, list(spatial)
        )
    else:
        (built,) = lattice.build([flat_features.detach()], spatial, op=what)
        if wants_grad(flat, flat_features):
            out = autograd.filter_(flat, flat_features, built, normalization, transpose)
        else:
            out = built.filter(flat, normalization, transpose)
    return _shaped(out, values)


def _features(features: torch.Tensor, what: str) -> tuple[torch.Tensor, Sequence[int]]:
    """(B, d, N), contiguous, float32 or float64, and the sizes of the grid."""
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
        return features.to(dtype).T.unsqueeze(0).contiguous(), features.shape[:1]
    return features.to(dtype).flatten(2).contiguous(), features.shape[2:]


def _values(
    values: torch.Tensor, shape: Sequence[int], features: torch.Tensor, what: str
) -> torch.Tensor:
    """(B, C, N) values, a view where that can be."""
    _check_tensor(values, "values", what)
    fits = values.dim() == len(shape) and (values.shape[0], *values.shape[2:]) == (
        shape[0],
        *shape[2:],
    )
    if not fits:
        raise ValueError(
            f"{what}: values must match the features {tuple(shape)} in all dimensions but the "
            f"second, got shape {tuple(values.shape)}"
        )
    if values.device != features.device:
        raise ValueError(
            f"{what}: values and features must be on one device, "
            f"got {values.device} and {features.device}"
        )
    return values.T.unsqueeze(0) if values.dim() == 2 else values.flatten(2)


def _shaped(out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    out = out.squeeze(0).T if values.dim() == 2 else out.view(values.shape)
    return laid_out_like(out, values)


def _check_tensor(tensor: torch.Tensor, name: str, what: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{what}: {name} must be a torch tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        raise TypeError(
            f"{what}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
        )
    if not through_dispatcher(tensor):
        _native.where(tensor)


def _check_normalization(normalization: str, what: str) -> None:
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"{what}: normalization must be one of {', '.join(NORMALIZATIONS)}, "
            f"got {normalization!r}"
        )


def check_bound(max_vertices: int | None, what: str) -> None:
    """Refuse a `max_vertices` that is no positive int."""
    if max_vertices is not None and (
        isinstance(max_vertices, bool) or not isinstance(max_vertices, int) or max_vertices < 1
    ):
        raise ValueError(f"{what}: max_vertices must be a positive int, got {max_vertices!r}")
