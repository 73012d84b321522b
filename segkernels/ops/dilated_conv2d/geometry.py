"""Sizes of a dilated convolution of stride 1, and the taps that a box of outputs needs.

csrc/dilated_conv2d/taps.h has the same definition of the taps in C++.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from segkernels.ops._arguments import Int2


class Geometry(NamedTuple):
    """Which inputs a convolution of stride 1 reads.

    Through tap (i, j), output (y, x) reads input (y + i * dilation[0] - padding[0],
    x + j * dilation[1] - padding[1]), which is zero outside the image.

    Attributes:
        height, width: of the input.
        out_height, out_width: of the output.
        kernel: taps (kh, kw).
        padding: (ph, pw) before the first row and column; negative where rows or columns are
            skipped, which `transposed` can need.
        dilation: (dh, dw), rows and columns between neighbouring taps.
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
        """Number of taps of the kernel."""
        return self.kernel[0] * self.kernel[1]

    def transposed(self) -> Geometry:
        """The geometry of the input gradient.

        It is a convolution of the gradient with respect to the output with the flipped kernel.
        """
        padding = (
            self.dilation[0] * (self.kernel[0] - 1) - self.padding[0],
            self.dilation[1] * (self.kernel[1] - 1) - self.padding[1],
        )
        return Geometry(
            self.out_height,
            self.out_width,
            self.height,
            self.width,
            self.kernel,
            padding,
            self.dilation,
        )

    def tap_rectangle(self, y: int, x: int, rows: int, columns: int) -> tuple[Int2, Int2]:
        """Return the taps through which a box of outputs reads the image: (first, last) per axis.

        The box starts at (y, x) and is cut at the end of the output.
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
        """Fraction of the (output, tap) pairs that read an input inside the image."""
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
    """Return the taps of one axis through which outputs read the image, as (first, last).

    Through tap k, outputs start .. start + extent - 1 read `extent` inputs from ``start +
    k * dilation - padding`` on. The taps that read an input in 0 .. size - 1 are a contiguous
    range; it is empty if last < first.

    Args:
        start: first output.
        extent: number of outputs, at least 1.
        size: number of inputs.
        kernel: number of taps.
        dilation: inputs between neighbouring taps, at least 1.
        padding: of the convolution; may be negative.
    """
    first = max(0, -((start + extent - 1 - padding) // dilation))
    last = min(kernel - 1, (size - 1 + padding - start) // dilation)
    return first, last


def out_size(size: int, kernel: int, dilation: int, padding: int) -> int:
    """Number of outputs of `size` inputs with `padding` on both sides, stride 1."""
    return size + 2 * padding - dilation * (kernel - 1)


class Problem(NamedTuple):
    """A convolution without its tensors, for the choice of a backend.

    Attributes:
        batch, channels, out_channels: sizes.
        geometry: sizes of the planes; always for stride 1.
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
