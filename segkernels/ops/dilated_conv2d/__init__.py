"""dilated_conv2d: convolution with a fused epilogue, which can skip products with the padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from segkernels.ops import _arguments, _operator, _registry
from segkernels.ops._arguments import Int2
from segkernels.ops.dilated_conv2d import cudnn, hopper, operator
from segkernels.ops.dilated_conv2d.call import Call

_registry.register(
    _registry.Op(
        name="dilated_conv2d",
        functions=("dilated_conv2d",),
        backends=(("cpu", "torch"), ("cuda", "torch, c++")),
        layouts=("contiguous", "channels_last"),
        differentiable=("input", "weight", "bias", "scale", "shift", "residual"),
        library_ops=("segkernels::dilated_conv2d", "segkernels::dilated_conv2d_backward"),
        note="differentiable any number of times; on CUDA cuDNN, which is deterministic in torch's "
        "deterministic mode, or on Hopper for some shapes the sm90 kernel",
    )
)

ACTIVATIONS = (None, "relu")
Backend = Literal["auto", "sm90", "torch"]
BACKENDS = get_args(Backend)


def dilated_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`torch.nn.functional.conv2d` with a fused epilogue: scale, shift, residual, activation.

        y = activation((conv2d(input, weight, bias) * scale + shift) + residual)

    Dilated (atrous) convolution as in Chen et al. 2015 ("Semantic image segmentation with deep
    convolutional nets and fully connected CRFs", section 3.1) and Yu and Koltun 2016 ("Multi-scale
    context aggregation by dilated convolutions", equation 2). To fold batch normalisation in
    evaluation mode, set `scale` to gamma / sqrt(var + eps) and `shift` to beta - mean * scale.

    Under autocast `input`, `weight`, `bias` and `residual` are cast as the arguments of
    `torch.nn.functional.conv2d` are. Half precision is accumulated in float32. Differentiable any
    number of times, with respect to all tensors.

    Args:
        input: [N, C, H, W] or [C, H, W]; float16, bfloat16, float32 or float64. Contiguous and
            channels_last layouts are not copied.
        weight: [C_out, C / groups, kh, kw], in the dtype of `input`.
        bias: [C_out], in the dtype of `input`.
        stride: pixels between neighbouring outputs: one int, or (rows, columns).
        padding: zeros on each side: one int, (rows, columns), "same" (the output has the size of
            the input) or "valid" (no padding).
        dilation: pixels between neighbouring taps: one int, or (rows, columns).
        groups: number of groups of channels that are convolved separately.
        scale: [C_out], in the dtype of `input` or float32; None: 1.
        shift: [C_out], in the dtype of `input` or float32; None: 0.
        residual: [N, C_out, H_out, W_out], or without N like `input`, in the dtype of the output.
        activation: None or "relu".
        backend: "auto", "torch" or "sm90".
            "torch" uses oneDNN or cuDNN and supports all arguments.
            "sm90" uses a kernel for compute capability 9.0, with stride 1, groups 1, kernels up to
            7 x 7, and no float64; it raises ValueError for other calls. It rounds float32 operands
            to tf32, and raises where ``torch.backends.cudnn.conv`` does not allow tf32. torch
            computes the weight gradient of float32. In the weight gradient of other dtypes, NaN and
            infinity in `input` can reach taps that do not read them.
            "auto" uses "sm90" where a cost model estimates that it is faster (channels_last, large
            dilations), else "torch".

    Returns:
        [N, C_out, H_out, W_out], or without N like `input`, in the dtype of `input`; channels_last
        if `input` or `weight` is, as in torch.

    Raises:
        RuntimeError: arguments that `torch.nn.functional.conv2d` rejects, with torch's message.
        ValueError: `scale`, `shift` or `residual` with another shape, dtype or device; an unknown
            `activation` or `backend`; a call that `backend` does not support.
        TypeError: arguments of another type; torch's message for those of
            `torch.nn.functional.conv2d`.
    """
    _arguments.check_choice(activation, "activation", ACTIVATIONS, "dilated_conv2d")
    _arguments.check_choice(backend, "backend", BACKENDS, "dilated_conv2d")
    for name, value in (("scale", scale), ("shift", shift), ("residual", residual)):
        if value is not None:
            _arguments.check_tensor(value, name, "dilated_conv2d")
    options: tuple[Any, ...] = (stride, padding, dilation, groups)
    if scale is shift is residual is None and _torch_suffices(
        input, weight, bias, options, backend
    ):
        out = F.conv2d(input, weight, bias, *options)
        last = _operator.is_channels_last(input) or _operator.is_channels_last(weight)
        out = out.contiguous(memory_format=_operator.memory_format(last))
        # In place is safe: the backward of the convolution does not need its result.
        return out.relu_() if activation == "relu" else out
    input, weight, bias, residual = _arguments.autocast(input, weight, bias, residual)
    c = _make_call(input, weight, bias, options, backend)
    if c is None:
        # Either the arguments are invalid, and torch raises, or only torch supports them.
        out = F.conv2d(input, weight, bias, *options)
        _check_epilogue(out, out.shape, out.size(-3), scale, shift, residual)
        return apply_epilogue(out, scale, shift, residual, activation)
    shape = (*input.shape[:-3], weight.size(0), *c.out_size)
    _check_epilogue(input, shape, weight.size(0), scale, shift, residual)
    unbatched = input.dim() == 3
    if unbatched:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    hopper.check(input, weight, c)
    record = operator.Convolution(c, activation)
    y: torch.Tensor = operator.convolve(input, weight, bias, scale, shift, residual, record)
    return y.squeeze(0) if unbatched else y


