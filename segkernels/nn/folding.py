"""Batch normalisation in evaluation as a scale and a shift, kept until something changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch

from segkernels import _native
from segkernels.ops import _operator

BatchNorm = torch.nn.BatchNorm2d | torch.nn.SyncBatchNorm
Pair = tuple[torch.nn.Conv2d, BatchNorm]
Folded = tuple[torch.Tensor, torch.Tensor]


def fold_batch_norm(conv: torch.nn.Conv2d, bn: BatchNorm) -> Folded:
    """Batch normalisation with its running statistics, and the convolution's bias, as two vectors.

        scale = gamma / sqrt(var + eps)
        shift = beta + (bias - mean) * scale

    so that ``bn.eval()(conv(x))`` is ``conv2d(x, conv.weight) * scale + shift``: the `scale` and
    `shift` of `segkernels.dilated_conv2d`, called without the convolution's bias. Ioffe and Szegedy
    2015, "Batch normalization", section 3.1. `conv` and `bn` are not changed, nor is their mode
    looked at; gradients reach gamma, beta and the bias.

    Args:
        conv: whose output `bn` takes.
        bn: with running statistics; with or without gamma and beta.

    Returns:
        (scale, shift), both [C_out]; float64 if one of the vectors is, else float32.

    Raises:
        TypeError: `conv` is no `torch.nn.Conv2d`, or `bn` no `torch.nn.BatchNorm2d` (or
            `SyncBatchNorm`).
        ValueError: `bn` has no running statistics, or another number of channels than `conv` has
            outputs.
    """
    if not isinstance(conv, torch.nn.Conv2d):
        raise TypeError(f"fold_batch_norm: conv must be torch.nn.Conv2d, got {type(conv)}")
    if not isinstance(bn, (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)):
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
    wide = any(vector.dtype == torch.float64 for vector in _vectors(conv, bn))
    dtype = torch.float64 if wide else torch.float32
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight
    mean = bn.running_mean if conv.bias is None else bn.running_mean - conv.bias
    shift = -mean * scale if bn.bias is None else torch.addcmul(bn.bias.to(dtype), -mean, scale)
    return scale, shift


def foldable(conv: torch.nn.Module, bn: torch.nn.Module) -> bool:
    """Whether `bn` uses running statistics, which can be folded."""
    return (
        isinstance(conv, torch.nn.Conv2d)
        and isinstance(bn, (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm))
        and not bn.training
        and bn.running_mean is not None
        and bn.running_var is not None
    )


def _vectors(conv: torch.nn.Conv2d, bn: Any) -> list[torch.Tensor]:
    """What the fold depends on, but for eps. It does not depend on the convolution's weight."""
    found = (conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    return [vector for vector in found if vector is not None]


def _watched(vectors: list[torch.Tensor], pairs: Sequence[Pair]) -> list[torch.Tensor]:
    """The vectors, and what counts the batches: batch_norm updates its statistics unnoticed."""
    counts = [bn.num_batches_tracked for _, bn in pairs]
    return [*vectors, *(count for count in counts if count is not None)]


class _Kept(NamedTuple):
    convs: list[ref[torch.nn.Module]]
    # Each tensor, an alias that keeps its storage from being reused at the same address, and its
    # version. (`tensor.data = other` changes the storage and neither the object nor the version.)
    seen: list[tuple[torch.Tensor, torch.Tensor, int]]
    setting: tuple[Any, ...]
    folded: Folded


# Beside the modules and not in them: copies, pickles and state dicts stay what they are.
_kept: WeakKeyDictionary[torch.nn.Module, _Kept] = WeakKeyDictionary()


def folded(x: torch.Tensor, owner: torch.nn.Module, pairs: Sequence[Pair]) -> Folded:
    """The pairs' scales and shifts, one pair behind the other, for a call on `x`.

    They are computed anew only where a vector, eps or the stream has changed since the last time.

    Args:
        x: what is convolved.
        owner: the module that they are kept for, until `forget`.
        pairs: convolutions and their batch normalisations.
    """
    vectors = [vector for conv, bn in pairs for vector in _vectors(conv, bn)]
    watched = _watched(vectors, pairs)
    if (
        x.is_meta
        or _operator.through_dispatcher(x, *vectors)
        or _operator.wants_grad(*vectors)
        or any(tensor.is_inference() for tensor in watched)
    ):
        return _fold(pairs)
    # Another stream may not have waited for the one that computed what is kept.
    stream = torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0
    setting = (stream, *(bn.eps for _, bn in pairs))
    kept = _kept.get(owner)
    if kept is not None and _same(kept, pairs, watched, setting):
        return kept.folded
    # Not inference tensors: a later call may save them for a gradient of its input.
    with torch.inference_mode(False), torch.no_grad():
        now = _fold(pairs)
        if _native.capturing(x.device):
            return now  # filled by the graph's replays only
        seen = [(tensor, tensor.detach(), tensor._version) for tensor in watched]
    _kept[owner] = _Kept([ref(conv) for conv, _ in pairs], seen, setting, now)
    return now


def forget(owner: torch.nn.Module) -> None:
    """Drop what is kept for `owner`. Nothing in a trace, which would guard on all that is kept."""
    if not torch.compiler.is_compiling():
        _kept.pop(owner, None)


def _fold(pairs: Sequence[Pair]) -> Folded:
    each = [fold_batch_norm(conv, bn) for conv, bn in pairs]
    if len(each) == 1:
        return each[0]
    return torch.cat([scale for scale, _ in each]), torch.cat([shift for _, shift in each])


def _same(
    kept: _Kept,
    pairs: Sequence[Pair],
    watched: list[torch.Tensor],
    setting: tuple[Any, ...],
) -> bool:
    return (
        kept.setting == setting
        and len(kept.seen) == len(watched)
        and all(conv is before() for (conv, _), before in zip(pairs, kept.convs, strict=True))
        and all(
            tensor is before
            and tensor._version == version
            and tensor.data_ptr() == alias.data_ptr()
            for tensor, (before, alias, version) in zip(watched, kept.seen, strict=True)
        )
    )
