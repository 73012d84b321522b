"""Losses of upsampled logits, without the upsampled logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from segkernels.ops import _arguments, _dtypes, _registry
from segkernels.ops.interpolate import _resampling, _tail, interpolate
from segkernels.ops.upsample_cross_entropy import native, operator
from segkernels.ops.upsample_cross_entropy.native import Loss

_registry.register(
    _registry.Op(
        name="upsample_cross_entropy",
        functions=("upsample_cross_entropy", "upsample_binary_cross_entropy"),
        backends=(("cpu", "c++ simd"), ("cuda", "c++")),
        dtypes=_dtypes.names(),
        layouts=("contiguous", "channels_last", "strided"),
        deterministic=True,
        differentiable=("logits",),
        library_ops=(
            "segkernels::upsample_cross_entropy",
            "segkernels::upsample_cross_entropy_backward",
        ),
        note="half types are computed as float32, and the loss is float32; once differentiable",
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
    """Cross entropy between upsampled logits and labels.

    Equals ``F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode=mode,
    align_corners=align_corners), target, weight, ...)`` in loss and gradient, at the memory of the
    logits and one value a pixel: the N x C x H_out x W_out logits are computed where they are
    used, in the backward pass again. Sums are taken in float64 in a fixed order. Half types are
    computed as float32, and so are the returned loss and the sums of the gradient.

    Args:
        logits: [N, C, H, W], float16, bfloat16, float32 or float64; any strides, any C.
        target: [N, H_out, W_out] labels from 0 to C - 1, int64, int32, int16 or uint8.
        weight: [C], a weight for each class; default 1. It gets no gradient.
        ignore_index: a label that counts neither in the loss nor in the mean, inside [0, C) or not.
        reduction: "mean" (divided by the sum of the weights of the labels that count: NaN when none
            does, as in torch), "sum", or "none".
        label_smoothing: from 0 to 1 (Szegedy et al. 2016, section 7), as in F.cross_entropy.
        mode: "nearest", "nearest-exact", "bilinear" or "bicubic", as in `interpolate`.
        align_corners: as in `interpolate`.

    Returns:
        A scalar, or [N, H_out, W_out] for "none" (0 where ignored); float32, for float64 logits
        float64. The gradient has the dtype and layout of `logits` and can be taken once.

    Raises:
        ValueError: a wrong shape, mode, reduction or label_smoothing; on the CPU also a label
            outside [0, C) that is not `ignore_index`. On CUDA such a pixel is treated as ignored,
            and `segkernels.check` raises.
        TypeError: a dtype that is not one of the above, such as a floating target.
        RuntimeError: tensors on different devices.
    """
    name = "upsample_cross_entropy"
    _tail.check_logits(name, logits)
    if target.dtype not in native.LABELS:
        raise TypeError(
            f"{name}: target must hold labels in int64, int32, int16 or uint8, got {target.dtype}"
        )
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
    r = _tail.resampling(name, logits, tuple(target.shape[-2:]), mode, align_corners)
    if _too_wide(r):
        compute = logits.to(_dtypes.compute_dtype(logits.dtype))
        upsampled = _upsampled(compute, r)
        return F.cross_entropy(
            upsampled, target.long(), weight, None, ignore_index, None, reduction, label_smoothing
        )
    loss = Loss(False, ignore_index, reduction, label_smoothing, r)
    value: torch.Tensor = operator.loss(
        logits, target.contiguous(), _computing(weight, logits), None, loss
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
    """Binary cross entropy between upsampled one-channel logits and masks.

    Equals ``F.binary_cross_entropy_with_logits(F.interpolate(logits, target.shape[-2:], ...),
    target, weight, reduction=reduction, pos_weight=pos_weight)`` in loss and gradient, at the
    memory of `logits`. Half types are computed as float32, and so is the returned loss.

    Args:
        logits: [N, 1, H, W], float16, bfloat16, float32 or float64; any strides.
        target: [N, 1, H_out, W_out]: floating, from 0 to 1; or labels 0, 1 and `ignore_index` in
            bool, uint8, int16, int32 or int64. It gets no gradient.
        weight: like `target`, or broadcast to it: a weight for each pixel; default 1. No gradient.
        reduction: "mean" (over the pixels that are not ignored), "sum", or "none".
        pos_weight: one value: the weight of positive pixels; default 1. No gradient.
        ignore_index: of integer targets: a label that does not count.
        mode: "nearest", "nearest-exact", "bilinear" or "bicubic", as in `interpolate`.
        align_corners: as in `interpolate`.

    Returns:
        A scalar, or [N, 1, H_out, W_out] for "none"; float32, for float64 logits float64.

    Raises:
        ValueError: a wrong shape, mode or reduction; on the CPU also a label other than 0, 1 and
            `ignore_index`. On CUDA it is treated as ignored, and `segkernels.check` raises.
        TypeError: a dtype that is not one of the above.
        RuntimeError: tensors on different devices.
    """
    name = "upsample_binary_cross_entropy"
    _tail.check_logits(name, logits)
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
            f"{name}: pos_weight must hold one value, got shape {tuple(pos_weight.shape)}"
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
    r = _tail.resampling(name, logits, tuple(target.shape[-2:]), mode, align_corners)
    if _too_wide(r):
        raise ValueError(
            f"{name}: target must not be over 700 times as wide as logits, got "
            f"{target.size(-1)} and {logits.size(-1)}"
        )
    loss = Loss(True, ignore_index, reduction, 0.0, r)
    weight, pos_weight = _computing(weight, logits), _computing(pos_weight, logits)
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
            raise ValueError(f"{name}: {argument} gets no gradient, got requires_grad=True")


def _computing(x: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor | None:
    return None if x is None else x.to(_dtypes.compute_dtype(logits.dtype)).contiguous()


def _too_wide(r: _resampling.Resampling) -> bool:
    """Whether no tile of the CUDA kernel's backward pass holds the readers of one column."""
    taps = {"bilinear": 2, "bicubic": 4}.get(r.mode, 1)
    inputs = r.in_size[1]
    apart = inputs - 1 if r.align_corners and inputs > 1 else inputs
    return taps * r.out_size[1] > 3000 * apart


def _upsampled(logits: torch.Tensor, r: _resampling.Resampling) -> torch.Tensor:
    align = None if r.mode.startswith("nearest") else r.align_corners
    return interpolate(logits, r.out_size, mode=r.mode, align_corners=align)
