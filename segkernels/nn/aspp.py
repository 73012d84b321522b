"""Atrous spatial pyramid pooling, of DeepLab v2 and v3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F

from segkernels.nn.convolution import Backend, check_backend, conv_bn_act, is_plain_conv
from segkernels.nn.folding import BatchNorm, fold_batch_norm, foldable
from segkernels.ops.aspp import aspp

_Layers = tuple[torch.nn.Conv2d, BatchNorm]


class ASPP(torch.nn.Module):
    """Atrous spatial pyramid pooling: one input seen by dilated convolutions at several rates.

    "v3", Chen et al. 2017, "Rethinking atrous convolution for semantic image segmentation",
    section 3.3: a 1x1 convolution, a 3x3 one at each rate, and the image's mean through a 1x1 one,
    side by side, then a 1x1 convolution of it all; each with batch normalisation and ReLU. Its
    parameters have the names of torchvision's ``models.segmentation.deeplabv3.ASPP``, and its state
    dicts load.

    "v2", Chen et al. 2018, "DeepLab: semantic image segmentation with deep convolutional nets,
    atrous convolution, and fully connected CRFs", section 3.2: the sum of 3x3 convolutions with
    biases, one a rate.

    The branches are one call of `segkernels.aspp`: in the v2 form always, in the v3 form where the
    batch normalisations use their running statistics, which are folded in as in
    `segkernels.conv_bn_act`. Elsewhere (training) the v3 branches run one after the other.

    Args:
        in_channels: of the input.
        out_channels: of the output, and in the v3 form of each branch.
        atrous_rates: of the 3x3 convolutions: (12, 24, 36) for v3 at an output stride of 8,
            (6, 12, 18) at 16, (6, 12, 18, 24) for v2's large one.
        form: "v3" or "v2".
        dropout: probability at the end of the v3 form; v2 has none.
        backend: as in `segkernels.dilated_conv2d`; "torch": torch's layers one after the other.

    Attributes:
        convs: the branches; in the v3 form the image pooling is the last.
        project: v3: convolution, normalisation, ReLU and dropout.

    Shape: [N, in_channels, H, W] to [N, out_channels, H, W], any H and W.

    Raises:
        ValueError: no rate or one below 1, an unknown `form` or `backend`; and, from the call, a
            batch of 1 in training in the v3 form: over the image pooling's one value a channel
            there is no batch statistic. (torchvision's raises too.)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        atrous_rates: Sequence[int],
        *,
        form: Literal["v3", "v2"] = "v3",
        dropout: float = 0.5,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_backend(backend, "ASPP")
        if form not in ("v2", "v3"):
            raise ValueError(f"ASPP: form must be 'v2' or 'v3', got {form!r}")
        if not atrous_rates or min(atrous_rates) < 1:
            raise ValueError(
                f"ASPP: atrous_rates must be ints of at least 1, got {list(atrous_rates)}"
            )
        self.form = form
        self.backend = backend
        if form == "v2":
            self.rates = tuple(atrous_rates)
            self.convs = torch.nn.ModuleList(
                torch.nn.Conv2d(in_channels, out_channels, 3, padding=rate, dilation=rate)
                for rate in self.rates
            )
            return
        self.rates = (1, *atrous_rates)
        self.convs = torch.nn.ModuleList([_layers(in_channels, out_channels, 1)])
        for rate in atrous_rates:
            self.convs.append(_layers(in_channels, out_channels, 3, rate))
        pooling = torch.nn.AdaptiveAvgPool2d(1)
        self.convs.append(torch.nn.Sequential(pooling, *_layers(in_channels, out_channels, 1)))
        self.project = torch.nn.Sequential(
            *_layers(len(self.convs) * out_channels, out_channels, 1), torch.nn.Dropout(dropout)
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, out_channels, H, W]."""
        if self.form == "v2":
            return self._summed(input)
        if input.dim() == 4 and input.size(0) == 1 and self._needs_a_batch():
            raise ValueError(
                "ASPP: training needs a batch of at least 2, because the image pooling leaves one "
                "value a channel and image, got a batch of 1; with eval(), or with "
                "convs[-1][2].eval() alone, one image is enough"
            )
        if self.backend == "torch":
            return self._plain(input)
        out = self._side_by_side(input)
        conv, bn = _of(self.project)
        out = conv_bn_act(out, conv, bn, backend=self.backend)
        dropped: torch.Tensor = self.project[3](out)
        return dropped

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        convs = [cast(torch.nn.Conv2d, conv) for conv in self.convs]
        if self.backend == "torch" or not all(map(is_plain_conv, convs)):
            branches = [conv(x) for conv in convs]
            return sum(branches[1:], branches[0])
        biases = [conv.bias for conv in convs if conv.bias is not None]
        shift = torch.stack(biases).sum(0) if biases else None
        weights = [conv.weight for conv in convs]
        return aspp(x, weights, self.rates, shift=shift, form="v2", backend=self.backend)

    def _side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """Everything before `project`."""
        *branches, pooling = self.convs
        pairs = [_of(cast(torch.nn.Sequential, branch)) for branch in branches]
        to_mean, conv, bn, _ = cast(torch.nn.Sequential, pooling)
        mean = to_mean(x)
        pooled = conv_bn_act(mean, cast(torch.nn.Conv2d, conv), bn, backend=self.backend)
        if not all(is_plain_conv(conv) and foldable(bn) for conv, bn in pairs):
            each = [conv_bn_act(x, conv, bn, backend=self.backend) for conv, bn in pairs]
            return torch.cat([*each, pooled.expand(-1, -1, *x.shape[2:])], dim=1)
        scales, shifts = zip(*(fold_batch_norm(*pair) for pair in pairs), strict=True)
        return aspp(
            x,
            [conv.weight for conv, _ in pairs],
            self.rates,
            scale=torch.cat(scales),
            shift=torch.cat(shifts),
            pooled=pooled,
            activation="relu",
            backend=self.backend,
        )

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        each = [branch(x) for branch in self.convs]
        size = (x.size(2), x.size(3))
        each[-1] = F.interpolate(each[-1], size=size, mode="bilinear", align_corners=False)
        out: torch.Tensor = self.project(torch.cat(each, dim=1))
        return out

    def _needs_a_batch(self) -> bool:
        bn = cast(torch.nn.Sequential, self.convs[-1])[2]
        return type(bn) is torch.nn.BatchNorm2d and (bn.training or bn.running_mean is None)

    def extra_repr(self) -> str:
        """What the layers do not show."""
        chosen = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"form={self.form!r}{chosen}"


def _layers(in_channels: int, out_channels: int, kernel: int, rate: int = 1) -> torch.nn.Sequential:
    padding = rate * (kernel // 2)
    return torch.nn.Sequential(
        torch.nn.Conv2d(
            in_channels, out_channels, kernel, padding=padding, dilation=rate, bias=False
        ),
        torch.nn.BatchNorm2d(out_channels),
        torch.nn.ReLU(),
    )


def _of(layers: torch.nn.Sequential) -> _Layers:
    """The convolution and the normalisation at the start of `layers`."""
    return cast(_Layers, (layers[0], layers[1]))
