"""torch's convolution (cuDNN, or oneDNN on the CPU) with the epilogue, and its gradients.

The epilogue is one Triton kernel on CUDA where Triton is installed, else torch operators in as few
passes as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from segkernels import _native
from segkernels.ops._arguments import pair_or_none
from segkernels.ops._dtypes import compute_dtype
from segkernels.ops.dilated_conv2d.call import Call, Epilogue


@cache
def has_cpu_kernels(dtype: torch.dtype) -> bool:
    """Whether torch has fast convolutions in `dtype` on this CPU.

    For a half-precision dtype that the processor has no instructions for, torch uses plain loops.
    They take many times as long as a convolution in float32, and round partial sums (``pytest
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


def needs_float32(x: torch.Tensor) -> bool:
    """Whether to convert `x` to float32 for the convolution."""
    return x.device.type == "cpu" and not has_cpu_kernels(x.dtype)


def is_half(x: torch.Tensor) -> bool:
    """Whether `x` has a half-precision dtype."""
    return x.dtype in (torch.float16, torch.bfloat16)


def reads_input(x: torch.Tensor, weight: torch.Tensor, c: Call) -> bool:
    """Whether some tap of some output reads the image: a row and a column inside it."""
    for axis in (0, 1):
        size, step, gap = x.size(2 + axis), c.stride[axis], c.dilation[axis]
        for tap in range(weight.size(2 + axis)):
            first = tap * gap - c.padding[axis]
            output = max(0, -(first // step))  # the first whose tap is not before the image
            if output < c.out_size[axis] and first + output * step < size:
                break
        else:
            return False
    return True


def is_faulty(x: torch.Tensor, weight: torch.Tensor, c: Call) -> bool:
    """Whether torch's convolution on the CPU is not to be trusted with this call.

    Where no tap reads the image, oneDNN reads beyond it (torch 2.10 to 2.14). In half precision, on
    processors with instructions for it (AMX), it also computes wrong values for strides that differ
    or an output of one row or column. A contiguous call in float32 has no fault.
    """
    if x.device.type != "cpu":
        return False
    strided = c.stride != (1, 1) and (c.stride[0] != c.stride[1] or 1 in c.out_size)
    return (is_half(x) and strided) or not reads_input(x, weight, c)


def may_be_faulty(x: torch.Tensor, stride: Any, dilation: Any) -> bool:
    """Whether `is_faulty` may be true for float32 or a stride of 1; a quick check.

    Taps and outputs are at most so far apart, and so do not all skip an image that is larger.
    """
    steps, gaps = pair_or_none(stride), pair_or_none(dilation)
    height, width = x.shape[-2:]
    return (
        steps is None
        or gaps is None
        or max(steps[0], gaps[0]) > height
        or max(steps[1], gaps[1]) > width
    )


def forward(x: torch.Tensor, weight: torch.Tensor, e: Epilogue, c: Call) -> torch.Tensor:
    """The convolution of a 4-D `x` with its epilogue, outside autograd."""
    if needs_float32(x) or (is_half(x) and is_faulty(x, weight, c)):
        return forward(x.float(), weight.float(), e.to_float32(), c).to(x.dtype)
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
    """Whether to scale the weight instead of the output: cheaper, and no loss of precision."""
    outputs = x.size(0) * weight.size(0) * c.out_size[0] * c.out_size[1]
    return x.dtype in (torch.float32, torch.float64) and weight.numel() <= outputs


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, c: Call
) -> torch.Tensor:
    rows, columns = _extra_padding(x, weight, c)
    if rows or columns:
        x = F.pad(x, (0, columns, 0, rows))
    if is_faulty(x, weight, c):
        x, weight = x.contiguous(), weight.contiguous()
    if torch.is_autocast_enabled(x.device.type):
        # The public function has cast already; a backward pass under autocast keeps its dtype.
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight, bias, c.stride, c.padding, c.dilation, c.groups)
    return F.conv2d(x, weight, bias, c.stride, c.padding, c.dilation, c.groups)


def _extra_padding(x: torch.Tensor, weight: torch.Tensor, c: Call) -> tuple[int, int]:
    """Rows and columns of padding after the last row and column beyond those before the first."""
    if c.stride != (1, 1):
        return 0, 0
    rows, columns = (
        c.out_size[i] - 1 + c.dilation[i] * (weight.size(2 + i) - 1) + 1 - x.size(2 + i)
        for i in (0, 1)
    )
    return rows - 2 * c.padding[0], columns - 2 * c.padding[1]


def epilogue(out: torch.Tensor, e: Epilogue) -> torch.Tensor:
    """Apply `e` to `out`, the result of a convolution, in place where possible."""
    may_fuse = _native.on_cuda(out.device) and out.dtype != torch.float64
    if may_fuse and (fused := _fused_epilogue()):
        return fused(out, e)
    if e.scale is not None:
        # Batch normalisation in evaluation computes out * scale + shift in one pass, in float32.
        dtype = compute_dtype(out.dtype)
        scale, shift = e.scale.to(dtype), e.folded_shift()
        shift = torch.zeros_like(scale) if shift is None else shift.to(dtype)
        mean, variance = torch.zeros_like(scale), torch.ones_like(scale)
        # Not F.batch_norm, which rejects eps=0 in torch 2.11.
        out = torch.batch_norm(out, scale, shift, mean, variance, False, 0.0, 0.0, False)
    if e.residual is not None:
        out = out.add_(e.residual)
    return out.relu_() if e.activation == "relu" else out


@cache
def _fused_epilogue() -> Callable[[torch.Tensor, Epilogue], torch.Tensor] | None:
    """Return the function that launches the Triton kernel, or None without Triton."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return None
    from segkernels.ops.dilated_conv2d import triton_kernels

    return triton_kernels.apply


def _bfloat16_gradient_is_correct(x: torch.Tensor, c: Call) -> bool:
    """Whether oneDNN's bfloat16 weight gradient is correct in channels_last.

    With a dilation above 1, and channels that are not a multiple of its block of 16, it reads
    beyond its tensors, which gives wrong values, NaN or a crash (torch 2.13). Other processors have
    blocks of 32.
    """
    return c.groups == 1 and x.size(1) % 32 == 0


def gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, c: Call, mask: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the plain convolution with respect to its input and weight.

    Args:
        grad: [N, C_out, H_out, W_out], the gradient with respect to the output.
        x: [N, C, H, W].
        weight: [C_out, C / groups, kh, kw].
        c: the call.
        mask: which gradients to compute; the others are None.
    """
    if not any(mask):
        return None, None
    if needs_float32(x) or (is_half(x) and is_faulty(x, weight, c)):
        wide = gradients(grad.float(), x.float(), weight.float(), c, mask)
        dx, dw = (None if t is None else t.to(x.dtype) for t in wide)
        return dx, dw
    rows, columns = _extra_padding(x, weight, c)
    padded = F.pad(x, (0, columns, 0, rows)) if rows or columns else x
    if x.device.type == "cpu" and (
        is_faulty(x, weight, c)
        or (mask[1] and x.dtype == torch.bfloat16 and not _bfloat16_gradient_is_correct(x, c))
    ):
        padded, grad, weight = padded.contiguous(), grad.contiguous(), weight.contiguous()
    options = (c.stride, c.padding, c.dilation, False, (0, 0), c.groups, (*mask, False))
    dx, dw, _ = torch.ops.aten.convolution_backward(grad, padded, weight, None, *options)
    if mask[0] and (rows or columns):
        dx = dx[..., : x.size(2), : x.size(3)]
    return dx if mask[0] else None, dw if mask[1] else None
