"""The exact filter on CUDA in float32: Triton kernels and their launches.

One kernel writes, for each tile of queries, a list of the key tiles within reach. A second one has
one program per tile of queries, which loops over that list with the weights in registers and
accumulates on the tensor cores.

Weights are exp2(-q log2(e) / 2), where q is the sum of squared differences in float32. No launch
synchronises, and sums are accumulated in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from segkernels.ops.gaussian_filter.points import TILE, Points

QUERIES = 2 * TILE  # queries per program
# Weights are multiplied by 2^15 before the conversion to float16, which makes weights down to 2^-29
# normal numbers.
_HALF_SHIFT = 15
_MAX_LIST_ENTRIES = 1 << 24  # in all lists that are in memory at the same time
_PROGRAMS = 8  # minimum number per multiprocessor, which balances lists of different lengths
# Triton does not compile again for other values of these arguments. The other sizes are multiples
# of a tile.
_UNSPECIALIZED = ("start", "query_tiles", "key_tiles", "splits")
# Triton 3.8 keeps the pipeline stages of a loop over float32 products in registers, and spills
# kilobytes.
_STAGES_SPILL = triton.__version__.startswith("3.8.")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def tile_list_kernel(
    first,  # (B, d, Tq) minimum of the boxes of the queries
    last,  # (B, d, Tq) their maximum
    low,  # (B, d, Tk) minimum of the boxes of the keys
    high,  # (B, d, Tk) their maximum
    tile_list,  # (B, chunk, Tk) int32 output
    list_length,  # (B, chunk) int32 output
    start,  # first query tile of the chunk
    query_tiles,
    key_tiles,
    reach,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the key tiles within reach of a query tile, in order, and their number."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk = tl.num_programs(0)
    first += image * DIMS * query_tiles + start + tile
    last += image * DIMS * query_tiles + start + tile
    low += image * DIMS * key_tiles
    high += image * DIMS * key_tiles
    tile_list += (image * chunk + tile) * key_tiles
    length = 0
    for begin in range(0, key_tiles, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        valid = t < key_tiles
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(DIMS):
            above = tl.load(low + k * key_tiles + t, valid, 0.0) - tl.load(last + k * query_tiles)
            below = tl.load(first + k * query_tiles) - tl.load(high + k * key_tiles + t, valid, 0.0)
            gap = tl.maximum(tl.maximum(above, below), 0.0)
            total += gap * gap
        keep = (valid & (total <= reach)).to(tl.int32)
        tl.store(tile_list + length + tl.cumsum(keep, 0) - keep, t, keep == 1)
        length += tl.sum(keep, 0)
    tl.store(list_length + image * chunk + tile, length)


@triton.jit
def _squared_distances(
    x, y, row, col, queries, keys, DIMS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Squared distances between M queries and N keys."""
    total = tl.zeros((M, N), tl.float32)
    if DIMS <= 6:
        for k in tl.static_range(DIMS):
            step = tl.load(x + k * queries + row)[:, None] - tl.load(y + k * keys + col)[None, :]
            total = tl.fma(step, step, total)
    else:  # not unrolled: so many features would not fit in registers
        for k in tl.range(0, DIMS, num_stages=1, loop_unroll_factor=1):
            step = tl.load(x + k * queries + row)[:, None] - tl.load(y + k * keys + col)[None, :]
            total = tl.fma(step, step, total)
    return total


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def apply_kernel(
    x,  # (B, d, Pq) float32
    y,  # (B, d, Pk) float32
    v,  # (B, Pk, C) float16 or float32
    tile_list,
    list_length,
    out,  # (splits, B, Pq, C) float32
    start,
    queries,
    keys,
    channels,
    splits,
    SHIFT: tl.constexpr,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,
):
    """K v for M queries and C channels, over one part of the list of key tiles.

    HALF: multiply in float16 instead of float32 (as three tf32 products).
    """
    tile, channel = tl.program_id(0), tl.program_id(1) * C
    images = tl.num_programs(2) // splits
    image, split = (tl.program_id(2) // splits).to(tl.int64), tl.program_id(2) % splits
    chunk = tl.num_programs(0)
    entry = image * chunk + tile
    tile_list += entry * (keys // N)
    length = tl.load(list_length + entry)
    x += image * DIMS * queries
    y += image * DIMS * keys
    v += image * keys * channels + channel
    row = (start + tile) * M + tl.arange(0, M)
    row = tl.minimum(row, queries - 1)
    within, c = tl.arange(0, N), tl.arange(0, C)
    sums = tl.zeros((M, C), tl.float32)
    for i in range(length * split // splits, length * (split + 1) // splits):
        col = tl.load(tile_list + i) * N + within
        q = _squared_distances(x, y, row, col, queries, keys, DIMS, M, N)
        weights = tl.exp2(tl.fma(q, -0.72134752044448170, SHIFT))
        values = tl.load(v + col.to(tl.int64)[:, None] * channels + c[None, :])
        if HALF:
            sums = tl.dot(weights.to(tl.float16), values, sums)
        else:
            sums = tl.dot(weights, values, sums, input_precision="tf32x3")
    row = (start + tile) * M + tl.arange(0, M)
    out += ((split * images + image) * queries) * channels + channel
    tl.store(
        out + row.to(tl.int64)[:, None] * channels + c[None, :], sums, (row < queries)[:, None]
    )


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def query_gradient_kernel(
    x,  # (B, d, Pq) float32
    y,  # (B, d, Pk) float32
    a,  # (B, Pq, C) float32
    b,  # (B, Pk, C) float32
    tile_list,
    list_length,
    out,  # (splits, B, Pq, D) float32
    start,
    queries,
    keys,
    channels,
    splits,
    DIMS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_j k_ij <a_i, b_j> (y_j - x_i) for M queries, over one part of the list of key tiles."""
    tile = tl.program_id(0)
    images = tl.num_programs(1) // splits
    image, split = (tl.program_id(1) // splits).to(tl.int64), tl.program_id(1) % splits
    chunk = tl.num_programs(0)
    entry = image * chunk + tile
    tile_list += entry * (keys // N)
    length = tl.load(list_length + entry)
    x += image * DIMS * queries
    y += image * DIMS * keys
    a += image * queries * channels
    b += image * keys * channels
    row = (start + tile) * M + tl.arange(0, M)
    row = tl.minimum(row, queries - 1)
    within, c, dim = tl.arange(0, N), tl.arange(0, C), tl.arange(0, D)
    sums = tl.zeros((M, D), tl.float32)
    for i in range(length * split // splits, length * (split + 1) // splits):
        col = tl.load(tile_list + i) * N + within
        product = tl.zeros((M, N), tl.float32)
        for begin in range(0, channels, C):
            left = tl.load(a + row.to(tl.int64)[:, None] * channels + begin + c[None, :])
            right = tl.load(b + col.to(tl.int64)[None, :] * channels + begin + c[:, None])
            product = tl.dot(left, right, product, input_precision=PRECISION)
        q = _squared_distances(x, y, row, col, queries, keys, DIMS, M, N)
        weights = tl.exp2(q * -0.72134752044448170) * product
        for k in tl.range(0, DIMS, num_stages=1, loop_unroll_factor=1):
            step = tl.load(y + k * keys + col)[None, :] - tl.load(x + k * queries + row)[:, None]
            total = tl.sum(step * weights, 1)
            sums = tl.where((dim == k)[None, :], sums + total[:, None], sums)
    row = (start + tile) * M + tl.arange(0, M)
    out += ((split * images + image) * queries) * D
    tl.store(out + row.to(tl.int64)[:, None] * D + dim[None, :], sums, (row < queries)[:, None])


def block_of(channels: int, dims: int, precise: bool) -> int:
    """Number of channels per program.

    A power of two, at least 16 for the tensor cores, and few enough to stay in registers.
    """
    if precise:
        most = 16 if dims > 6 else 32 if _STAGES_SPILL else 64
    else:
        most = 128 if dims <= 6 else 64
    return int(min(most, max(16, triton.next_power_of_2(channels))))


def stages_of(precise: bool) -> int:
    """Number of pipeline stages of apply_kernel's loop."""
    return 1 if precise and _STAGES_SPILL else 3


def apply(
    queries: Points, keys: Points, rows: torch.Tensor, reach: float, precise: bool
) -> torch.Tensor:
    """Same as `blocked.apply`, in float32: (B, P_keys, C) to (B, P_queries, C).

    `precise`: multiply in float32 (as three tf32 products) instead of float16.
    """
    batch, _, channels = rows.shape
    dims = queries.features.shape[1]
    block = block_of(channels, dims, precise)
    rows = torch.nn.functional.pad(rows, (0, -channels % block))
    scale = None
    if not precise:
        largest = rows.abs().amax(dim=1, keepdim=True)
        scale = torch.where(largest > 0, largest, 1)
        rows = (rows / scale).half()
        scale = scale * 2.0**-_HALF_SHIFT
    blocks = rows.shape[2] // block

    def launch(lists: Any, tiles: int, start: int, splits: int, out: torch.Tensor) -> None:
        apply_kernel[(tiles, blocks, batch * splits)](
            queries.features,
            keys.features,
            rows,
            *lists,
            out,
            start,
            queries.features.shape[2],
            keys.features.shape[2],
            rows.shape[2],
            splits,
            SHIFT=0.0 if precise else float(_HALF_SHIFT),
            DIMS=dims,
            M=QUERIES,
            N=TILE,
            C=block,
            HALF=not precise,
            num_warps=8,
            num_stages=stages_of(precise),
        )

    out = _launch_in_chunks(queries, keys, reach, rows.shape[2], blocks, launch)
    return (out if scale is None else out * scale)[:, :, :channels]


def query_gradient(
    queries: Points,
    keys: Points,
    a: torch.Tensor,
    b: torch.Tensor,
    reach: float,
    precise: bool,
) -> torch.Tensor:
    """Same as `blocked.query_gradient`, in float32: (B, P_queries, d).

    `precise`: multiply in float32 (as three tf32 products) instead of tf32.
    """
    batch, _, channels = a.shape
    dims = queries.features.shape[1]
    block = min(32, block_of(channels, dims, precise))
    a, b = (torch.nn.functional.pad(t, (0, -channels % block)) for t in (a, b))
    width = triton.next_power_of_2(dims)

    def launch(lists: Any, tiles: int, start: int, splits: int, out: torch.Tensor) -> None:
        query_gradient_kernel[(tiles, batch * splits)](
            queries.features,
            keys.features,
            a,
            b,
            *lists,
            out,
            start,
            queries.features.shape[2],
            keys.features.shape[2],
            a.shape[2],
            splits,
            DIMS=dims,
            M=QUERIES,
            N=TILE,
            C=block,
            D=width,
            PRECISION="tf32x3" if precise else "tf32",
            num_warps=8,
        )

    return _launch_in_chunks(queries, keys, reach, width, 1, launch)[:, :, :dims]


def _launch_in_chunks(
    queries: Points, keys: Points, reach: float, width: int, blocks: int, launch: Any
) -> torch.Tensor:
    """Write the lists of key tiles for a chunk of query tiles at a time, and launch a kernel on it.

    Args:
        queries, keys, reach: as in `blocked.apply`.
        width: channels of the result.
        blocks: programs per query tile.
        launch: function of the lists and their lengths, the number of query tiles, the first of
            them, the number of splits, and the output.

    Returns:
        (B, P_queries, width).
    """
    batch, dims, points = queries.features.shape
    first, last = queries.boxes(QUERIES)
    low, high = keys.boxes(TILE)
    tiles, key_tiles = first.shape[2], low.shape[2]
    splits = splits_for(batch * tiles * blocks, key_tiles, queries.features.device)
    out = queries.features.new_empty(splits, batch, points, width)
    chunk = max(1, min(tiles, _MAX_LIST_ENTRIES // (batch * key_tiles)))
    with torch.cuda.device_of(out):  # Triton launches on the current device
        for start in range(0, tiles, chunk):
            size = min(chunk, tiles - start)
            tile_list = torch.empty(batch, size, key_tiles, dtype=torch.int32, device=out.device)
            list_length = torch.empty(batch, size, dtype=torch.int32, device=out.device)
            tile_list_kernel[(size, batch)](
                first,
                last,
                low,
                high,
                tile_list,
                list_length,
                start,
                tiles,
                key_tiles,
                reach,
                DIMS=dims,
                BLOCK=128,
            )
            launch((tile_list, list_length), size, start, splits, out)
    return out.sum(dim=0) if splits > 1 else out[0]


def splits_for(programs: int, key_tiles: int, device: torch.device) -> int:
    """Number of parts of each list, one per program, so that a small problem fills the device."""
    target = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-target // programs), 16, key_tiles))
