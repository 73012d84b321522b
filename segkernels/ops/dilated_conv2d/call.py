"""Records that describe a convolution: its arguments, its sizes and its epilogue."""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels.ops._arguments import Int2
from segkernels.ops._dtypes import compute_dtype
from segkernels.ops._operator import memory_format


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

    def problem(self, x: torch.Tensor, weight: torch.Tensor) -> Problem:
        """The sizes, dtype and device of this call on these tensors."""
        batch, channels, height, width = x.shape
        out_channels, _, kh, kw = weight.shape
        return Problem(
            batch,
            channels,
            out_channels,
            (height, width),
            self.out_size,
            (kh, kw),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            x.dtype,
            x.device,
        )


class Problem(NamedTuple):
    """A convolution without its tensors: what the choice of a backend and the schedule depend on.

    With stride 1, output (y, x) reads input (y + i * dilation[0] - padding[0], x + j * dilation[1]
    - padding[1]) through tap (i, j). The input is zero outside the image.

    Attributes:
        batch, channels, out_channels: sizes.
        in_size, out_size: (rows, columns) of the input and of the output.
        kernel: taps (kh, kw).
        stride, dilation, groups: as in `torch.nn.functional.conv2d`.
        padding: before the first row and column; negative where rows or columns are skipped, which
            `transposed` can need.
        dtype, device: of input, weight and output.
    """

    batch: int
    channels: int
    out_channels: int
    in_size: Int2
    out_size: Int2
    kernel: Int2
    stride: Int2
    padding: Int2
    dilation: Int2
    groups: int
    dtype: torch.dtype
    device: torch.device

    @property
    def pixels(self) -> int:
        """Number of pixels of all outputs."""
        return self.batch * self.out_size[0] * self.out_size[1]

    @property
    def taps(self) -> int:
        """Number of taps of the kernel."""
        return self.kernel[0] * self.kernel[1]

    def transposed(self) -> Problem:
        """The input gradient, for stride 1 and groups 1.

        It is the convolution of the output's gradient with the flipped kernel, whose input and
        output channels are exchanged.
        """
        kernel, padding, dilation = self.kernel, self.padding, self.dilation
        return self._replace(
            channels=self.out_channels,
            out_channels=self.channels,
            in_size=self.out_size,
            out_size=self.in_size,
            padding=(
                dilation[0] * (kernel[0] - 1) - padding[0],
                dilation[1] * (kernel[1] - 1) - padding[1],
            ),
        )

    def useful_share(self) -> float:
        """Fraction of the (output, tap) pairs that read an input inside the image, for stride 1."""
        share = 1.0
        for axis in (0, 1):
            size, out, kernel = self.in_size[axis], self.out_size[axis], self.kernel[axis]
            inside = 0
            for k in range(kernel):
                shift = k * self.dilation[axis] - self.padding[axis]
                inside += max(0, min(size, out + shift) - max(0, shift))
            share *= inside / (out * kernel)
        return share


class Epilogue(NamedTuple):
    """The epilogue of a convolution: activation((conv + bias) * scale + shift + residual).

    Attributes:
        bias, scale, shift: [C_out], as in `dilated_conv2d`.
        residual: [N, C_out, H_out, W_out], in the dtype of the output.
        activation: None or "relu".
    """

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


def laid_out(out: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """Return the 4-D `out` with exactly the strides of that layout, copied only if they differ."""
    _, c, h, w = (max(size, 1) for size in out.shape)
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    if out.stride() == strides:
        return out
    layout = memory_format(channels_last)
    copy = torch.empty(out.shape, dtype=out.dtype, device=out.device, memory_format=layout)
    return copy.copy_(out)
