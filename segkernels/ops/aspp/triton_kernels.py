"""The sum of dilated convolutions in Triton, from the tile of dilated_conv2d's.

The branches side by side need no kernel of their own: `convolve` of dilated_conv2d takes several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from segkernels.ops.dilated_conv2d.triton_kernels import (
    UNSPECIALIZED,
    _accumulate,
    _gaps,
    _tile,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
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

    Branch b has the weight's rows from b * CO on.
    """
    program = tl.program_id(0)
    tile = program // (BRANCHES * cuts)
    part = program % (BRANCHES * cuts)
    branch = part // cuts
    dh, dw, ph, pw = _gaps(taps, branch, BRANCHES)
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
