"""The epilogue of a cuDNN convolution in one pass: the Triton kernel and its launch.

Importing this module requires Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops._operator import memory_format
from segkernels.ops.dilated_conv2d.call import Epilogue

_BLOCK = 4096  # elements per program
_MAX_BLOCK_COLUMNS = 1024  # of them along a row


# Triton compiles separate kernels for integers that are 1 or a multiple of 16. For `inner` this
# allows wider loads and stores; for `rows` it would gain nothing. An argument of None is a
# constant, so its branch is left out of the kernel.
@triton.jit(do_not_specialize=("rows",))
def epilogue(
    y,  # [rows, inner]: [pixels, channels] if CHANNELS_LAST, else [planes, pixels]
    bias,  # [channels] or None, as scale and shift
    scale,
    shift,
    residual,  # [rows, inner] or None
    rows,
    inner,
    channels,
    CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Apply the epilogue to `y` in place: a program computes BLOCK_ROWS x BLOCK_COLUMNS of it."""
    program = tl.program_id(0)
    across = tl.cdiv(inner, BLOCK_COLUMNS)
    row = (program // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = (program % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (i < inner)[None, :]  # [BLOCK_ROWS, BLOCK_COLUMNS], as `at`
    at = row[:, None] * inner + i[None, :]
    if CHANNELS_LAST:
        c = i[None, :]
        channel_mask = (i < inner)[None, :]
    else:
        c = (row % channels)[:, None]
        channel_mask = (row < rows)[:, None]
    acc = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + c, mask=channel_mask, other=0.0).to(tl.float32)
    if scale is not None:
        acc *= tl.load(scale + c, mask=channel_mask, other=0.0).to(tl.float32)
    if shift is not None:
        acc += tl.load(shift + c, mask=channel_mask, other=0.0).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # keeps NaN
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


def apply(y: torch.Tensor, e: Epilogue) -> torch.Tensor:
    """Apply the epilogue in place to `y` and return it.

    `y` is [N, C, H, W], contiguous or channels_last.
    """
    if all(part is None for part in e) or y.numel() == 0:
        return y
    channels_last = not y.is_contiguous()
    layout = memory_format(channels_last)
    residual = None if e.residual is None else e.residual.contiguous(memory_format=layout)
    bias, scale, shift = (None if t is None else t.contiguous() for t in e[:3])  # [C]
    batch, channels, height, width = y.shape
    plane = height * width
    rows, inner = (batch * plane, channels) if channels_last else (batch * channels, plane)
    columns = min(_MAX_BLOCK_COLUMNS, 1 << (inner - 1).bit_length())
    block_rows = _BLOCK // columns
    programs = -(-rows // block_rows) * -(-inner // columns)
    with torch.cuda.device_of(y):  # Triton launches on the current device
        epilogue[(programs,)](
            y,
            bias,
            scale,
            shift,
            residual,
            rows,
            inner,
            channels,
            CHANNELS_LAST=channels_last,
            RELU=e.activation == "relu",
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=columns,
            num_warps=4,
        )
    return y
