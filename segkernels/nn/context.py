"""The context module of Yu and Koltun 2016."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F

from segkernels.nn.convolution import Backend, check_backend, convolve
from segkernels.ops import _operator


class ContextModule(torch.nn.Module):
    """Multi-scale context aggregation: seven dilated 3x3 convolutions and a 1x1 one.

    Yu and Koltun 2016, "Multi-scale context aggregation by dilated convolutions", section 3 and
    table 1. The dilations are 1, 1, 2, 4, 8, 16, 1, ReLU behind each of these seven, and then the
    1x1 convolution. An output sees 67x67 inputs, and the resolution is kept. Put it behind a
    front end's class scores; a fresh one passes them on (but for ReLU), so that it can be trained
    from there.

    So narrow a chain is bound by memory and by launches. The layers run in channels_last whatever
    the input's layout; on two CPU cores, not otherwise idle, that took 0.6 to 0.8 of the time of
    torch's layers in a contiguous one. A band of 32 rows at a time through all of them, so that its
    maps stay in the cache, took 1.3 to 2.0 times as long, for its halo of 33 rows on each side is
    computed anew (``pytest benchmarks/bench_modules.py -k context --full --benchmark-only`` prints
    both). On CUDA the module neither synchronises nor keeps anything, so that its launches can be
    captured in a CUDA graph, or replayed by ``torch.compile(mode="reduce-overhead")``; no graph is
    kept here, because it would hold buffers for every shape that was ever seen.

    Args:
        num_classes: C, the channels of the input and of the output.
        multiplier: channels of the layers, in multiples of C: one int for the first seven (1, the
            default, is the paper's Basic), or one for each of the eight, the last of them 1
            (`LARGE` is the paper's Large).
        padding: where the zeros outside the map come in. "each": before each layer, as in the
            authors' network for Cityscapes. "once": 33 on each side of the input and none later, as
            in theirs for PASCAL VOC; near the border layers then see what the biases made of them.
        noise: standard deviation of the starting weights that are not part of the identity, in
            units of those that are; used where a multiplier is not 1, to break the ties between a
            class's channels (the paper asks for much less than 1).
        backend: as in `segkernels.dilated_conv2d`; "torch": torch's convolutions.

    Attributes:
        convs: the eight `torch.nn.Conv2d`.

    Shape: [N, C, H, W] to [N, C, H, W].

    Raises:
        ValueError: `num_classes` below 1; `multiplier` neither one positive int nor eight that end
            in 1; an unknown `padding` or `backend`.
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
        check_backend(backend, "ContextModule")
        widths = (*[multiplier] * 7, 1) if isinstance(multiplier, int) else tuple(multiplier)
        if len(widths) != 8 or min(widths) < 1 or widths[-1] != 1:
            raise ValueError(
                "ContextModule: multiplier must be one positive int, or eight that end in 1, got "
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
        """The paper's identity initialisation (section 3, both equations).

        Layer by layer, channel a of c_in takes part in channel b of c_out where both belong to the
        same class, ``floor(a C / c_in) == floor(b C / c_out)``, by the weight C / c_out at the
        kernel's centre. The other weights are 0, or noise where c_in or c_out is not C. Biases are
        0.
        """
        for conv in self.convs:
            assert isinstance(conv, torch.nn.Conv2d)
            classes, c_in, c_out = self.num_classes, conv.in_channels, conv.out_channels
            share = classes / c_out
            wide = c_in != classes or c_out != classes
            torch.nn.init.normal_(conv.weight, std=self.noise * share if wide else 0.0)
            of_in = torch.arange(c_in) * classes // c_in
            of_out = torch.arange(c_out) * classes // c_out
            same = (of_out[:, None] == of_in).to(conv.weight.device)
            middle = conv.kernel_size[0] // 2
            centre = conv.weight[:, :, middle, middle]
            centre.copy_(torch.where(same, torch.full_like(centre, share), centre))
            if conv.bias is not None:
                torch.nn.init.zeros_(conv.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, C, H, W], in the layout of `input`."""
        if self.backend == "torch":
            return self._plain(input)
        # So few channels are convolved several times as fast when they lie side by side.
        out = input.contiguous(memory_format=torch.channels_last)
        *dilated, last = (cast(torch.nn.Conv2d, conv) for conv in self.convs)
        for conv in dilated:
            out = convolve(out, conv, conv.bias, activation="relu", backend=self.backend)
        out = convolve(out, last, last.bias, backend=self.backend)
        return out if _operator.is_channels_last(input) else out.contiguous()

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        *dilated, last = self.convs
        for conv in dilated:
            x = F.relu(conv(x))
        out: torch.Tensor = last(x)
        return out

    def extra_repr(self) -> str:
        """What the convolutions do not show."""
        chosen = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{self.num_classes}, padding={self.padding!r}{chosen}"
