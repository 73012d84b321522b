"""The checked arguments of a convolution, as records for the operator and its backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels.ops._arguments import Int2
from segkernels.ops._dtypes import compute_dtype
from segkernels.ops.dilated_conv2d.geometry import Geometry, Problem


class Call(NamedTuple):
    """Arguments of a convolution other than tensors.

    Attributes:
        stride, dilation, groups: as in `torch.nn.functional.conv2d`.
        padding: before the first row and column.
        out_size: rows and columns of the output, which determine the padding after the last row
            and column.
        channels_last: whether the output is channels_last; else it is contiguous.
        backend: the requested backend.
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
        """The memory format of the output."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def geometry(self, x: torch.Tensor, weight: torch.Tensor) -> Geometry:
        """The geometry of this call on these tensors."""
        kernel = (weight.size(2), weight.size(3))
        return Geometry(x.size(2), x.size(3), *self.out_size, kernel, self.padding, self.dilation)

    def problem(self, x: torch.Tensor, weight: torch.Tensor) -> Problem:
        """The sizes, dtype and device of this call on these tensors."""
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
    """Arguments of the operator other than tensors; `activation` is None or "relu"."""

    call: Call
    activation: str | None


class BackwardArgs(NamedTuple):
    """Arguments of the backward operator: which gradients to compute, and of which call."""

    of_input: bool
    of_weight: bool
    call: Call


class Epilogue(NamedTuple):
    """The epilogue of a convolution: activation((conv + bias) * scale + shift + residual)."""

    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: str | None = None

    def to_float32(self) -> Epilogue:
        """Return the epilogue with its tensors in float32."""
        bias, scale, shift, residual = (None if t is None else t.float() for t in self[:4])
        return Epilogue(bias, scale, shift, residual, self.activation)

    def folded_shift(self) -> torch.Tensor | None:
        """Return bias * scale + shift in the compute dtype; without a bias, the shift unchanged."""
        if self.bias is None:
            return self.shift
        bias = self.bias.to(compute_dtype(self.bias.dtype))
        if self.scale is not None:
            bias = bias * self.scale
        return bias if self.shift is None else bias + self.shift


def strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, int, int, int]:
    """Strides of a 4-D tensor that torch.empty creates in that layout."""
    _, c, h, w = (max(size, 1) for size in shape)
    if channels_last:
        return h * w * c, 1, w * c, c
    return c * h * w, h * w, w, 1


def laid_out(out: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Return `out` with exactly the strides of that layout, copied only if they differ."""
    if out.stride() == strides(tuple(out.shape), channels_last):
        return out
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        out.shape, dtype=out.dtype, device=out.device, memory_format=memory_format
    ).copy_(out)
