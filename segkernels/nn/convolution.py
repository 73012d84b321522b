"""DilatedConv2d, ConvBNAct and conv_bn_act: modules and a function over dilated_conv2d."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F

from segkernels.nn.folding import BATCH_NORMS, BatchNorm, fold_batch_norm, foldable, is_plain
from segkernels.ops._arguments import Int2, check_choice
from segkernels.ops.dilated_conv2d import ACTIVATIONS, BACKENDS, Backend, dilated_conv2d

Activation = Literal["relu"] | None
Size2 = int | Int2

# Device types on which `conv_bn_act` folds the batch normalisation.
FOLDED_ON = ("cuda",)


class DilatedConv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` that calls `segkernels.dilated_conv2d`, with the same arguments.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as in `torch.nn.Conv2d`.
        backend: as in `segkernels.dilated_conv2d`; "torch" calls `torch.nn.Conv2d.forward`.

    Raises:
        ValueError: an unknown `backend`, and the errors of `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: str | Size2 = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        check_choice(backend, "backend", BACKENDS, "DilatedConv2d")
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
        """The arguments of `torch.nn.Conv2d`, and the backend."""
        return super().extra_repr() + backend_repr(self.backend)


def is_plain_conv(module: torch.nn.Module) -> bool:
    """Whether `module` is a `torch.nn.Conv2d` or `DilatedConv2d`, not a subclass, without hooks."""
    return is_plain(module, torch.nn.Conv2d, DilatedConv2d)


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
    """Call `dilated_conv2d` with the weight and the arguments of `conv`, in any padding mode."""
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
    """Compute ``activation(bn(conv(input)) + residual)`` with existing modules.

    The modules stay in the model, so its state dict does not change.

    On CUDA, if `bn` is a batch normalisation that uses its running statistics, this is one call of
    `segkernels.dilated_conv2d`. `bn` is folded into its scale and shift at every call
    (`segkernels.fold_batch_norm`), and its parameters receive gradients. Otherwise the convolution,
    `bn`, the addition and the activation are computed one at a time, the last two in place. On the
    CPU folding gains nothing, because another pass over the output is cheap compared with the
    convolution.

    Any modules are accepted. Those that are not `torch.nn.Conv2d` or `DilatedConv2d`, or that have
    hooks or parametrisations, are called unchanged.

    Args:
        input: [N, C, H, W].
        conv: the convolution, with any padding mode.
        bn: normalisation of the convolution's output, or None.
        residual: [N, C_out, H_out, W_out], added before the activation.
        activation: "relu" or None.
        backend: as in `segkernels.dilated_conv2d`; "torch" calls the modules one at a time.

    Returns:
        [N, C_out, H_out, W_out], in the dtype and layout of the convolution's output.

    Raises:
        ValueError: an unknown `activation` or `backend`, a `residual` with another shape or dtype,
            and the errors of the convolution and of `bn`.
    """
    check_choice(activation, "activation", ACTIVATIONS, "conv_bn_act")
    check_choice(backend, "backend", BACKENDS, "conv_bn_act")
    if backend == "torch" or not is_plain_conv(conv):
        out = conv(input)
        return _finish(out if bn is None else bn(out), residual, activation, in_place=False)
    if input.device.type in FOLDED_ON and (bn is None or foldable(bn)):
        scale, shift = (None, None) if bn is None else fold_batch_norm(conv, cast(BatchNorm, bn))
        return convolve(
            input,
            conv,
            conv.bias if bn is None else None,
            scale=scale,
            shift=shift,
            residual=residual,
            activation=activation,
            backend=backend,
        )
    out = convolve(input, conv, conv.bias, backend=backend)
    if bn is not None:
        out = bn(out)
    return _finish(out, residual, activation, in_place=bn is None or is_plain(bn, *BATCH_NORMS))


def _finish(
    out: torch.Tensor, residual: torch.Tensor | None, activation: Activation, *, in_place: bool
) -> torch.Tensor:
    """Add the residual and apply the activation; `in_place` if nothing else uses `out`."""
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
    """Convolution, batch normalisation and activation, computed by `segkernels.conv_bn_act`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: as in `torch.nn.Conv2d`.
        padding: as in `torch.nn.Conv2d`; default ``dilation * ((kernel_size - 1) // 2)``, or "same"
            for an even kernel with stride 1. With stride 1 the output has the size of the input.
        bias: whether the convolution has a bias; default: only without batch normalisation.
        norm: whether there is batch normalisation.
        activation: "relu" or None.
        backend: as in `segkernels.dilated_conv2d`; "torch" calls the modules one at a time.

    Attributes:
        conv: the `torch.nn.Conv2d`.
        bn: the `torch.nn.BatchNorm2d`, or None.

    Shape: [N, in_channels, H, W] to [N, out_channels, H_out, W_out].

    Raises:
        ValueError: an unknown `activation` or `backend`, and the errors of `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2 = 3,
        stride: Size2 = 1,
        padding: str | Size2 | None = None,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool | None = None,
        *,
        norm: bool = True,
        activation: Activation = "relu",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_choice(activation, "activation", ACTIVATIONS, "ConvBNAct")
        check_choice(backend, "backend", BACKENDS, "ConvBNAct")
        self.activation = activation
        self.backend = backend
        self.conv = torch.nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            _same_padding(kernel_size, stride, dilation) if padding is None else padding,
            dilation,
            groups,
            not norm if bias is None else bias,
        )
        self.bn = torch.nn.BatchNorm2d(out_channels) if norm else None

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[N, C, H, W] to [N, C_out, H_out, W_out], `residual` added before the activation."""
        return conv_bn_act(
            input,
            self.conv,
            self.bn,
            residual=residual,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The arguments that the submodules do not show."""
        return f"activation={self.activation!r}" + backend_repr(self.backend)


def _same_padding(kernel_size: Size2, stride: Size2, dilation: Size2) -> str | tuple[int, int]:
    kernel, steps, gaps = (
        (value, value) if isinstance(value, int) else tuple(value)
        for value in (kernel_size, stride, dilation)
    )
    if steps == (1, 1) and any(size % 2 == 0 for size in kernel):
        return "same"
    return gaps[0] * ((kernel[0] - 1) // 2), gaps[1] * ((kernel[1] - 1) // 2)


def backend_repr(backend: str) -> str:
    """Return the backend for `extra_repr`; "" for the default."""
    return "" if backend == "auto" else f", backend={backend!r}"
