"""Cross entropy losses of upsampled logits, without storing the upsampled logits."""

from __future__ import annotations

import torch

from segkernels.ops import _arguments, _dtypes, _operator, _registry
from segkernels.ops.interpolate import _logits, _resampling
from segkernels.ops.upsample_cross_entropy import by_torch, native, operator
from segkernels.ops.upsample_cross_entropy.native import Loss

_registry.register(
    _registry.Op(
        name="upsample_cross_entropy",
        functions=("upsample_cross_entropy", "upsample_binary_cross_entropy"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        layouts=("contiguous", "channels_last", "strided"),
        differentiable=("logits",),
        library_ops=(
            "segkernels::upsample_cross_entropy",
            "segkernels::upsample_cross_entropy_backward",
        ),
        note="half precision is computed in float32, and the loss is float32; once differentiable",
    )
)


def upsample_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> torch.Tensor:
    """Compute the cross entropy between upsampled logits and labels.

    Loss and gradient equal those of ``F.cross_entropy(F.interpolate(logits, target.shape[-2:],
    mode=mode, align_corners=align_corners), target, weight, ...)``. The memory is that of the
    logits and two values per pixel: the N x C x H_out x W_out upsampled logits are computed inside
    the kernels, in the forward and again in the backward pass. The loss is summed in float64 in a
    fixed order. Half precision (float16 and bfloat16) is computed in float32, the gradient is
    accumulated in float32, and the returned loss is float32.

    Args:
        logits: [N, C, H, W], float16, bfloat16, float32 or float64; any strides, any C.
        target: [N, H_out, W_out] labels from 0 to C - 1, int64, int32, int16 or uint8.
        weight: [C], a weight for each class; default 1. Not differentiable.
        ignore_index: label of pixels that are left out of the loss and the mean; inside [0, C) or
            outside.
        reduction: "mean" (the sum divided by the sum of the weights of the labels that are not
            ignored; NaN if that is 0, as in torch), "sum" or "none".
        label_smoothing: from 0 to 1 (Szegedy et al. 2016, section 7), as in F.cross_entropy.
        mode: "nearest", "nearest-exact", "bilinear" or "bicubic", as in `interpolate`.
        align_corners: as in `interpolate`.

    Returns:
        A scalar, or [N, H_out, W_out] for "none" (0 where ignored), in float32, or float64 for
        float64 logits. The gradient has the dtype and layout of `logits`. There is no double
        backward.

    Raises:
        ValueError: a shape, mode, reduction or label_smoothing is invalid, or, on the CPU, a label
            is outside [0, C) and not `ignore_index`. On CUDA such a pixel is ignored, and
            `segkernels.check` raises.
        TypeError: a dtype is not one of the above, such as a floating target.
        RuntimeError: the tensors are on different devices.
    """
    name = "upsample_cross_entropy"
    _logits.check_logits(name, logits)
    if target.dtype not in native.LABELS:
        raise TypeError(f"{name}: target must be int64, int32, int16 or uint8, got {target.dtype}")
    if target.dim() != 3 or target.size(0) != logits.size(0):
        raise ValueError(
            f"{name}: target must be [{logits.size(0)}, H, W], got shape {tuple(target.shape)}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if weight is not None and weight.shape != (logits.size(1),):
        raise ValueError(
            f"{name}: weight must be [{logits.size(1)}], got shape {tuple(weight.shape)}"
        )
    _check(name, logits, reduction, target=target, weight=weight)
    if _operator.must_call_torch():
        options = ignore_index, reduction, label_smoothing, mode, align_corners
        return by_torch.cross_entropy(name, logits, target, weight, *options)
    r = _logits.resampling(name, logits, tuple(target.shape[-2:]), mode, align_corners)
    if r.out_size[1] > _max_width(r):
        logits, r = _stored(logits, r)
    loss = Loss(False, ignore_index, reduction, label_smoothing, r)
    value: torch.Tensor = operator.loss(
        logits, target.contiguous(), _to_compute_dtype(weight, logits), None, loss
    )[0]
    return value


def upsample_binary_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    pos_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> torch.Tensor:
    """Compute the binary cross entropy between upsampled one-channel logits and masks.

    Loss and gradient equal those of ``F.binary_cross_entropy_with_logits(F.interpolate(logits,
    target.shape[-2:], ...), target, weight, reduction=reduction, pos_weight=pos_weight)``. The
    memory is that of `logits`: the upsampled logits are not stored. Half precision (float16 and
    bfloat16) is computed in float32, and the returned loss is float32.

    Args:
        logits: [N, 1, H, W], float16, bfloat16, float32 or float64; any strides.
        target: [N, 1, H_out, W_out]: floating values from 0 to 1, or labels 0, 1 and `ignore_index`
            in bool, uint8, int16, int32 or int64. Not differentiable.
        weight: weight of each pixel, broadcast to the shape of `target`; default 1. Not
            differentiable.
        reduction: "mean" (over the pixels that are not ignored), "sum" or "none".
        pos_weight: one value, the weight of positive pixels; default 1. Not differentiable.
        ignore_index: in an integer target, the label of pixels that are left out of the loss.
        mode: "nearest", "nearest-exact", "bilinear" or "bicubic", as in `interpolate`.
        align_corners: as in `interpolate`.

    Returns:
        A scalar, or [N, 1, H_out, W_out] for "none", in float32, or float64 for float64 logits.
        There is no double backward.

    Raises:
        ValueError: a shape, mode or reduction is invalid, or, on the CPU, a label is not 0, 1 or
            `ignore_index`. On CUDA such a pixel is ignored, and `segkernels.check` raises.
        TypeError: a dtype is not one of the above.
        RuntimeError: the tensors are on different devices.
    """
    name = "upsample_binary_cross_entropy"
    _logits.check_logits(name, logits)
    if logits.size(1) != 1:
        raise ValueError(f"{name}: logits must be [N, 1, H, W], got shape {tuple(logits.shape)}")
    if target.dim() != 4 or target.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"{name}: target must be [{logits.size(0)}, 1, H, W], got shape {tuple(target.shape)}"
        )
    if target.dtype == torch.bool:
        target = target.to(torch.uint8)
    elif target.is_floating_point():
        target = target.to(_dtypes.compute_dtype(target.dtype))
    if target.dtype not in native.TARGETS:
        raise TypeError(
            f"{name}: target must be floating, bool, uint8, int16, int32 or int64, got "
            f"{target.dtype}"
        )
    if pos_weight is not None and pos_weight.numel() != 1:
        raise ValueError(
            f"{name}: pos_weight must have one element, got shape {tuple(pos_weight.shape)}"
        )
    _check(name, logits, reduction, target=target, weight=weight, pos_weight=pos_weight)
    if weight is not None:
        try:
            weight = weight.expand(target.shape)
        except RuntimeError:
            raise ValueError(
                f"{name}: weight must broadcast to {tuple(target.shape)}, got shape "
                f"{tuple(weight.shape)}"
            ) from None
    if _operator.must_call_torch():
        options = reduction, pos_weight, ignore_index, mode, align_corners
        return by_torch.binary_cross_entropy(name, logits, target, weight, *options)
    r = _logits.resampling(name, logits, tuple(target.shape[-2:]), mode, align_corners)
    if r.out_size[1] > _max_width(r):
        logits, r = _stored(logits, r)
    loss = Loss(True, ignore_index, reduction, 0.0, r)
    weight, pos_weight = _to_compute_dtype(weight, logits), _to_compute_dtype(pos_weight, logits)
    value: torch.Tensor = operator.loss(logits, target.contiguous(), weight, pos_weight, loss)[0]
    return value


def _check(name: str, logits: torch.Tensor, reduction: str, **tensors: torch.Tensor | None) -> None:
    _arguments.check_choice(reduction, "reduction", native.REDUCTIONS, name)
    for argument, x in tensors.items():
        if x is not None and x.device != logits.device:
            raise RuntimeError(
                f"{name}: {argument} must be on {logits.device}, as logits are, got {x.device}"
            )
        if x is not None and x.requires_grad:
            raise ValueError(f"{name}: {argument} must not require grad, got requires_grad=True")


def _to_compute_dtype(x: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor | None:
    return None if x is None else x.to(_dtypes.compute_dtype(logits.dtype)).contiguous()


def _stored(
    logits: torch.Tensor, r: _resampling.Resampling
) -> tuple[torch.Tensor, _resampling.Resampling]:
    """Return upsampled logits that are stored, for sizes that the kernels do not support."""
    upsampled = _logits.upsample("", logits, r.out_size, r.mode, r.align_corners)
    return upsampled, _logits.resampling("", upsampled, r.out_size, "nearest", False)


def _max_width(r: _resampling.Resampling) -> int:
    """Return the largest output width of the kernels.

    For a wider output a column of logits has too many readers for a tile of the CUDA backward pass.
    """
    taps = {"bilinear": 2, "bicubic": 4}.get(r.mode, 1)
    width = r.in_size[1]
    intervals = width - 1 if r.align_corners and width > 1 else width
    return 3000 * intervals // taps
