"""Convolution, batch normalisation and activation in one call."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F

from segkernels.nn.folding import BatchNorm, foldable, folded, forget
from segkernels.ops import _operator
from segkernels.ops.dilated_conv2d import dilated_conv2d
from segkernels.ops.dilated_conv2d.torch_path import has_cpu_kernels, may_crash

Backend = Literal["auto", "sm90", "torch"]
Activation = Literal["relu"] | None
Pair = int | tuple[int, int]

# Outputs on the CPU whose normalisation takes as long as finding the folded vectors.
_FOLDED_FROM = 2**16


class DilatedConv2d(torch.nn.Conv2d):
    """`segkernels.dilated_conv2d` as a module: `torch.nn.Conv2d`, argument for argument.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in `torch.nn.Conv2d`.
        backend: as in `segkernels.dilated_conv2d`; "torch": `torch.nn.Conv2d` itself.

    Raises:
        ValueError: an unknown `backend`, and what `torch.nn.Conv2d` raises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        check_backend(backend, "DilatedConv2d")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] or [C, H, W] to what `torch.nn.Conv2d` returns."""
        if self.backend == "torch":
            return super().forward(input)
        return convolve(input, self, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        """torch's, and the backend."""
        chosen = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return super().extra_repr() + chosen


def convolve(
    input: torch.Tensor,
    conv: torch.nn.Conv2d,
    bias: torch.Tensor | None,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """`dilated_conv2d` with the weight and the geometry of `conv`, whatever its padding mode."""
    padding: Any = conv.padding
    if conv.padding_mode != "zeros":
        input = F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    return dilated_conv2d(
        input,
        conv.weight,
        bias,
        conv.stride,
        padding,
        conv.dilation,
        conv.groups,
        scale=scale,
        shift=shift,
        residual=residual,
        activation=activation,
        backend=backend,
    )


def conv_bn_act(
    input: torch.Tensor,
    conv: torch.nn.Conv2d,
    bn: torch.nn.Module | None,
    *,
    residual: torch.Tensor | None = None,
    activation: Activation = "relu",
    backend: Backend = "auto",
) -> torch.Tensor:
    """Convolution, batch normalisation, the addition of a residual, and an activation.

    ``activation(bn(conv(input)) + residual)`` of modules that stay where they are in the model, so
    that its state dict does not change.

    Where `bn` uses its running statistics this is one call of `segkernels.dilated_conv2d`, with
    `bn` folded into its scale and shift (`segkernels.fold_batch_norm`). They are kept until a
    parameter, a buffer or eps changes: in place, by being replaced, by `load_state_dict`, by
    `to`. Only writing in place through ``tensor.data`` is not noticed, as torch notices it nowhere;
    a call in training mode, or `ConvBNAct.train` or `eval`, forgets what was kept. Nothing is kept
    where gradients of bn's parameters are wanted, as in fine-tuning with frozen statistics; they
    reach those and the convolution. (On the CPU the normalisation of small layers, and of the half
    types, is torch's, which takes as long there.) Where `bn` uses the batch's statistics (in
    training, or without running ones) it is the convolution, then `bn`, then the rest in place.

    Modules with hooks, and types other than torch's `Conv2d`, `BatchNorm2d` and `SyncBatchNorm` and
    `DilatedConv2d` (pruned or parametrised ones, a `GroupNorm`), are called one after the other.

    Args:
        input: [N, C, H, W].
        conv: any padding mode.
        bn: over conv's outputs, or None.
        residual: [N, C_out, H_out, W_out], added before the activation.
        activation: "relu" or None.
        backend: as in `segkernels.dilated_conv2d`; "torch": the modules one after the other.

    Returns:
        [N, C_out, H_out, W_out], in the dtype and layout of the convolution's output.

    Raises:
        ValueError: an unknown `activation` or `backend`, a `residual` of another shape, and what
            the convolution and `bn` raise.
    """
    check_activation(activation, "conv_bn_act")
    check_backend(backend, "conv_bn_act")
    if backend == "torch" or not known(conv, bn):
        out = conv(input)
        return _finish(out if bn is None else bn(out), residual, activation, in_place=False)
    if backend == "auto" and _plainly_on_cpu(input, conv, bn, residual):
        return _finish(_on_cpu(input, conv, bn), residual, activation, in_place=True)
    if bn is None:
        return convolve(
            input, conv, conv.bias, residual=residual, activation=activation, backend=backend
        )
    if not foldable(conv, bn):
        forget(bn)
        out = bn(convolve(input, conv, conv.bias, backend=backend))
        return _finish(out, residual, activation, in_place=True)
    scale, shift = folded(input, bn, [(conv, cast(BatchNorm, bn))])
    return convolve(
        input,
        conv,
        None,
        scale=scale,
        shift=shift,
        residual=residual,
        activation=activation,
        backend=backend,
    )


def known(conv: torch.nn.Module, bn: torch.nn.Module | None) -> bool:
    """Whether calling the two modules does what their types say, and nothing else."""
    return (
        type(conv) in (torch.nn.Conv2d, DilatedConv2d)
        and (bn is None or type(bn) in (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm))
        and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            for module in (conv, bn)
            if module is not None
        )
    )


