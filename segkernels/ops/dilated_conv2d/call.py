"""The arguments of a convolution after the checks, as the layers below pass them on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels.ops._arguments import Int2
from segkernels.ops._dtypes import compute_dtype
from segkernels.ops.dilated_conv2d.geometry import Geometry, Problem


class Call(NamedTuple):
    """How to convolve.

    Attributes:
        stride, dilation, groups: as in `torch.nn.functional.conv2d`.
        padding: before the first row and column.
        out_size: rows and columns of the output, which say what padding there is at the end.
        channels_last: the output's layout.
        backend: what the user asked for.
    """

    stride: Int2
    padding: Int2
    dilation: Int2
    groups: int
    out_size: Int2
    channels_last: bool
    backend: str

    @property
    def memory_format(self) -> torch.memory_format:
        """Of the output."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def geometry(self, x: torch.Tensor, weight: torch.Tensor) -> Geometry:
        """The planes of this call."""
        kernel = (weight.size(2), weight.size(3))
        return Geometry(x.size(2), x.size(3), *self.out_size, kernel, self.padding, self.dilation)

    def problem(self, x: torch.Tensor, weight: torch.Tensor) -> Problem:
        """This call without its tensors."""
        return Problem(
            x.size(0),
            x.size(1),
            weight.size(0),
            self.geometry(x, weight),
            self.stride,
            self.groups,
            x.dtype,
            x.device,
        )


class Convolution(NamedTuple):
    """A call, and what follows the sums and the epilogue's tensors: None or "relu"."""

    call: Call
    activation: str | None


class Wanted(NamedTuple):
    """Which gradients of a call's input and weight are wanted."""

    of_input: bool
    of_weight: bool
    call: Call


class Epilogue(NamedTuple):
    """What becomes of a sum: activation((sum + bias) * scale + shift + residual)."""

    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str | None = None

    def widened(self) -> Epilogue:
        """In float32."""
        bias, scale, shift, residual = (None if t is None else t.float() for t in self[:4])
        return Epilogue(bias, scale, shift, residual, self.activation)

    def folded_shift(self) -> torch.Tensor | None:
        """bias * scale + shift, in the dtype that is computed in; the shift alone as it is."""
        if self.bias is None:
            return self.shift
        bias = self.bias.to(compute_dtype(self.bias.dtype))
        if self.scale is not None:
            bias = bias * self.scale
        return bias if self.shift is None else bias + self.shift


def strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, int, int, int]:
    """Strides of a 4-D tensor as torch.empty gives them in that layout."""
    _, c, h, w = (max(size, 1) for size in shape)
    if channels_last:
        return h * w * c, 1, w * c, c
    return c * h * w, h * w, w, 1


def laid_out(out: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`out` in that layout to the stride, copied only if need be."""
    if out.stride() == strides(tuple(out.shape), channels_last):
        return out
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        out.shape, dtype=out.dtype, device=out.device, memory_format=memory_format
    ).copy_(out)
