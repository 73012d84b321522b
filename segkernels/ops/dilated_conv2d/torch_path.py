"""The convolution by torch (oneDNN, cuDNN), with the epilogue in as few passes as torch has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from segkernels import _native
from segkernels.ops._dtypes import compute_dtype
from segkernels.ops.dilated_conv2d.call import Call, Epilogue


@cache
def has_cpu_kernels(dtype: torch.dtype) -> bool:
    """Whether a convolution in `dtype` on this CPU is best left to torch as it is.

    For a half type that the processor has no instructions for torch has plain loops, which take
    many times as long as a convolution in float32, and round partial sums (``pytest
    benchmarks/bench_dilated_conv2d.py --full --benchmark-only -k "-float16-NHWC"``).
    """
    names = {
        torch.float16: "_is_mkldnn_fp16_supported",
        torch.bfloat16: "_is_mkldnn_bf16_supported",
    }
    if dtype not in names:
        return True
    supported = getattr(torch.ops.mkldnn, names[dtype], None)
    return supported is not None and bool(supported())


def to_widen(x: torch.Tensor) -> bool:
    """Whether `x` is better convolved in float32."""
    return x.device.type == "cpu" and not has_cpu_kernels(x.dtype)


def may_crash(x: torch.Tensor, stride: Any) -> bool:
    """Whether torch's convolution of `x` in channels_last may crash on the CPU.

    oneDNN reads beyond an input of one column where the stride and the padding have every tap step
    over it (torch 2.10 to 2.14).
    """
    return x.shape[-1:] == (1,) and stride not in (1, (1, 1))


def forward(x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call) -> torch.Tensor:
    """The convolution and its epilogue, of a 4-D `x`, out of autograd's sight."""
    if to_widen(x):
        return forward(x.float(), weight.float(), e.widened(), c).to(x.dtype)
    if e.scale is None:
        bias = e.folded_shift()
        out = _convolve(x, weight, None if bias is None else bias.to(x.dtype), c)
        e = e._replace(bias=None, shift=None)
    elif x.device.type == "cpu" and _worth_folding(x, weight, c):
        bias = e.folded_shift()
        scaled = weight * e.scale.to(x.dtype)[:, None, None, None]
        out = _convolve(x, scaled, None if bias is None else bias.to(x.dtype), c)
        e = e._replace(bias=None, scale=None, shift=None)
    else:
        out = _convolve(x, weight, None, c)
    return epilogue(out, e)


def _worth_folding(x: torch.Tensor, weight: torch.Tensor, c: Call) -> bool:
    """Whether scaling the weight costs less than scaling the output, and no rounding that shows."""
    outputs = x.size(0) * weight.size(0) * c.out_size[0] * c.out_size[1]
    return x.dtype in (torch.float32, torch.float64) and weight.numel() <= outputs


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c: Call
) -> torch.Tensor:
    x, padding = _padded(x, weight, c)
    if x.device.type == "cpu" and may_crash(x, c.stride):
        x, weight = x.contiguous(), weight.contiguous()
    if torch.is_autocast_enabled(x.device.type):
        # The public function has cast; a backward pass under autocast keeps its dtype.
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight, bias, c.stride, padding, c.dilation, c.groups)
    return F.conv2d(x, weight, bias, c.stride, padding, c.dilation, c.groups)


def _more_after(x: torch.Tensor, weight: torch.Tensor, c: Call) -> tuple[int, int]:
    """How much more padding there is behind the last row and column than before the first."""
    if c.stride != (1, 1):
        return 0, 0
    rows, columns = (
        c.out_size[i] - 1 + c.dilation[i] * (weight.size(2 + i) - 1) + 1 - x.size(2 + i)
        for i in (0, 1)
    )
    return rows - 2 * c.padding[0], columns - 2 * c.padding[1]


def _padded(x: torch.Tensor, weight: torch.Tensor, c: Call) -> tuple[torch.Tensor, tuple[int, int]]:
    """`x` with what padding="same" adds on one side only, and the padding of both sides."""
    rows, columns = _more_after(x, weight, c)
    if rows or columns:
        x = F.pad(x, (0, columns, 0, rows))
    return x, c.padding


def epilogue(out: torch.Tensor, e: Epilogue) -> torch.Tensor:
    """`e` on a fresh `out`, in place where it can be."""
    may_fuse = _native.on_cuda(out.device) and out.dtype != torch.float64
    if may_fuse and (in_one_pass := _fused_epilogue()):
        return in_one_pass(out, e)
    if e.scale is not None:
        # Batch normalisation in evaluation is out * scale + shift in one pass and in float32.
        dtype = compute_dtype(out.dtype)
        scale, shift = e.scale.to(dtype), e.folded_shift()
        shift = torch.zeros_like(scale) if shift is None else shift.to(dtype)
        mean, variance = torch.zeros_like(scale), torch.ones_like(scale)
        # Not F.batch_norm: that of torch 2.11 refuses eps=0.
        out = torch.batch_norm(out, scale, shift, mean, variance, False, 0.0, 0.0, False)
    if e.residual is not None:
        out = out.add_(e.residual)
    return out.relu_() if e.activation == "relu" else out


@cache
def _fused_epilogue() -> Callable[[torch.Tensor, Epilogue], torch.Tensor] | None:
    """The Triton kernel that has the epilogue in one pass, or None where there is no Triton."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from segkernels.ops.dilated_conv2d import triton_kernels

    return triton_kernels.apply


def _whole(x: torch.Tensor, c: Call) -> bool:
    """Whether oneDNN's bfloat16 weight gradient is right in channels_last.

    It reads beyond its tensors where taps are apart and channels fill no block of 16: wrong values,
    NaN, or a crash (torch 2.13). Other processors' kernels have blocks of 32.
    """
    return c.groups == 1 and x.size(1) % 32 == 0


def gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, c: Call, mask: tuple[bool, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the plain convolution's input and weight; an empty tensor for one not wanted."""
    if to_widen(x):
        dx, dw = gradients(grad.float(), x.float(), weight.float(), c, mask)
        return dx.to(x.dtype), dw.to(x.dtype)
    rows, columns = _more_after(x, weight, c)
    wide = F.pad(x, (0, columns, 0, rows)) if rows or columns else x
    if x.device.type == "cpu" and (
        may_crash(wide, c.stride) or (mask[1] and x.dtype == torch.bfloat16 and not _whole(x, c))
    ):
        wide, grad, weight = wide.contiguous(), grad.contiguous(), weight.contiguous()
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad,
        wide,
        weight,
        None,
        c.stride,
        c.padding,
        c.dilation,
        False,
        (0, 0),
        c.groups,
        (*mask, False),
    )
    if mask[0] and (rows or columns):
        dx = dx[..., : x.size(2), : x.size(3)]
    none = grad.new_empty(0)
    return dx if mask[0] else none, dw if mask[1] else none