def _plainly_on_cpu(
    x: torch.Tensor,
    conv: torch.nn.Conv2d,
    bn: torch.nn.Module | None,
    residual: torch.Tensor | None,
) -> bool:
    """Whether nothing but the result on the CPU is wanted, so that `_on_cpu` will do."""
    return (
        isinstance(x, torch.Tensor)
        and x.device.type == "cpu"
        and has_cpu_kernels(x.dtype)
        and not may_crash(x, conv.stride)
        and conv.padding_mode == "zeros"
        and not torch.is_autocast_enabled("cpu")
        and (bn is None or foldable(conv, bn))
        and not _operator.through_dispatcher(x, conv.weight, residual)
        and not _operator.wants_grad(x, residual, conv.weight, conv.bias)
        and (bn is None or not _operator.wants_grad(bn.weight, bn.bias))
    )


def _on_cpu(x: torch.Tensor, conv: torch.nn.Conv2d, bn: torch.nn.Module | None) -> torch.Tensor:
    """What dilated_conv2d does there, with less around it: small layers take 50 microseconds."""
    args: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if bn is None:
        return F.conv2d(x, conv.weight, conv.bias, *args)
    step = conv.stride[0] * conv.stride[1]
    outputs = conv.out_channels * (x.numel() // max(conv.in_channels * step, 1))
    exact = x.dtype in (torch.float32, torch.float64)
    if not exact or outputs < conv.weight.numel() + _FOLDED_FROM:
        out: torch.Tensor = bn(F.conv2d(x, conv.weight, conv.bias, *args))
        return out
    # Scaling the weight is less than scaling the output.
    scale, shift = folded(x, bn, [(conv, cast(BatchNorm, bn))])
    weight = conv.weight * scale.to(conv.weight.dtype)[:, None, None, None]
    return F.conv2d(x, weight, shift.to(conv.weight.dtype), *args)


def _finish(
    out: torch.Tensor, residual: torch.Tensor | None, activation: Activation, *, in_place: bool
) -> torch.Tensor:
    """Add the residual and activate; in place where `out` is nobody else's."""
    if residual is not None:
        if residual.shape != out.shape:
            raise ValueError(
                f"conv_bn_act: residual must have shape {list(out.shape)}, got "
                f"{list(residual.shape)}"
            )
        if residual.dtype != out.dtype:
            if not torch.is_autocast_enabled(out.device.type):
                raise ValueError(f"conv_bn_act: residual must be {out.dtype}, got {residual.dtype}")
            residual = residual.to(out.dtype)
        out = out.add_(residual) if in_place else out + residual
    return F.relu(out, inplace=in_place) if activation == "relu" else out


class ConvBNAct(torch.nn.Module):
    """A convolution, batch normalisation and an activation, through `segkernels.conv_bn_act`.

    In evaluation the three are one call; in training the batch normalisation is torch's.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: of the convolution, and so the next four.
        stride: from output to output.
        padding: default: as many outputs as inputs for stride 1, and for an odd kernel
            ``dilation * (kernel_size - 1) / 2``.
        dilation: from tap to tap.
        groups: blocks of channels that are convolved alone.
        bias: of the convolution; default: where there is no batch normalisation.
        norm: whether there is batch normalisation.
        activation: "relu" or None.
        backend: as in `segkernels.dilated_conv2d`; "torch": the modules one after the other.

    Attributes:
        conv: the `torch.nn.Conv2d`.
        bn: the `torch.nn.BatchNorm2d`, or None.

    Shape: [N, in_channels, H, W] to [N, out_channels, H_out, W_out].

    Raises:
        ValueError: an unknown `activation` or `backend`, and what `torch.nn.Conv2d` raises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        padding: str | Pair | None = None,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool | None = None,
        *,
        norm: bool = True,
        activation: Activation = "relu",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_activation(activation, "ConvBNAct")
        check_backend(backend, "ConvBNAct")
        self.activation = activation
        self.backend = backend
        self.conv = torch.nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            _padding(kernel_size, stride, dilation) if padding is None else padding,
            dilation,
            groups,
            not norm if bias is None else bias,
        )
        self.bn = torch.nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[N, C, H, W] to [N, C_out, H_out, W_out]; `residual` is added before the activation."""
        return conv_bn_act(
            input,
            self.conv,
            self.bn,
            residual=residual,
            activation=self.activation,
            backend=self.backend,
        )

    def train(self, mode: bool = True) -> ConvBNAct:
        """torch's; what is kept of the batch normalisation is forgotten."""
        if self.bn is not None:
            forget(self.bn)
        return super().train(mode)

    def extra_repr(self) -> str:
        """What the modules inside do not show."""
        chosen = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"activation={self.activation!r}{chosen}"


def _padding(kernel_size: Pair, stride: Pair, dilation: Pair) -> str | tuple[int, int]:
    kernel, step, gap = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (kernel_size, stride, dilation)
    )
    if step == (1, 1) and any(size % 2 == 0 for size in kernel):
        return "same"
    return gap[0] * ((kernel[0] - 1) // 2), gap[1] * ((kernel[1] - 1) // 2)


def check_backend(backend: str, who: str) -> None:
    """Raise ValueError for a backend that `dilated_conv2d` does not know."""
    if backend not in ("auto", "sm90", "torch"):
        raise ValueError(f"{who}: backend must be 'auto', 'sm90' or 'torch', got {backend!r}")


def check_activation(activation: str | None, who: str) -> None:
    """Raise ValueError for an activation that `dilated_conv2d` does not know."""
    if activation not in (None, "relu"):
        raise ValueError(f"{who}: activation must be None or 'relu', got {activation!r}")
