"""The epilogue of a cuDNN convolution in one pass: the Triton kernel and its launch.

Importing this module requires Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops.dilated_conv2d.call import Epilogue

_BLOCK = 4096  # elements per program
_MAX_BLOCK_COLUMNS = 1024  # of them along a row


# Triton compiles separate kernels for integers that are 1 or a multiple of 16. For `inner` this
# allows wider loads and stores; for `rows` it would gain nothing.
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
    """Apply the epilogue to `y` in place.

    `y` is (rows, inner): (pixels, channels) if CHANNELS_LAST, else (planes, pixels).
    """
    program = tl.program_id(0)
    across = tl.cdiv(inner, BI)
    row = (program // across).to(tl.int64) * BR + tl.arange(0, BR)
    i = (program % across) * BI + tl.arange(0, BI)
    mask = (row < rows)[:, None] & (i < inner)[None, :]
    at = row[:, None] * inner + i[None, :]
    if CHANNELS_LAST:
        c = i[None, :]
        channel_mask = (i < inner)[None, :]
    else:
        c = (row % C)[:, None]
        channel_mask = (row < rows)[:, None]
    acc = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        acc += tl.load(bias + c, mask=channel_mask, other=0.0).to(tl.float32)
    if SCALE:
        acc *= tl.load(scale + c, mask=channel_mask, other=0.0).to(tl.float32)
    if SHIFT:
        acc += tl.load(shift + c, mask=channel_mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # keeps NaN
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


def apply(y: torch.Tensor, e: Epilogue) -> torch.Tensor:
    """Apply the epilogue in place to `y`, which must be contiguous or channels_last; return it."""
    bias, scale, shift, residual, activation = e
    is_identity = bias is scale is shift is residual is None and activation is None
    if is_identity or y.numel() == 0:
        return y
    channels_last = not y.is_contiguous()
    if residual is not None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        residual = residual.contiguous(memory_format=layout)
    batch, channels, height, width = y.shape
    plane = height * width
    rows, inner = (batch * plane, channels) if channels_last else (batch * channels, plane)
    block = min(_MAX_BLOCK_COLUMNS, 1 << (inner - 1).bit_length())
    block_rows = _BLOCK // block
    programs = -(-rows // block_rows) * -(-inner // block)
    with torch.cuda.device_of(y):  # Triton launches on the current device
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