def _torch_suffices(
    input: Any, weight: Any, bias: Any, options: tuple[Any, ...], backend: str
) -> bool:
    """Whether the call is the same as torch's convolution with torch's own gradients.

    On the CPU it is, except in half precision (cudnn.py). This check avoids the overhead of the
    operator, which matters for small convolutions.
    """
    return (
        isinstance(input, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and input.dtype is weight.dtype
        and (input.dtype is torch.float32 or input.dtype is torch.bfloat16)
        and input.is_cpu
        and input.dim() == weight.dim() == 4
        and backend in ("auto", "torch")
        and _operator.is_eager(input)
        and not _operator.under_functorch()
        and not torch.is_autocast_enabled("cpu")
        and not cudnn.may_be_faulty(input, options[0], options[2])
        and (
            input.dtype is torch.float32
            or (
                options[0] in (1, (1, 1))
                and cudnn.has_cpu_kernels(input.dtype)
                and not _operator.wants_grad(input, weight, bias)
            )
        )
    )


def _make_call(
    input: Any, weight: Any, bias: Any, options: tuple[Any, ...], backend: str
) -> Call | None:
    """Check the arguments; return the Call, or None if torch should compute or reject the call.

    `options` are stride, padding, dilation and groups.
    """
    stride, padding, dilation, groups = options
    if not isinstance(input, torch.Tensor) or not isinstance(weight, torch.Tensor):
        return None
    if _operator.must_call_torch():
        return None
    if bias is not None and not isinstance(bias, torch.Tensor):
        return None
    if not _arguments.is_supported(input):
        return None
    if any(
        t.dtype != input.dtype or t.device != input.device for t in (weight, bias) if t is not None
    ):
        return None
    steps, gaps = _arguments.pair_or_none(stride), _arguments.pair_or_none(dilation)
    if steps is None or gaps is None or not _arguments.is_int(groups):
        return None
    if min(*steps, *gaps, groups) < 1 or input.dim() not in (3, 4) or weight.dim() != 4:
        return None
    out_channels, per_group, *kernel = weight.shape
    if out_channels < 1 or per_group < 1 or min(kernel) < 1 or out_channels % groups:
        return None
    if bias is not None and (bias.dim() != 1 or bias.size(0) != out_channels):
        return None
    channels, *size = input.shape[-3:]
    # Not min(size), whose result under torch.export depends on which size is smaller.
    if channels != per_group * groups or any(n < 1 for n in size):
        return None
    extent = [gaps[i] * (kernel[i] - 1) for i in (0, 1)]
    pads = _padding_of(padding, extent, steps)
    if pads is None:
        return None
    before, after = pads
    room = [size[i] + before[i] + after[i] - extent[i] - 1 for i in (0, 1)]
    if any(n < 0 for n in (*room, *before)):
        return None
    out_size = (room[0] // steps[0] + 1, room[1] // steps[1] + 1)
    image = input if input.dim() == 4 else input.unsqueeze(0)
    channels_last = _operator.is_channels_last(image) or _operator.is_channels_last(weight)
    return Call(steps, before, gaps, groups, out_size, channels_last, backend)


def _padding_of(padding: Any, extent: list[int], stride: Int2) -> tuple[Int2, Int2] | None:
    """Return the padding before the first and after the last row and column; None if invalid.

    `extent` is the distance from the first to the last tap of each axis.
    """
    if padding == "same":
        if stride != (1, 1):
            return None
        before = (extent[0] // 2, extent[1] // 2)
        return before, (extent[0] - before[0], extent[1] - before[1])
    if padding == "valid":
        return (0, 0), (0, 0)
    pads = _arguments.pair_or_none(padding)
    return None if pads is None else (pads, pads)


def _check_epilogue(
    like: torch.Tensor,
    shape: Sequence[int],
    out_channels: int,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    _arguments.check_vector(scale, "scale", out_channels, like, "dilated_conv2d")
    _arguments.check_vector(shift, "shift", out_channels, like, "dilated_conv2d")
    if residual is not None:
        dtypes = {like.dtype}
        _arguments.check_like(residual, "residual", shape, dtypes, like, "dilated_conv2d")


def apply_epilogue(
    out: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str | None,
) -> torch.Tensor:
    """Apply the epilogue to a convolution with torch's functions."""
    dtype = out.dtype
    if scale is not None:
        out = out * scale[:, None, None]
    if shift is not None:
        out = out + shift[:, None, None]
    if residual is not None:
        out = out + residual
    out = out.to(dtype)  # a float32 scale or shift has made float32 of half precision
    return F.relu(out) if activation == "relu" else out
