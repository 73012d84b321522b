"""The sum of dilated convolutions in Triton, from the tile of dilated_conv2d's.

The branches side by side need no kernel of their own: `convolve` of dilated_conv2d takes several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from segkernels.ops.dilated_conv2d.triton_kernels import _accumulate, _tile


@triton.jit
def branch_sums(
    x,
    w,
    sums,
    cuts,
    N,
    H,
    W,
    C,
    CO,
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
    DESCRIPTORS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One of `cuts` parts of one branch's sums of a tile, for finish_parts to add in their order.

    `taps` holds (dilation y, x, padding y, x) of each branch. Branch b has the weight's rows from
    b * CO on.
    """
    program = tl.program_id(0)
    tile = program // (BRANCHES * cuts)
    part = program % (BRANCHES * cuts)
    branch = part // cuts
    dh, dw, ph, pw = taps[0], taps[1], taps[2], taps[3]
    for b in tl.static_range(1, BRANCHES):
        dh = tl.where(branch == b, taps[4 * b], dh)
        dw = tl.where(branch == b, taps[4 * b + 1], dw)
        ph = tl.where(branch == b, taps[4 * b + 2], ph)
        pw = tl.where(branch == b, taps[4 * b + 3], pw)
    n0, y0, x0, c0 = _tile(tile, pictures, rows, columns, blocks, order, BN, BH, BW, BC)
    acc = _accumulate(
        x,
        w,
        n0,
        y0,
        x0,
        c0,
        part % cuts,
        cuts,
        N,
        H,
        W,
        C,
        H,
        W,
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
        False,
        DESCRIPTORS,
        WIDE,
        WIDEN,
        PRECISION,
    )
    r = tl.arange(0, BN * BH * BW)
    c = tl.arange(0, BC)
    at = program.to(tl.int64) * (BN * BH * BW * BC)
    tl.store(sums + at + r[:, None] * BC + c[None, :], acc)
