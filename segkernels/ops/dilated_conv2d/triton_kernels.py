"""The epilogue behind a convolution of cuDNN's in one pass: the Triton kernel and its launch.

Only where there is Triton can this module be imported.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops.dilated_conv2d.call import Epilogue

_BLOCK = 4096  # elements of a program
_WIDEST = 1024  # of these along a row


# Triton compiles anew for an integer that is 1 or a multiple of 16. Loads and stores are wider
# where rows are multiples of 16; their number gains nothing.
@triton.jit(do_not_specialize=("rows",))
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
    """The epilogue in place.

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
        acc = tl.where(acc < 0.0, 0.0, acc)  # keeps NaN
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


def apply(y: torch.Tensor, e: Epilogue) -> torch.Tensor:
    """The epilogue in place on `y`, contiguous or channels_last; the residual laid out as `y`."""
    bias, scale, shift, residual, activation = e
    nothing = bias is scale is shift is residual is None and activation is None
    if nothing or y.numel() == 0:
        return y
    channels_last = not y.is_contiguous()
    if residual is not None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        residual = residual.contiguous(memory_format=layout)
    batch, channels, height, width = y.shape
    plane = height * width
    rows, inner = (batch * plane, channels) if channels_last else (batch * channels, plane)
    block = min(_WIDEST, 1 << (inner - 1).bit_length())
    block_rows = _BLOCK // block
    programs = -(-rows // block_rows) * -(-inner // block)
    with torch.cuda.device_of(y):  # where Triton launches
        epilogue[(programs,)](
            y,
            None if bias is None else bias.contiguous(),
            None if scale is None else scale.contiguous(),
            None if shift is None else shift.contiguous(),
            residual,
            rows,
            inner,
            channels,
            CHANNELS_LAST=channels_last,
            BIAS=bias is not None,
            SCALE=scale is not None,
            SHIFT=shift is not None,
            RESIDUAL=residual is not None,
            RELU=activation == "relu",
            BR=block_rows,
            BI=block,
            num_warps=4,
        )
    return y
