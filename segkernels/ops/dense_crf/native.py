"""Mean field on lattices: the call of the native function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from segkernels import _native, _status
from segkernels.ops import _dtypes
from segkernels.ops.permutohedral import native as permutohedral
from segkernels.ops.permutohedral.native import Lattice, Normalization

OP = "dense_crf"
_IMAGES = {**_dtypes.FLOATING, torch.uint8: 4}  # kUint8 in csrc/dense_crf/features.h
_BATCH = 16  # points that a CPU thread updates together


class Config(NamedTuple):
    """Arguments of mean field other than tensors.

    Attributes:
        kind: what the scores are: "probs", "logits" or "unary".
        normalization: of each term.
        iterations, log: as in `segkernels.dense_crf`.
        spatial: sizes of the grid of points.
        max_vertices: as in `segkernels.dense_crf`; ignored through the dispatcher.
        lattices: of the terms; None: the forward and the backward each build them.
    """

    kind: str
    normalization: tuple[Normalization, ...]
    iterations: int
    log: bool
    spatial: tuple[int, ...]
    max_vertices: int | None = None
    lattices: tuple[Lattice, ...] | None = None

    def lattices_of(self, features: Sequence[torch.Tensor]) -> Sequence[Lattice]:
        """Return the lattices of the terms' features, building them if necessary."""
        if self.lattices is not None or not features:
            return self.lattices or ()
        plain = [f.detach().contiguous() for f in features]
        bound = self.max_vertices
        return permutohedral.build(plain, self.spatial, max_vertices=bound, op="dense_crf")


def native_compat(compat: torch.Tensor, channels: int, width: int, alpha: float) -> torch.Tensor:
    """Return -mu * alpha for the kernels: (width,), or (width, width) by columns."""
    if compat.dim() == 0:
        out = compat.new_zeros(width)
        out[:channels] = compat * alpha
        return out
    out = compat.new_zeros((width,) * compat.dim())
    if compat.dim() == 1:
        out[:channels] = compat * -alpha
    else:
        out[:channels, :channels] = (compat + compat.T) * (-alpha / 2)
    return out


def grid_features(
    batch: int,
    spatial: Sequence[int],
    sxy: torch.Tensor,
    image: torch.Tensor | None,
    srgb: torch.Tensor | None,
) -> torch.Tensor:
    """Return the features of `inputs.grid_features`, on the CPU and outside autograd."""
    axes, channels = len(spatial), 0 if image is None else image.shape[1]
    out = sxy.new_empty((batch, axes + channels, math.prod(spatial)))
    if image is not None and image.dtype not in _IMAGES:
        image = image.to(sxy.dtype)
    _native.C().grid_features(
        _native.where(sxy),
        batch,
        list(spatial),
        sxy.contiguous(),
        image,
        _IMAGES[sxy.dtype if image is None else image.dtype],
        [] if image is None else list(image.stride()),
        channels,
        None if srgb is None else srgb.contiguous(),
        out,
        sxy.dtype == torch.float64,
    )
    return out


def grid_of(scores: torch.Tensor, lattices: Sequence[Lattice], config: Config) -> Any:
    """Return the native Grid of the lattices, or one for the scores if there are no lattices."""
    if lattices:
        return lattices[0].grid
    return permutohedral.make_grid(scores.device, scores.shape[0], config.spatial, 1)


def mean_field(scores: torch.Tensor, terms: Sequence[torch.Tensor], config: Config) -> torch.Tensor:
    """Mean field of (B, C, N) scores, outside autograd.

    `terms` holds the features of each term, then the compatibility of each term.
    """
    C = _native.C()
    count, cuda = len(terms) // 2, _native.on_cuda(scores.device)
    lattices = config.lattices_of(terms[:count])
    grid = grid_of(scores, lattices, config)
    with _status.watch(scores, OP, scores.dtype) as status:
        rows = permutohedral.pack(grid, scores, config.kind, status)
        out = torch.empty_like(rows) if cuda else rows
        where = _native.where(scores)
        width = rows.shape[1]
        field = C.MeanField()  # it holds references to the tensors that it points to
        field.grid, field.channels, field.width = grid, scores.shape[1], width
        field.iterations = config.iterations if lattices else 0
        field.log = config.log
        field.energy, field.rows, field.status = rows, out, status
        field.scratch = rows.new_empty(0 if cuda else max(1, where[2]) * _BATCH * width)
        each = zip(lattices, terms[count:], config.normalization, strict=True)
        field.set_terms([_term(*one, scores.shape[1], width) for one in each])
        C.mean_field(where, field, scores.dtype == torch.float64)
        del field  # frees the workspace before the result is allocated
    return permutohedral.unpack(grid, out, torch.empty_like(scores))


def _term(
    lattice: Lattice, compat: torch.Tensor, normalization: Any, channels: int, width: int
) -> Any:
    term = _native.C().MeanFieldTerm()
    term.lattice = lattice.view
    term.scale_in, term.scale_out = lattice.scales(normalization)
    alpha = 1 / (1 + 2.0**-lattice.dims)
    term.compat = native_compat(compat.detach(), channels, width, alpha)
    term.compat_is_matrix = compat.dim() == 2
    if _native.on_cuda(lattice.device) and term.scale_in:
        term.splat_weights = lattice.empty((lattice.entries,), lattice.dtype)
    term.pairs, term.vertices, term.scratch = lattice.buffers(width)
    return term
