"""fold_batch_norm: batch normalisation in evaluation mode as a per-channel scale and shift."""

from __future__ import annotations

import torch

BatchNorm = torch.nn.BatchNorm2d | torch.nn.SyncBatchNorm
BATCH_NORMS = (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)


def fold_batch_norm(conv: torch.nn.Conv2d, bn: BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold batch normalisation in evaluation mode, and the convolution's bias, to scale and shift.

        scale = gamma / sqrt(var + eps)
        shift = beta + (bias - mean) * scale

    Then ``bn.eval()(conv(x))`` equals ``conv2d(x, conv.weight) * scale + shift``: pass scale and
    shift to `segkernels.dilated_conv2d`, without the convolution's bias. From Ioffe and Szegedy
    2015, "Batch normalization", section 3.1. The modules are not modified, and their training mode
    is ignored. Differentiable with respect to gamma, beta and the bias.

    Args:
        conv: the convolution before `bn`.
        bn: a batch normalisation with running statistics; gamma and beta are optional.

    Returns:
        (scale, shift), both [C_out]; float64 if one of the vectors is, else float32.

    Raises:
        TypeError: `conv` is not a `torch.nn.Conv2d`, or `bn` is not a `torch.nn.BatchNorm2d` or
            `torch.nn.SyncBatchNorm`.
        ValueError: `bn` has no running statistics, or its number of channels is not the number of
            output channels of `conv`.
    """
    if not isinstance(conv, torch.nn.Conv2d):
        raise TypeError(f"fold_batch_norm: conv must be torch.nn.Conv2d, got {type(conv)}")
    if not isinstance(bn, BATCH_NORMS):
        raise TypeError(f"fold_batch_norm: bn must be torch.nn.BatchNorm2d, got {type(bn)}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            "fold_batch_norm: bn must have running statistics (track_running_stats=True), got none"
        )
    if bn.num_features != conv.out_channels:
        raise ValueError(
            f"fold_batch_norm: bn must have conv's {conv.out_channels} output channels, got "
            f"num_features={bn.num_features}"
        )
    vectors = (conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    wide = any(v is not None and v.dtype == torch.float64 for v in vectors)
    dtype = torch.float64 if wide else torch.float32
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    mean = bn.running_mean if conv.bias is None else bn.running_mean - conv.bias
    shift = -mean * scale if bn.bias is None else torch.addcmul(bn.bias.to(dtype), -mean, scale)
    return scale, shift


def is_plain(module: torch.nn.Module, *types: type[torch.nn.Module]) -> bool:
    """Whether `module` is exactly of one of these types, not a subclass, and has no hooks."""
    return type(module) in types and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def foldable(bn: torch.nn.Module) -> bool:
    """Whether `bn` is a batch normalisation without hooks that uses its running statistics."""
    return (
        is_plain(bn, *BATCH_NORMS)
        and not bn.training
        and bn.running_mean is not None
        and bn.running_var is not None
    )
