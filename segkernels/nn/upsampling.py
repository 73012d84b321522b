"""Upsample, ResizeConv and bilinear_kernel_: upsampling modules and an initialisation."""

from __future__ import annotations

from typing import Literal

import torch

from segkernels.ops.interpolate import interpolate


class Upsample(torch.nn.Upsample):
    """`torch.nn.Upsample` that calls `segkernels.interpolate`, with the same arguments.

    Args:
        size: (H_out, W_out), or one int for both.
        scale_factor: factors of (H, W), or one factor for both; exactly one of `size` and
            `scale_factor` must be given.
        mode: "nearest", "nearest-exact", "bilinear" or "bicubic".
        align_corners: for "bilinear" and "bicubic"; default False.
        recompute_scale_factor: as in `segkernels.interpolate`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C, H_out, W_out]."""
        return interpolate(
            input,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            self.recompute_scale_factor,
        )


class ResizeConv(torch.nn.Module):
    """Upsample, then convolve: avoids the checkerboard artefacts of a transposed convolution.

    If the kernel size of a transposed convolution is not a multiple of its stride, its outputs
    overlap unevenly, and even a constant input gives a checkerboard. Here every output pixel is the
    same sum. From Odena et al. 2016, "Deconvolution and Checkerboard Artifacts".

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the convolution, odd.
        scale_factor: factor of the height and the width.
        mode: of `segkernels.interpolate`: "nearest" or "bilinear".
        bias: whether the convolution has a bias.
        padding_mode: of the convolution: "zeros", "reflect", "replicate" or "circular".

    Shape: [N, in_channels, H, W] to [N, out_channels, H * scale_factor, W * scale_factor].

    Raises:
        ValueError: an even `kernel_size`, an unknown `mode`, or a `scale_factor` below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        scale_factor: int = 2,
        mode: str = "nearest",
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ResizeConv: kernel_size must be odd, got {kernel_size}")
        if mode not in ("nearest", "bilinear"):
            raise ValueError(f"ResizeConv: mode must be 'nearest' or 'bilinear', got {mode!r}")
        if scale_factor < 1:
            raise ValueError(f"ResizeConv: scale_factor must be at least 1, got {scale_factor}")
        self.scale_factor = scale_factor
        self.mode = mode
        self.conv = torch.nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=bias,
            padding_mode=padding_mode,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C_out, H * scale_factor, W * scale_factor]."""
        corners = None if self.mode == "nearest" else False
        scale = float(self.scale_factor)
        upsampled = interpolate(input, scale_factor=scale, mode=self.mode, align_corners=corners)
        out: torch.Tensor = self.conv(upsampled)
        return out

    def extra_repr(self) -> str:
        """The arguments that the convolution does not show."""
        return f"scale_factor={self.scale_factor}, mode={self.mode!r}"


@torch.no_grad()
def bilinear_kernel_(conv: torch.nn.ConvTranspose2d) -> torch.nn.ConvTranspose2d:
    """Set the weight of a transposed convolution, in place, to bilinear upsampling per channel.

    This initialises FCN's learnable upsampling (Long et al. 2015, section 3.3). Along each axis a
    kernel of size k has the weights ``1 - |i - c| / f``, with f = ceil(k / 2) and centre c. To
    upsample by s, use a kernel of size ``2 * s - s % 2``, stride s and padding ``(s - s % 2) / 2``;
    away from the borders the result is that of ``interpolate(mode="bilinear")``.

    Args:
        conv: must have as many output channels as input channels, in any number of groups. Its
            bias, if it has one, is set to 0.

    Returns:
        `conv`.

    Raises:
        TypeError: `conv` is not a `torch.nn.ConvTranspose2d`.
        ValueError: `conv` has different numbers of input and output channels.
    """
    if not isinstance(conv, torch.nn.ConvTranspose2d):
        raise TypeError(
            f"bilinear_kernel_: conv must be torch.nn.ConvTranspose2d, got {type(conv)}"
        )
    if conv.in_channels != conv.out_channels:
        raise ValueError(
            "bilinear_kernel_: conv must have as many output channels as input channels, got "
            f"in_channels={conv.in_channels}, out_channels={conv.out_channels}"
        )
    weight = conv.weight
    rows, columns = (_triangle(size).to(weight) for size in weight.shape[-2:])
    channel = torch.arange(conv.in_channels, device=weight.device)
    weight.zero_()
    weight[channel, channel % weight.shape[1]] = torch.outer(rows, columns)
    if conv.bias is not None:
        conv.bias.zero_()
    return conv


def _triangle(size: int) -> torch.Tensor:
    """Weights of a bilinear kernel along one axis."""
    factor = (size + 1) // 2
    i = torch.arange(size, dtype=torch.float64)
    return 1 - (i - (size - 1) / 2).abs() / factor
