"""aspp: dilated convolutions of one input at several rates, concatenated or added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from segkernels.ops import _arguments, _dtypes, _operator, _registry
from segkernels.ops.aspp import operator
from segkernels.ops.aspp.branches import Branches
from segkernels.ops.dilated_conv2d import ACTIVATIONS, BACKENDS, apply_epilogue, hopper

_registry.register(
    _registry.Op(
        name="aspp",
        functions=("aspp", "ASPP"),
        backends=(("cpu", "torch"), ("cuda", "torch, c++")),
        layouts=("contiguous", "channels_last"),
        differentiable=("input", "weights", "scale", "shift", "pooled"),
        library_ops=("segkernels::aspp",),
        note="differentiable any number of times; on CUDA the dilated branches of form v3 are one "
        "launch where the sm90 kernel is chosen for them; cuDNN is deterministic in torch's "
        "deterministic mode",
    )
)

FORMS = ("v2", "v3")


def aspp(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    rates: Sequence[int],
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None,
    activation: str | None = None,
    form: str = "v3",
    backend: str = "auto",
) -> torch.Tensor:
    """Atrous spatial pyramid pooling: dilated convolutions of one input at several rates.

    Branch b_i is the convolution of `input` with ``weights[i]``, dilated by ``rates[i]``, with
    stride 1 and zero padding that keeps the size.

        v2:  activation((b_0 + b_1 + ...) * scale + shift)
        v3:  activation(concat(concat(b_0, b_1, ...) * scale + shift, pooled))

    v2 is the sum of Chen et al. 2018, "DeepLab: semantic image segmentation with deep
    convolutional nets, atrous convolution, and fully connected CRFs", section 3.2 (`shift` is the
    sum of the branches' biases). v3 is the concatenation of Chen et al. 2017, "Rethinking atrous
    convolution for semantic image segmentation", section 3.3: a 1x1 convolution and 3x3
    convolutions, each with batch normalisation (`scale` and `shift`, from
    `segkernels.fold_batch_norm`), and image pooling (`pooled`, one vector per image).

    On CUDA the neighbouring branches of form v3 whose weights have the same shape are computed by
    one launch of the Hopper kernel, which writes each to its channels: with ``backend="sm90"``, or
    where the cost model of `segkernels.dilated_conv2d` chooses that kernel for them together.
    Otherwise the branches are computed one at a time, and each result is copied to its channels, or
    added, before the next. The saved tensors are the inputs and, with an activation, the output.
    Differentiable any number of times, with respect to all tensors.

    Under autocast the tensors are cast as for `torch.nn.functional.conv2d`, except `scale` and
    `shift`.

    Args:
        input: [N, C, H, W]; float16, bfloat16, float32 or float64. Contiguous and channels_last
            layouts are not copied.
        weights: one [C_i, C, kh, kw] per branch, kh and kw odd, in the dtype of `input`; all C_i
            are the same for v2.
        rates: pixels between neighbouring taps, one int per branch.
        scale: one factor per output channel of the branches: [sum of C_i] for v3, [C_0] for v2; in
            the dtype of `input` or float32. None: 1.
        shift: one summand per output channel, like `scale`. None: 0.
        pooled: v3 only: [N, C_p, 1, 1], in the dtype of `input`; repeated for all pixels.
        activation: None or "relu".
        form: "v2" or "v3".
        backend: as in `segkernels.dilated_conv2d`.

    Returns:
        [N, C_0, H, W] for v2 and [N, sum of C_i + C_p, H, W] for v3, in the dtype of `input`;
        channels_last if `input` or a weight is.

    Raises:
        ValueError: no branch; different numbers of `weights` and `rates`; shapes, dtypes or devices
            that do not match; an even kernel size; a rate below 1; `pooled` with v2; an unknown
            `activation`, `form` or `backend`; a call that `backend` does not support.
        TypeError: arguments of another type.
    """
    _arguments.check_choice(form, "form", FORMS, "aspp")
    _arguments.check_choice(activation, "activation", ACTIVATIONS, "aspp")
    _arguments.check_choice(backend, "backend", BACKENDS, "aspp")
    weights, rates = list(weights), [*rates]
    _check_types(input, weights, rates, scale, shift, pooled)
    input, pooled, *weights = _arguments.autocast(input, pooled, *weights)
    _check_input_and_weights(input, weights, rates, form)
    if _operator.must_call_torch():
        channels = weights[0].size(0) if form == "v2" else sum(w.size(0) for w in weights)
        _check_vectors(input, channels, scale, shift, pooled, form)
        return _by_torch(input, weights, rates, scale, shift, pooled, activation, form)
    channels_last = any(map(_operator.is_channels_last, (input, *weights)))
    branches = Branches(tuple(rates), activation, form == "v2", channels_last, backend)
    _check_vectors(input, branches.channels(weights, None), scale, shift, pooled, form)
    for weight, call in zip(weights, branches.calls(input, weights), strict=True):
        hopper.check(input, weight, call)
    out: torch.Tensor = operator.join(input, scale, shift, pooled, weights, branches)
    return out


def _by_torch(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    rates: list[int],
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    pooled: torch.Tensor | None,
    activation: str | None,
    form: str,
) -> torch.Tensor:
    outs = [
        F.conv2d(x, w, None, 1, [rate * (n // 2) for n in w.shape[2:]], rate)
        for w, rate in zip(weights, rates, strict=True)
    ]
    out = sum(outs[1:], outs[0]) if form == "v2" else torch.cat(outs, dim=1)
    out = apply_epilogue(out, scale, shift, None, None)
    if pooled is not None:
        out = torch.cat([out, pooled.expand(-1, -1, *x.shape[2:])], dim=1)
    return F.relu(out) if activation == "relu" else out


def _check_types(
    input: Any, weights: list[Any], rates: list[Any], scale: Any, shift: Any, pooled: Any
) -> None:
    tensors = [("input", input), *((f"weights[{i}]", w) for i, w in enumerate(weights))]
    optional = (("scale", scale), ("shift", shift), ("pooled", pooled))
    for name, value in [*tensors, *(pair for pair in optional if pair[1] is not None)]:
        _arguments.check_tensor(value, name, "aspp")
    if not weights or len(rates) != len(weights):
        raise ValueError(
            "aspp: weights and rates must have the same length, at least 1, got "
            f"{len(weights)} and {len(rates)}"
        )
    for i, rate in enumerate(rates):
        if not isinstance(rate, int) or isinstance(rate, bool):
            raise TypeError(f"aspp(): argument 'rates[{i}]' must be int, not {type(rate)}")
        if rate < 1:
            raise ValueError(f"aspp: rates must be at least 1, got rates[{i}] = {rate}")


def _check_input_and_weights(
    input: torch.Tensor, weights: list[torch.Tensor], rates: list[int], form: str
) -> None:
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise ValueError(
            f"aspp: input must be [N, C, H, W] with C, H and W at least 1, got {list(input.shape)}"
        )
    if input.dtype not in _dtypes.FLOATING:
        names = ", ".join(_dtypes.names())
        raise ValueError(f"aspp: input must be one of {names}, got {input.dtype}")
    if not _arguments.is_supported(input):
        raise ValueError(f"aspp: input must be on CPU or CUDA, got {input.device}")
    for i, weight in enumerate(weights):
        name, shape = f"weights[{i}]", list(weight.shape)
        if weight.dim() != 4 or shape[1] != input.size(1) or not shape[0]:
            raise ValueError(
                f"aspp: {name} must be [C_out, {input.size(1)}, kh, kw] for an input of "
                f"{input.size(1)} channels, got {shape}"
            )
        if shape[2] % 2 == 0 or shape[3] % 2 == 0:
            raise ValueError(f"aspp: {name} must have odd kernel sizes, got {shape}")
        if form == "v2" and shape[0] != weights[0].size(0):
            raise ValueError(
                f"aspp: {name} must have as many output channels as weights[0], which is "
                f"{list(weights[0].shape)}, got {shape}"
            )
        _arguments.check_dtype_and_device(weight, name, {input.dtype}, input, "aspp")


def _check_vectors(
    input: torch.Tensor,
    channels: int,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    pooled: torch.Tensor | None,
    form: str,
) -> None:
    _arguments.check_vector(scale, "scale", channels, input, "aspp")
    _arguments.check_vector(shift, "shift", channels, input, "aspp")
    if pooled is None:
        return
    if form == "v2":
        raise ValueError("aspp: pooled must be None for form='v2', which has no image pooling")
    if pooled.dim() != 4 or pooled.size(0) != input.size(0) or pooled.shape[2:] != (1, 1):
        raise ValueError(
            f"aspp: pooled must be [{input.size(0)}, C, 1, 1], got {list(pooled.shape)}"
        )
    _arguments.check_dtype_and_device(pooled, "pooled", {input.dtype}, input, "aspp")
