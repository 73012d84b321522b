"""The convolution and its gradients in Triton, for any CUDA GPU that Triton compiles for.

A tile is a box of output pixels (BN pictures x BH rows x BW columns) times BC output channels. Its
sum runs over the taps whose shifted box meets the image, and over the channels. On compute
capability 9.0 and where memory is aligned for it, boxes are read through tensor descriptors, which
put zeros where they overhang; else through pointers with masks.

No accumulator flows into a branch after its loop: with Triton 3.6 on Hopper such a branch read it
before the asynchronous products had ended. What is decided there is decided at compile time.

WIDEN multiplies in float32: Triton's interpreter multiplies bfloat16 wrongly, without a word.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton compiles anew for an integer that is 1 or a multiple of 16, so nearly for every shape.
# Loads and stores are wider where channels are multiples of 16; the other sizes gain nothing.
UNSPECIALIZED = (
    *("N", "H", "W", "OH", "OW", "dh", "dw", "ph", "pw"),
    *("pictures", "rows", "columns", "blocks", "blocks_c", "blocks_co", "order"),
    *("first_tile", "cuts", "parts"),
)


@triton.jit
def _middle_first(k, count, reverse):
    """0, 1, ... count - 1 from the middle outwards, or, reversed, from the ends inwards."""
    k = tl.where(reverse != 0, count - 1 - k, k)
    return count // 2 + tl.where(k % 2 == 0, k // 2, -((k + 1) // 2))


@triton.jit
def _taps(start, extent, size, kernel, dilation, padding):
    """geometry.tap_range: (first tap, number of taps). Division rounds towards zero here."""
    first = tl.maximum(padding - start - extent + 1, 0)
    first = (first + dilation - 1) // dilation
    reach = size - 1 + padding - start
    last = tl.where(reach < 0, -1, tl.minimum(kernel - 1, tl.maximum(reach, 0) // dilation))
    return first, tl.maximum(last - first + 1, 0)


@triton.jit
def _gaps(taps, branch, BRANCHES: tl.constexpr):
    """Dilation y, x and padding y, x of a branch, from what launch.taps wrote."""
    dh, dw, ph, pw = taps[0], taps[1], taps[2], taps[3]
    for b in tl.static_range(1, BRANCHES):
        dh = tl.where(branch == b, taps[4 * b], dh)
        dw = tl.where(branch == b, taps[4 * b + 1], dw)
        ph = tl.where(branch == b, taps[4 * b + 2], ph)
        pw = tl.where(branch == b, taps[4 * b + 3], pw)
    return dh >> 2, dw >> 2, ph >> 2, pw >> 2


@triton.jit
def _index(i, WIDE: tl.constexpr):
    """`i` to count elements with: in 64 bits where a tensor has 2^31 or more."""
    if WIDE:
        i = i.to(tl.int64)
    return i


@triton.jit
def _pixels(BN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Picture, row and column of each pixel of a box."""
    r = tl.arange(0, BN * BH * BW)
    return r // (BH * BW), (r // BW) % BH, r % BW


