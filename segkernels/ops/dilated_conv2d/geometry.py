"""Sizes of a dilated convolution of stride 1, and the taps that a box of outputs needs.

Plain integers, so that the schedule on the host, the kernels and the tests share one definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels.ops._arguments import Int2


class Geometry(NamedTuple):
    """Where a convolution of stride 1 reads: output (y, x) takes tap (i, j) from input

    (y + i * dilation[0] - padding[0], x + j * dilation[1] - padding[1]), zero outside the image.

    Attributes:
        height, width: of the input.
        out_height, out_width: of the output.
        kernel: taps (kh, kw).
        padding: (ph, pw) before the first row and column; negative where rows are left out, as in
            `transposed`.
        dilation: (dh, dw), rows and columns from one tap to the next.
    """

    height: int
    width: int
    out_height: int
    out_width: int
    kernel: Int2
    padding: Int2
    dilation: Int2

    @property
    def taps(self) -> int:
        """Taps of the kernel."""
        return self.kernel[0] * self.kernel[1]

    def transposed(self) -> Geometry:
        """The input's gradient: a convolution of the output's with the flipped kernel."""
        reach = (
            self.dilation[0] * (self.kernel[0] - 1) - self.padding[0],
            self.dilation[1] * (self.kernel[1] - 1) - self.padding[1],
        )
        return Geometry(
            self.out_height,
            self.out_width,
            self.height,
            self.width,
            self.kernel,
            reach,
            self.dilation,
        )

    def tap_rectangle(self, y: int, x: int, rows: int, columns: int) -> tuple[Int2, Int2]:
        """The taps, (first, last) of each axis, whose box meets the image, for a box of outputs.

        The box starts at (y, x); what of it lies beyond the output asks for no tap.
        """
        return (
            tap_range(
                y,
                min(rows, self.out_height - y),
                self.height,
                self.kernel[0],
                self.dilation[0],
                self.padding[0],
            ),
            tap_range(
                x,
                min(columns, self.out_width - x),
                self.width,
                self.kernel[1],
                self.dilation[1],
                self.padding[1],
            ),
        )

    def useful_share(self) -> float:
        """The share of the (output, tap) pairs inside the image: what must be multiplied."""
        if not self.out_height * self.out_width:
            return 1.0
        share = 1.0
        for axis in (0, 1):
            size, out = ((self.height, self.out_height), (self.width, self.out_width))[axis]
            inside = 0
            for k in range(self.kernel[axis]):
                shift = k * self.dilation[axis] - self.padding[axis]
                inside += max(0, min(size, out + shift) - max(0, shift))
            share *= inside / (out * self.kernel[axis])
        return share


def tap_range(start: int, extent: int, size: int, kernel: int, dilation: int, padding: int) -> Int2:
    """The taps of one axis whose interval meets the image, as (first, last).

    Outputs start .. start + extent - 1 read, through tap k, the inputs from ``start + k * dilation
    - padding`` on, `extent` of them. Those taps k for which one of these lies in 0 .. size - 1 have
    no gap between them. None: last < first.

    Args:
        start: first output of the box.
        extent: outputs of the box, at least 1.
        size: inputs of the axis.
        kernel: taps of the axis.
        dilation: inputs from a tap to the next, at least 1.
        padding: of the convolution; may be negative.
    """
    first = max(0, -((start + extent - 1 - padding) // dilation))
    last = min(kernel - 1, (size - 1 + padding - start) // dilation)
    return first, last


def out_size(size: int, kernel: int, dilation: int, padding: int) -> int:
    """Outputs of an axis of `size` inputs padded on both sides, stride 1."""
    return size + 2 * padding - dilation * (kernel - 1)


class Problem(NamedTuple):
    """What a backend is asked for, without the tensors.

    Attributes:
        batch, channels, out_channels: sizes.
        geometry: the planes; that of stride 1 whatever `stride` is.
        stride, groups: as in `torch.nn.functional.conv2d`.
        dtype, device: of input, weight and output.
    """

    batch: int
    channels: int
    out_channels: int
    geometry: Geometry
    stride: Int2
    groups: int
    dtype: torch.dtype
    device: torch.device
