"""ContextModule: the context module of Yu and Koltun 2016."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F

from segkernels.nn.convolution import backend_repr, convolve
from segkernels.ops import _operator
from segkernels.ops._arguments import check_choice
from segkernels.ops.dilated_conv2d import BACKENDS, Backend


class ContextModule(torch.nn.Module):
    """Multi-scale context aggregation: seven dilated 3x3 convolutions and a 1x1 convolution.

    Yu and Koltun 2016, "Multi-scale context aggregation by dilated convolutions", section 3 and
    table 1. The dilations are 1, 1, 2, 4, 8, 16, 1, with ReLU after each of these seven layers. The
    receptive field is 67x67, and the output has the size of the input. Apply the module to the
    class scores of a front end. With its initial weights it returns them unchanged, except for
    ReLU, so training can continue from there.

    With few channels the layers are limited by memory bandwidth and launch overhead. They run in
    channels_last for any layout of the input; on two CPU cores that were not idle this took 0.6 to
    0.8 of the time of torch's layers in a contiguous layout. Computing bands of 32 rows through all
    layers, so that they stay in the cache, took 1.3 to 2.0 times as long, because a halo of 33 rows
    on each side is computed repeatedly (``pytest benchmarks/bench_modules.py -k context --full
    --benchmark-only`` prints both). On CUDA the module does not synchronise and caches nothing, so
    it can be captured in a CUDA graph or compiled with ``torch.compile(mode="reduce-overhead")``.
    It holds no graph itself, because a graph would keep buffers for every input shape.

    Args:
        num_classes: C, the number of channels of the input and of the output.
        multiplier: channels of the layers, in multiples of C: one int for the first seven layers
            (1, the default, is the paper's Basic), or eight ints of which the last is 1 (`LARGE` is
            the paper's Large).
        padding: "each" pads before each layer, as in the authors' network for Cityscapes. "once"
            pads the input by 33 on each side and no layer, as in their network for PASCAL VOC;
            outside the image, the later layers then read values computed from the biases.
        noise: standard deviation of the initial weights outside the identity, in units of those of
            the identity; used if a multiplier is not 1, to break the symmetry between the channels
            of a class (the paper recommends much less than 1).
        backend: as in `segkernels.dilated_conv2d`; "torch" calls torch's layers.

    Attributes:
        convs: the eight `torch.nn.Conv2d`.

    Shape: [N, C, H, W] to [N, C, H, W].

    Raises:
        ValueError: `num_classes` below 1; `multiplier` other than a positive int or eight positive
            ints that end in 1; an unknown `padding` or `backend`.
    """

    DILATIONS: ClassVar[tuple[int, ...]] = (1, 1, 2, 4, 8, 16, 1)
    LARGE: ClassVar[tuple[int, ...]] = (2, 2, 4, 8, 16, 32, 32, 1)

    def __init__(
        self,
        num_classes: int,
        *,
        multiplier: int | Sequence[int] = 1,
        padding: Literal["each", "once"] = "each",
        noise: float = 0.01,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_choice(backend, "backend", BACKENDS, "ContextModule")
        widths = (*[multiplier] * 7, 1) if isinstance(multiplier, int) else tuple(multiplier)
        if len(widths) != 8 or min(widths) < 1 or widths[-1] != 1:
            raise ValueError(
                "ContextModule: multiplier must be one positive int, or eight that end with 1, got "
                f"{multiplier!r}"
            )
        if num_classes < 1:
            raise ValueError(f"ContextModule: num_classes must be at least 1, got {num_classes}")
        if padding not in ("each", "once"):
            raise ValueError(f"ContextModule: padding must be 'each' or 'once', got {padding!r}")
        self.num_classes = num_classes
        self.padding = padding
        self.noise = noise
        self.backend = backend
        channels = [num_classes * width for width in (1, *widths)]
        pads = self.DILATIONS if padding == "each" else (sum(self.DILATIONS), *[0] * 6)
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(before, after, 3, padding=pad, dilation=dilation)
            for before, after, pad, dilation in zip(
                channels, channels[1:], pads, self.DILATIONS, strict=False
            )
        )
        self.convs.append(torch.nn.Conv2d(channels[7], channels[8], 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Apply the paper's identity initialisation (section 3, both equations).

        In each layer, input channel a of c_in and output channel b of c_out that belong to the same
        class, ``floor(a C / c_in) == floor(b C / c_out)``, have the weight C / c_out at the centre
        of the kernel. The other weights are 0, or noise if c_in or c_out is not C. Biases are 0.
        """
        for conv in self.convs:
            assert isinstance(conv, torch.nn.Conv2d)
            classes, c_in, c_out = self.num_classes, conv.in_channels, conv.out_channels
            value = classes / c_out
            has_noise = c_in != classes or c_out != classes
            torch.nn.init.normal_(conv.weight, std=self.noise * value if has_noise else 0.0)
            class_in = torch.arange(c_in) * classes // c_in
            class_out = torch.arange(c_out) * classes // c_out
            same = (class_out[:, None] == class_in).to(conv.weight.device)
            middle = conv.kernel_size[0] // 2
            centre = conv.weight[:, :, middle, middle]
            centre.copy_(torch.where(same, torch.full_like(centre, value), centre))
            if conv.bias is not None:
                torch.nn.init.zeros_(conv.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C, H, W], in the layout of `input`."""
        if self.backend == "torch":
            return self._forward_torch(input)
        # With so few channels convolutions are several times as fast in channels_last.
        out = input.contiguous(memory_format=torch.channels_last)
        *dilated, last = (cast(torch.nn.Conv2d, conv) for conv in self.convs)
        for conv in dilated:
            out = convolve(out, conv, conv.bias, activation="relu", backend=self.backend)
        out = convolve(out, last, last.bias, backend=self.backend)
        return out if _operator.is_channels_last(input) else out.contiguous()

    def _forward_torch(self, x: torch.Tensor) -> torch.Tensor:
        *dilated, last = self.convs
        for conv in dilated:
            x = F.relu(conv(x))
        out: torch.Tensor = last(x)
        return out

    def extra_repr(self) -> str:
        """The arguments that the convolutions do not show."""
        return f"{self.num_classes}, padding={self.padding!r}" + backend_repr(self.backend)