@triton.jit
def _tile(tile, pictures, rows, columns, blocks, order, BN, BH, BW, BC):
    """First picture, row, column and output channel of a tile, long tiles first."""
    c = tile % blocks
    tile = tile // blocks
    n = tile % pictures
    tile = tile // pictures
    x = _middle_first(tile % columns, columns, order % 2)
    y = _middle_first(tile // columns, rows, order // 2)
    return n * BN, y * BH, x * BW, c * BC


@triton.jit
def _accumulate(
    x,
    w,
    n0,
    y0,
    x0,
    c0,
    part,
    parts,
    N,
    H,
    W,
    C,
    OH,
    OW,
    CO,
    w_row,
    dh,
    dw,
    ph,
    pw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums of a tile, or of one of `parts` of its loop: [pixels, BC] in float32.

    `w_row` is the weight's first output channel (of a branch). TRANSPOSED takes the weight's taps
    in reverse, its rows as what is summed over and its channels as the output's.
    """
    first_y, taps_y = _taps(y0, tl.minimum(BH, OH - y0), H, KH, dh, ph)
    first_x, taps_x = _taps(x0, tl.minimum(BW, OW - x0), W, KW, dw, pw)
    steps = tl.cdiv(C, BK)
    total = taps_y * taps_x * steps
    taps_x = tl.maximum(taps_x, 1)
    bn, by, bx = _pixels(BN, BH, BW)
    picture = n0 + bn
    k = tl.arange(0, BK)
    co = c0 + tl.arange(0, BC)
    acc = tl.zeros((BN * BH * BW, BC), tl.float32)
    for i in range(total * part // parts, total * (part + 1) // parts):
        tap = i // steps
        k0 = (i % steps) * BK
        ky = first_y + tap // taps_x
        kx = first_x + tap % taps_x
        row = y0 + ky * dh - ph
        column = x0 + kx * dw - pw
        t = KH * KW - 1 - (ky * KW + kx) if TRANSPOSED else ky * KW + kx
        if DESCRIPTORS:
            a = x.load([n0, row, column, k0]).reshape(BN * BH * BW, BK)
            if TRANSPOSED:
                b = w.load([k0, t, c0]).reshape(BK, BC)
            else:
                b = w.load([w_row + c0, t, k0]).reshape(BC, BK).T
        else:
            h = row + by
            v = column + bx
            inside = (picture < N) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
            at = ((_index(picture, WIDE) * H + h) * W + v) * C
            channel = k0 + k
            a = tl.load(
                x + at[:, None] + channel[None, :],
                mask=inside[:, None] & (channel < C)[None, :],
                other=0.0,
            )
            wanted = (channel < C)[:, None] & (co < CO)[None, :]
            if TRANSPOSED:
                at_w = (_index(channel, WIDE) * (KH * KW) + t)[:, None] * CO + co[None, :]
            else:
                at_w = (_index(w_row + co, WIDE) * (KH * KW) + t)[None, :] * C + channel[:, None]
            b = tl.load(w + at_w, mask=wanted, other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _finish(
    acc,
    y,
    bias,
    scale,
    shift,
    residual,
    picture,
    row,
    column,
    c0,
    N,
    OH,
    OW,
    CO,
    channels,
    offset,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BC: tl.constexpr,
):
    """The epilogue, and the store into the channels from `offset` on of `channels`.

    A residual is added in slices of at most 64 channels, or its values and addresses take more
    registers than there are beside the sums.
    """
    if RESIDUAL and BC > 64:
        halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, BC // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        for half in tl.static_range(2):
            _finish(
                first if half == 0 else second,
                y,
                bias,
                scale,
                shift,
                residual,
                picture,
                row,
                column,
                c0 + half * (BC // 2),
                N,
                OH,
                OW,
                CO,
                channels,
                offset,
                BIAS,
                SCALE,
                SHIFT,
                RESIDUAL,
                RELU,
                WIDE,
                BC // 2,
            )
    else:
        _store(
            acc,
            y,
            bias,
            scale,
            shift,
            residual,
            picture,
            row,
            column,
            c0 + tl.arange(0, BC),
            N,
            OH,
            OW,
            CO,
            channels,
            offset,
            BIAS,
            SCALE,
            SHIFT,
            RESIDUAL,
            RELU,
            WIDE,
        )


@triton.jit
def _store(
    acc,
    y,
    bias,
    scale,
    shift,
    residual,
    picture,
    row,
    column,
    co,
    N,
    OH,
    OW,
    CO,
    channels,
    offset,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
):
    there = co < CO
    if BIAS:
        acc += tl.load(bias + offset + co, mask=there, other=0.0).to(tl.float32)[None, :]
    if SCALE:
        acc *= tl.load(scale + offset + co, mask=there, other=0.0).to(tl.float32)[None, :]
    if SHIFT:
        acc += tl.load(shift + offset + co, mask=there, other=0.0).to(tl.float32)[None, :]
    at = ((_index(picture, WIDE) * OH + row) * OW + column) * channels + offset
    at = at[:, None] + co[None, :]
    mask = ((picture < N) & (row < OH) & (column < OW))[:, None] & there[None, :]
    if RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # keeps NaN
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def convolve(
    x,
    w,
    y,
    sums,
    bias,
    scale,
    shift,
    residual,
    first_tile,
    parts,
    N,
    H,
    W,
    C,
    OH,
    OW,
    CO,
    channels,
    pictures,
    rows,
    columns,
    blocks,
    order,
    taps,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BRANCHES: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile each from `first_tile` on; with SPLIT, a part of one, its sums into `sums`.

    Branch b has the weight's rows from b * CO on and writes the output's channels from b * CO on.
    """
    program = tl.program_id(0)
    if SPLIT:
        tile = first_tile + program // parts
        part = program % parts
    else:
        tile = first_tile + program
        part = 0
        parts = 1
    branch = 0
    if BRANCHES > 1:
        each = pictures * rows * columns * blocks
        branch = tile // each
        tile = tile % each
    dh, dw, ph, pw = _gaps(taps, branch, BRANCHES)
    n0, y0, x0, c0 = _tile(tile, pictures, rows, columns, blocks, order, BN, BH, BW, BC)
    acc = _accumulate(
        x,
        w,
        n0,
        y0,
        x0,
        c0,
        part,
        parts,
        N,
        H,
        W,
        C,
        OH,
        OW,
        CO,
        branch * CO,
        dh,
        dw,
        ph,
        pw,
        KH,
        KW,
        BN,
        BH,
        BW,
        BC,
        BK,
        TRANSPOSED,
        DESCRIPTORS,
        WIDE,
        WIDEN,
        PRECISION,
    )
    if SPLIT:
        r = tl.arange(0, BN * BH * BW)
        c = tl.arange(0, BC)
        at = program.to(tl.int64) * (BN * BH * BW * BC)
        tl.store(sums + at + r[:, None] * BC + c[None, :], acc)
    else:
        bn, by, bx = _pixels(BN, BH, BW)
        _finish(
            acc,
            y,
            bias,
            scale,
            shift,
            residual,
            n0 + bn,
            y0 + by,
            x0 + bx,
            c0,
            N,
            OH,
            OW,
            CO,
            channels,
            branch * CO,
            BIAS,
            SCALE,
            SHIFT,
            RESIDUAL,
            RELU,
            WIDE,
            BC,
        )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_parts(
    y,
    sums,
    bias,
    scale,
    shift,
    residual,
    first_tile,
    parts,
    N,
    OH,
    OW,
    CO,
    channels,
    pictures,
    rows,
    columns,
    blocks,
    order,
    BRANCHES: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds the parts of a tile in their order, BP pixels a program, and finishes it."""
    number = tl.program_id(0)
    tile = first_tile + number
    branch = 0
    if BRANCHES > 1:
        each = pictures * rows * columns * blocks
        branch = tile // each
        tile = tile % each
    n0, y0, x0, c0 = _tile(tile, pictures, rows, columns, blocks, order, BN, BH, BW, BC)
    r = tl.program_id(1) * BP + tl.arange(0, BP)
    c = tl.arange(0, BC)
    at = number.to(tl.int64) * parts * (BN * BH * BW * BC)
    acc = tl.zeros((BP, BC), tl.float32)
    for _ in range(parts):
        acc += tl.load(sums + at + r[:, None] * BC + c[None, :])
        at += BN * BH * BW * BC
    _finish(
        acc,
        y,
        bias,
        scale,
        shift,
        residual,
        n0 + r // (BH * BW),
        y0 + (r // BW) % BH,
        x0 + r % BW,
        c0,
        N,
        OH,
        OW,
        CO,
        channels,
        branch * CO,
        BIAS,
        SCALE,
        SHIFT,
        RESIDUAL,
        RELU,
        WIDE,
        BC,
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weight_gradient(
    grad,
    x,
    out,
    parts,
    N,
    H,
    W,
    C,
    OH,
    OW,
    CO,
    blocks_co,
    blocks_c,
    dh,
    dw,
    ph,
    pw,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BCO: tl.constexpr,
    BCI: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BCO, BCI] of one tap, summed over a part of the boxes of outputs that it has inputs for.

    The boxes start at the first such output, so none lies outside. Part p is written to the p-th
    weight of `out`.
    """
    program = tl.program_id(0)
    part = program % parts
    tile = program // parts
    c0 = (tile % blocks_c) * BCI
    tile = tile // blocks_c
    co0 = (tile % blocks_co) * BCO
    t = tile // blocks_co
    move_y = (t // KW) * dh - ph
    move_x = (t % KW) * dw - pw
    from_y = tl.maximum(0, -move_y)
    from_x = tl.maximum(0, -move_x)
    rows = tl.cdiv(tl.maximum(tl.minimum(OH, H - move_y) - from_y, 0), BH)
    columns = tl.cdiv(tl.maximum(tl.minimum(OW, W - move_x) - from_x, 0), BW)
    boxes = rows * columns * tl.cdiv(N, BN)
    columns = tl.maximum(columns, 1)
    rows = tl.maximum(rows, 1)
    bn, by, bx = _pixels(BN, BH, BW)
    co = co0 + tl.arange(0, BCO)
    ci = c0 + tl.arange(0, BCI)
    acc = tl.zeros((BCO, BCI), tl.float32)
    for i in range(boxes * part // parts, boxes * (part + 1) // parts):
        n0 = (i // (rows * columns)) * BN
        y0 = from_y + ((i // columns) % rows) * BH
        x0 = from_x + (i % columns) * BW
        if DESCRIPTORS:
            g = grad.load([n0, y0, x0, co0]).reshape(BN * BH * BW, BCO).T
            v = x.load([n0, y0 + move_y, x0 + move_x, c0]).reshape(BN * BH * BW, BCI)
        else:
            picture = n0 + bn
            row = y0 + by
            column = x0 + bx
            inside = (picture < N) & (row < OH) & (column < OW)
            at = ((_index(picture, WIDE) * OH + row) * OW + column) * CO
            g = tl.load(
                grad + at[None, :] + co[:, None],
                mask=inside[None, :] & (co < CO)[:, None],
                other=0.0,
            )
            row += move_y
            column += move_x
            inside = (picture < N) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            at = ((_index(picture, WIDE) * H + row) * W + column) * C
            v = tl.load(
                x + at[:, None] + ci[None, :], mask=inside[:, None] & (ci < C)[None, :], other=0.0
            )
        if WIDEN:
            g = g.to(tl.float32)
            v = v.to(tl.float32)
        acc = tl.dot(g, v, acc, input_precision=PRECISION)
    at = (part.to(tl.int64) * CO + co) * (KH * KW) + t
    tl.store(
        out + at[:, None] * C + ci[None, :],
        acc.to(out.dtype.element_ty),
        mask=(co < CO)[:, None] & (ci < C)[None, :],
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_parts(out, sums, parts, size, BLOCK: tl.constexpr):
    """Adds `parts` arrays of `size` in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    acc = tl.zeros((BLOCK,), tl.float32)
    at = i
    for _ in range(parts):
        acc += tl.load(sums + at, mask=inside, other=0.0)
        at += size
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def epilogue(
    y,
    bias,
    scale,
    shift,
    residual,
    rows,
    inner,
    C,
    CHANNELS_LAST: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
):
    """The epilogue in place, behind a convolution of cuDNN's.

    `y` is rows x inner: pixels x channels if CHANNELS_LAST, else planes x pixels.
    """
    program = tl.program_id(0)
    across = tl.cdiv(inner, BI)
    row = (program // across).to(tl.int64) * BR + tl.arange(0, BR)
    i = (program % across) * BI + tl.arange(0, BI)
    mask = (row < rows)[:, None] & (i < inner)[None, :]
    at = row[:, None] * inner + i[None, :]
    if CHANNELS_LAST:
        c = i[None, :]
        there = (i < inner)[None, :]
    else:
        c = (row % C)[:, None]
        there = (row < rows)[:, None]
    acc = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias + c, mask=there, other=0.0).to(tl.float32)
    if SCALE:
        acc *= tl.load(scale + c, mask=there, other=0.0).to(tl.float32)
    if SHIFT:
        acc += tl.load(shift + c, mask=there, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)
