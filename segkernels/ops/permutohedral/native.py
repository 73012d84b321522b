"""The native lattice: its tensors, its construction, and filtering with it.

The grid of points is cut into tiles, and points are stored tile by tile. The index of a point in
this order is its position; tiles at the border also have positions without a point. Values are
either (B, C, N) tensors in the lattice's dtype or rows, (positions, width): the channels of the
point at each position, padded to whole vectors.

An entry is one vertex of one position's simplex. A pair is one vertex of one tile (on CUDA a pair
holds a limited number of entries). A splat sums entries into pairs, then pairs into vertices, both
in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from segkernels import _native, _status

Normalization = Literal["symmetric", "before", "after", "none"]
NORMALIZATIONS = ("symmetric", "before", "after", "none")
MAX_DIMS = 16
# What the values passed to `pack` are (enum RowKind in csrc/permutohedral/filter.h).
ROW_KINDS = {"values": 0, "unary": 1, "logits": 2, "probs": 3}

_TILE = 256  # points per tile on CUDA: one block of threads
# Points per tile on the CPU: large enough to share vertices, small enough to stay in the cache.
_CPU_TILE = 8192
_MAX_ENTRIES = 2**30
_MAX_ENTRIES_PADDED = 2**31 - 1
_INVALID = -1  # kSkipped in csrc/permutohedral/lattice.h, as int16


def _workspace(features: torch.Tensor, entries: int, tiles: int, pairs: int) -> int:
    """Bytes of workspace that CUB needs on the CUDA device of `features`."""
    index, _, _ = _native.where(features)
    return int(_native.C().lattice_workspace(index, entries, tiles, pairs))


def row_width(device: torch.device, channels: int) -> int:
    """Number of channels of a row in memory: `channels` rounded up to whole vectors."""
    if channels == 1:
        return 1
    if _native.on_cuda(device) or channels <= 4:
        return -(-channels // 4) * 4
    return -(-channels // 8) * 8


def make_grid(device: torch.device, batch: int, spatial: Sequence[int], dims: int) -> Any:
    """Return the native Grid, which cuts the points of `batch` images into tiles.

    Args:
        device: of the lattices that will use the grid.
        batch: number of images.
        spatial: sizes of the grid of points.
        dims: the largest number of features of these lattices.
    """
    height = 1
    for size in spatial[:-1]:
        height *= size
    width = spatial[-1]
    if not _native.on_cuda(device):
        points = min(65534 // (dims + 1), _CPU_TILE)
        tall = _even_part(height, 64)
        return _native.C().Grid(batch, height, width, tall, _even_part(width, points // tall))
    tall = 16
    while tall // 2 >= height:
        tall //= 2
    while _TILE // tall // 2 >= width:
        tall *= 2
    return _native.C().Grid(batch, height, width, tall, _TILE // tall)


def _even_part(size: int, most: int) -> int:
    """Split `size` into as few parts of at most `most` as possible; return the largest part."""
    parts = -(-size // most)
    return -(-size // parts)


class Lattice:
    """One lattice per image of a batch, in one set of tensors.

    Attributes:
        features: (B, d, N), kept to compute their gradient.
        grid: the native Grid; lattices with the same grid have the same positions.
        view: the native struct; it holds references to the tensors that it points to.
        weights: (positions, d + 1) barycentric weights.
        local_ids: (entries,) int16, the pair of each entry, counted within its tile; -1 at invalid
            points.
        tile_start: (tiles + 1,) int32, the number of pairs before each tile.
        counts: (2,) int32 on the device, the numbers of vertices and of pairs.
        image_start: (B + 1,) int32 on the device, the number of vertices before each image.
    """

    def __init__(self, features: torch.Tensor, grid: Any, counts: torch.Tensor) -> None:
        self.features = features
        self.grid = grid
        self.dims = features.shape[1]
        self.dtype, self.device = features.dtype, features.device
        self.double = features.dtype == torch.float64
        self.counts = counts
        self.view = _native.C().Lattice()
        self.view.grid, self.view.dims = grid, self.dims
        self.weights = self.empty((grid.positions, self.dims + 1), self.dtype)
        self.local_ids = self.empty((self.entries,), torch.int16)
        self.tile_start = self.empty((grid.tiles + 1,), torch.int32)
        self.image_start = self.empty((grid.batch + 1,), torch.int32)
        self._inverse_norms: dict[tuple[bool, int], torch.Tensor] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised tensor on the lattice's device."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    @property
    def entries(self) -> int:
        """Number of entries: positions times the d + 1 vertices of a simplex."""
        return int(self.grid.positions) * (self.dims + 1)

    def num_vertices(self) -> list[int]:
        """Occupied vertices of each image; synchronises."""
        starts = self.image_start.tolist()
        return [end - start for start, end in pairwise(starts)]

    def rows(self, width: int) -> torch.Tensor:
        """Uninitialised rows, (positions, width)."""
        return self.empty((self.grid.positions, width), self.dtype)

    def buffers(self, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Allocate the workspace of a splat: rows of the pairs, of the vertices, and scratch."""
        pairs = self.empty((self.view.pair_bound, width), self.dtype)
        vertices = self.empty((self.view.vertex_bound, width), self.dtype)
        return pairs, vertices, torch.empty_like(vertices)

    def splat(
        self,
        rows: torch.Tensor | None,
        scale: torch.Tensor | None,
        reverse: bool,
        buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Splat and blur; return the rows of the vertices.

        Args:
            rows: (positions, width) values; None: ones of width 1, on the CPU only.
            scale: (positions,) factors of the rows, or None.
            reverse: blur along the axes in reverse order, for the transposed filter.
            buffers: the workspace from `buffers`; None allocates it.
        """
        width = 1 if rows is None else rows.shape[1]
        pairs, vertices, scratch = buffers or self.buffers(width)
        _native.C().lattice_splat(
            _native.where(vertices),
            self.view,
            rows,
            scale,
            pairs,
            vertices,
            scratch,
            width,
            reverse,
            self.double,
        )
        return vertices

    def slice(
        self,
        vertices: torch.Tensor,
        scale: torch.Tensor | None,
        fill: float = float("nan"),
    ) -> torch.Tensor:
        """Slice: interpolate the rows of the vertices at the points.

        Args:
            vertices: (vertices, width) rows.
            scale: (positions,) factors of the result, or None.
            fill: value of the result at invalid points.
        """
        rows = self.rows(vertices.shape[1])
        _native.C().lattice_slice(
            _native.where(rows),
            self.view,
            vertices,
            scale,
            fill,
            rows,
            rows.shape[1],
            self.double,
        )
        return rows

    def invalid(self) -> torch.Tensor:
        """Mask of positions whose point has a feature that is not finite: (positions, 1) bool."""
        ids = self.local_ids.view(self.grid.positions, self.dims + 1)
        return ids[:, :1] == _INVALID

    def inverse_norm(self, root: bool) -> torch.Tensor:
        """Return 1 / n, or 1 / sqrt(n) if `root`, for n = K 1: (positions,).

        The result is cached per stream, because another stream may not have waited for the one that
        computed it. It is not cached while a CUDA graph is captured: the memory is then filled only
        when the graph is replayed.
        """
        key = (root, _native.where(self.features)[1])
        inverse = self._inverse_norms.get(key)
        if inverse is None:
            cuda = _native.on_cuda(self.device)
            ones = self.empty((self.grid.positions, 1), self.dtype).fill_(1) if cuda else None
            norm = self.slice(self.splat(ones, None, False), None)
            _native.C().rows_invert_norm(
                _native.where(norm),
                self.grid.positions,
                norm,
                norm,
                root,
                self.double,
            )
            inverse = norm.view(-1)
            if not _native.capturing(self.device):
                self._inverse_norms[key] = inverse
        return inverse

    def scales(
        self, normalization: Normalization
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the diagonals that multiply K from the right and from the left, or None.

        They scale the values before the splat and after the slice.
        """
        if normalization == "symmetric":
            root = self.inverse_norm(True)
            return root, root
        if normalization == "none":
            return None, None
        inverse = self.inverse_norm(False)
        return (inverse, None) if normalization == "before" else (None, inverse)

    def filter(
        self, values: torch.Tensor, normalization: Normalization, transpose: bool
    ) -> torch.Tensor:
        """Filter (B, C, N) values, with normalisation, outside autograd."""
        before, after = self.scales(normalization)
        if transpose:
            before, after = after, before
        rows = pack(self.grid, values, "values")
        rows = self.slice(self.splat(rows, before, transpose), after)
        return unpack(self.grid, rows, torch.empty_like(values))

    def filter_grad(
        self,
        grad: torch.Tensor,
        values: torch.Tensor,
        normalization: Normalization,
        transpose: bool,
        needs: tuple[bool, bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients with respect to the values and the features; None where `needs` is False."""
        before, after = self.scales(normalization)
        if transpose:
            before, after = after, before
        g = pack(self.grid, grad, "values")
        grad_vertices = self.splat(g, after, not transpose)
        grad_values = grad_features = None
        if needs[0]:
            rows = self.slice(grad_vertices, before)
            grad_values = unpack(self.grid, rows, torch.empty_like(values))
        if needs[1]:
            x = pack(self.grid, values, "values")
            vertices = self.splat(x, before, transpose)
            pair = scaled(x, before), scaled(g, after)
            grad_weights = self.weights_grad(*pair, vertices, grad_vertices)
            if normalization != "none":
                total = self.weights.new_zeros(())
                if before is not None:
                    total = total + (self.slice(grad_vertices, None, 0.0) * x).sum(dim=1)
                if after is not None:
                    total = total + (self.slice(vertices, None, 0.0) * g).sum(dim=1)
                grad_weights += self.norm_grad(total, normalization)
            grad_features = self.embed_grad(grad_weights)
        return grad_values, grad_features

    def norm_grad(self, grad_scales: torch.Tensor, normalization: Normalization) -> torch.Tensor:
        """Part of the gradient with respect to the weights that goes through n = K 1.

        Args:
            grad_scales: (positions,) gradient with respect to the normalisation's diagonals, summed
                over both.
            normalization: other than "none".
        """
        if normalization == "symmetric":
            grad_norm = -0.5 * grad_scales * self.inverse_norm(True) ** 3
        else:
            grad_norm = -grad_scales * self.inverse_norm(False) ** 2
        # The norm of an invalid point is NaN.
        g = grad_norm.nan_to_num(nan=0.0).view(-1, 1)
        ones = torch.ones_like(g)
        vertices = self.splat(ones, None, False)
        return self.weights_grad(ones, g, vertices, self.splat(g, None, True))

    def weights_grad(
        self,
        x: torch.Tensor,
        g: torch.Tensor,
        vertices: torch.Tensor,
        grad_vertices: torch.Tensor,
    ) -> torch.Tensor:
        """Gradient with respect to the weights: (positions, d + 1).

        Args:
            x: (positions, width) rows that were splatted.
            g: (positions, width) gradient with respect to the sliced rows.
            vertices: blurred rows of the vertices, from `x`.
            grad_vertices: rows of the vertices from the transposed filter of `g`.
        """
        out = torch.empty_like(self.weights)
        _native.C().lattice_weights_grad(
            _native.where(x),
            self.view,
            x,
            g,
            vertices,
            grad_vertices,
            out,
            x.shape[1],
            self.double,
        )
        return out

    def embed_grad(self, grad_weights: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to the features, from the gradient with respect to the weights."""
        out = torch.empty_like(self.features)
        grad_weights = grad_weights.contiguous()
        _native.C().lattice_embed_grad(
            _native.where(out),
            self.view,
            self.features,
            grad_weights,
            out,
            self.double,
        )
        return out


def check_size(device: torch.device, batch: int, spatial: Sequence[int], dims: int, op: str) -> Any:
    """Return the grid for lattices of `dims` features; raise ValueError for too many points.

    Args:
        device, batch, spatial, dims: as in `make_grid`.
        op: name of the public function, for error messages.
    """
    points = math.prod(spatial)
    if batch * points * (dims + 1) > _MAX_ENTRIES:
        raise ValueError(
            f"{op}: batch * points * (dims + 1) must be at most 2**30 in one call, got "
            f"{batch} * {points} * {dims + 1}; split the batch or the image"
        )
    grid = make_grid(device, batch, spatial, dims)
    if grid.positions * (dims + 1) >= _MAX_ENTRIES_PADDED:
        raise ValueError(
            f"{op}: points (padded to whole tiles) * (dims + 1) must be below 2**31 in one call, "
            f"got {grid.positions} * {dims + 1} for {batch} images of {tuple(spatial)}; split the "
            "batch"
        )
    return grid


def build(
    features: Sequence[torch.Tensor],
    spatial: Sequence[int],
    *,
    max_vertices: int | None = None,
    op: str = "permutohedral",
) -> list[Lattice]:
    """Build one lattice for each of several sets of features of the same points.

    Args:
        features: each (B, d, N), contiguous, float32 or float64, on one device.
        spatial: sizes of the grid of the N points.
        max_vertices: an upper bound for the vertices of each lattice, summed over the batch.
            Without it the counts are read once, which on CUDA synchronises; while a CUDA graph is
            captured, memory for the worst case is allocated instead.
        op: name of the public function, for error messages.

    Raises:
        ValueError: too many entries for one call; on the CPU also invalid features, or more than
            `max_vertices` vertices.
    """
    first = features[0]
    dims = max(f.shape[1] for f in features)
    grid = check_size(first.device, len(first), spatial, dims, op)
    counts = torch.zeros(len(features), 2, dtype=torch.int32, device=first.device)
    lattices = [Lattice(f, grid, c) for f, c in zip(features, counts.unbind(), strict=True)]
    if _native.on_cuda(first.device):
        with _status.watch(first, op, first.dtype) as status:
            builds = [_embed(lattice, max_vertices, status) for lattice in lattices]
            _link_cuda(lattices, builds, counts, max_vertices)
        return lattices
    for lattice in lattices:
        # Errors raise at the end of `watch`, so vertices beyond the bound do not reach the links.
        with _status.watch(first, op, first.dtype) as status:
            build = _embed(lattice, max_vertices, status)
        _link_cpu(lattice, build)
        del build  # frees its memory for the next lattice
    return lattices


def _embed(lattice: Lattice, max_vertices: int | None, status: torch.Tensor) -> Any:
    """Compute the weights, the keys of the vertices, and the numbers of vertices and pairs.

    On CUDA keys are inserted into one hash table; on the CPU into one per tile first.
    """
    C = _native.C()
    positions, entries = lattice.grid.positions, lattice.entries
    on_cuda = _native.on_cuda(lattice.device)
    i32, i16 = torch.int32, torch.int16
    view, build = lattice.view, C.BuildBuffers()
    empty = lattice.empty
    _set_fields(
        view,
        counts=lattice.counts,
        weights=lattice.weights,
        local_ids=lattice.local_ids,
        tile_start=lattice.tile_start,
        pair_vertex=empty((entries,), i32),
    )
    _set_fields(
        build,
        features=lattice.features,
        image_start=lattice.image_start,
        status=status,
        records=empty((positions * C.record_size(lattice.dims),), i32),
    )
    where = _native.where(lattice.features)
    if on_cuda:
        build.temporary_bytes = _workspace(lattice.features, entries, lattice.grid.tiles, 0)
        _set_fields(
            build,
            rank_of=empty((entries + 1,), i32),
            temporary=empty((build.temporary_bytes,), torch.uint8),
        )
        _set_fields(
            view,
            order=empty((entries,), i16),
            order_weights=empty((entries,), lattice.dtype),
            pair_range=empty((entries,), i32),
        )
        keys = entries
    else:
        tile_entries = lattice.grid.tile_points * (lattice.dims + 1)
        build.tile_capacity = 2 ** (2 * tile_entries - 1).bit_length()
        threads = max(1, where[2])
        _set_fields(
            build,
            tile_slots=empty((threads * build.tile_capacity,), i32),
            tile_keys=empty((threads * tile_entries * (lattice.dims + 1),), i32),
        )
        C.lattice_embed(where, view, build, lattice.double)
        keys = int(lattice.counts[1])
    view.vertex_bound = keys if max_vertices is None else min(keys, max_vertices)
    build.capacity = max(16, keys + keys // 2)
    _set_fields(
        build,
        slots=empty((build.capacity,), torch.int64),
        slot_of=empty((keys,), i32),
        vertex_of_slot=empty((build.capacity,), i32),
        first_entry=empty((view.vertex_bound,), i32),
    )
    if on_cuda:
        C.lattice_embed(where, view, build, lattice.double)
    C.lattice_tiles(where, view, build, lattice.double)
    return build


def _link_cpu(lattice: Lattice, build: Any) -> None:
    """Connect vertices with their pairs and neighbours, on the CPU."""
    view = lattice.view
    view.vertex_bound, view.pair_bound = lattice.counts.tolist()
    _allocate_links(lattice)
    _native.C().lattice_link(_native.where(lattice.features), view, build)


def _link_cuda(
    lattices: list[Lattice], builds: list[Any], counts: torch.Tensor, max_vertices: int | None
) -> None:
    """Connect vertices with their pairs and neighbours, on CUDA; empties `builds`."""
    C = _native.C()
    bounded = max_vertices is not None or _native.capturing(counts.device)
    read = None if bounded else counts.tolist()
    for i, lattice in enumerate(lattices):
        view, build = lattice.view, builds.pop(0)  # its memory is freed for the next lattice
        if read is not None:
            view.vertex_bound, view.pair_bound = read[i]
        else:
            # A vertex has one pair per tile, and one more for every `longest_pair` entries.
            longest = lattice.grid.tile_points * (lattice.dims + 1) // C.longest_pair
            most = lattice.grid.tiles * (view.vertex_bound + longest)
            view.pair_bound = min(lattice.entries, most)
        _allocate_links(lattice)
        build.temporary_bytes = _workspace(lattice.features, 0, 0, view.pair_bound)
        _set_fields(
            build,
            temporary=lattice.empty((build.temporary_bytes,), torch.uint8),
            sort_keys=lattice.empty((2 * view.pair_bound,), torch.int32),
            sort_values=lattice.empty((view.pair_bound,), torch.int32),
        )
        C.lattice_link(_native.where(lattice.features), view, build)


def _allocate_links(lattice: Lattice) -> None:
    view = lattice.view
    _set_fields(
        view,
        vertex_start=lattice.empty((view.vertex_bound + 1,), torch.int32),
        vertex_pairs=lattice.empty((view.pair_bound,), torch.int32),
        neighbours=lattice.empty((lattice.dims + 1, 2, view.vertex_bound), torch.int32),
    )


def _set_fields(target: Any, **tensors: torch.Tensor) -> None:
    """Set the pointers of a native struct; it holds references to the tensors."""
    for name, tensor in tensors.items():
        setattr(target, name, tensor)


def scaled(rows: torch.Tensor, diagonal: torch.Tensor | None) -> torch.Tensor:
    """Multiply rows by a diagonal that is NaN at invalid points, where the result is 0."""
    return rows if diagonal is None else rows * diagonal.view(-1, 1).nan_to_num(nan=0.0)


def pack(
    grid: Any, values: torch.Tensor, kind: str, status: torch.Tensor | None = None
) -> torch.Tensor:
    """Copy (B, C, N) values of any strides into rows.

    Args:
        grid: the native Grid.
        values: (B, C, N).
        kind: a key of `ROW_KINDS`; "unary", "logits" and "probs" are converted to -energy.
        status: status words for invalid scores, or None.
    """
    channels = values.shape[1]
    width = row_width(values.device, channels)
    rows = torch.empty(grid.positions, width, dtype=values.dtype, device=values.device)
    _native.C().rows_pack(
        _native.where(values),
        grid,
        values,
        *values.stride(),
        rows,
        channels,
        width,
        ROW_KINDS[kind],
        status,
        values.dtype == torch.float64,
    )
    return rows


def unpack(grid: Any, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy rows into `out`, (B, C, N) of any strides, and return it."""
    _native.C().rows_unpack(
        _native.where(out),
        grid,
        rows,
        out,
        *out.stride(),
        out.shape[1],
        rows.shape[1],
        out.dtype == torch.float64,
    )
    return out
