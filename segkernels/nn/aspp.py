"""ASPP: atrous spatial pyramid pooling of DeepLab v2 and v3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F

from segkernels.nn.convolution import backend_repr, conv_bn_act, is_plain_conv
from segkernels.nn.folding import BatchNorm, fold_batch_norm, foldable
from segkernels.ops._arguments import check_choice
from segkernels.ops.aspp import FORMS, aspp
from segkernels.ops.dilated_conv2d import BACKENDS, Backend

_ConvAndBN = tuple[torch.nn.Conv2d, BatchNorm]


class ASPP(torch.nn.Module):
    """Atrous spatial pyramid pooling: dilated convolutions of one input at several rates.

    Form "v3" is from Chen et al. 2017, "Rethinking atrous convolution for semantic image
    segmentation", section 3.3: a 1x1 convolution, a 3x3 convolution for each rate, and a 1x1
    convolution of the image's mean are concatenated, followed by a 1x1 convolution. All have batch
    normalisation and ReLU. The parameters have the names of torchvision's
    ``models.segmentation.deeplabv3.ASPP``, so its state dicts can be loaded.

    Form "v2" is from Chen et al. 2018, "DeepLab: semantic image segmentation with deep
    convolutional nets, atrous convolution, and fully connected CRFs", section 3.2: the sum of 3x3
    convolutions with biases, one for each rate.

    The branches are computed by one call of `segkernels.aspp`: in form v2 always, in form v3 if the
    batch normalisations use their running statistics, which are folded as in
    `segkernels.conv_bn_act`. Otherwise (in training) the branches of form v3 are computed one at a
    time.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, and in form v3 of each branch.
        atrous_rates: rates of the 3x3 convolutions: (12, 24, 36) for v3 at output stride 8,
            (6, 12, 18) at output stride 16, (6, 12, 18, 24) for v2's ASPP-L.
        form: "v3" or "v2".
        dropout: probability of the dropout at the end of form v3; form v2 has none.
        backend: as in `segkernels.dilated_conv2d`; "torch" calls torch's layers one at a time.

    Attributes:
        convs: the branches; in form v3 the last one is the image pooling.
        project: form v3 only: convolution, normalisation, ReLU and dropout.

    Shape: [N, in_channels, H, W] to [N, out_channels, H, W], any H and W.

    Raises:
        ValueError: no rate, a rate below 1, or an unknown `form` or `backend`. `forward` raises for
            a batch of 1 in training in form v3, because the batch normalisation after the image
            pooling then has one value per channel (torchvision's module raises too).
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
        check_choice(backend, "backend", BACKENDS, "ASPP")
        check_choice(form, "form", FORMS, "ASPP")
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
            return self._sum(input)
        if input.dim() == 4 and input.size(0) == 1 and self._uses_batch_statistics():
            raise ValueError(
                "ASPP: training needs a batch of at least 2, because the image pooling has one "
                "value per channel and image, got a batch of 1; call eval(), or only "
                "convs[-1][2].eval(), to use one image"
            )
        if self.backend == "torch":
            return self._forward_torch(input)
        out = self._concatenate(input)
        conv, bn = _conv_and_bn(self.project)
        out = conv_bn_act(out, conv, bn, backend=self.backend)
        dropped: torch.Tensor = self.project[3](out)
        return dropped

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        convs = [cast(torch.nn.Conv2d, conv) for conv in self.convs]
        if self.backend == "torch" or not all(map(is_plain_conv, convs)):
            branches = [conv(x) for conv in convs]
            return sum(branches[1:], branches[0])
        biases = [conv.bias for conv in convs if conv.bias is not None]
        shift = torch.stack(biases).sum(0) if biases else None
        weights = [conv.weight for conv in convs]
        return aspp(x, weights, self.rates, shift=shift, form="v2", backend=self.backend)

    def _concatenate(self, x: torch.Tensor) -> torch.Tensor:
        """The input of `project`: all branches, concatenated."""
        *branches, pooling = self.convs
        pairs = [_conv_and_bn(cast(torch.nn.Sequential, branch)) for branch in branches]
        to_mean, conv, bn, _ = cast(torch.nn.Sequential, pooling)
        mean = to_mean(x)
        pooled = conv_bn_act(mean, cast(torch.nn.Conv2d, conv), bn, backend=self.backend)
        if not all(is_plain_conv(conv) and foldable(bn) for conv, bn in pairs):
            outs = [conv_bn_act(x, conv, bn, backend=self.backend) for conv, bn in pairs]
            return torch.cat([*outs, pooled.expand(-1, -1, *x.shape[2:])], dim=1)
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

    def _forward_torch(self, x: torch.Tensor) -> torch.Tensor:
        outs = [branch(x) for branch in self.convs]
        size = (x.size(2), x.size(3))
        outs[-1] = F.interpolate(outs[-1], size=size, mode="bilinear", align_corners=False)
        out: torch.Tensor = self.project(torch.cat(outs, dim=1))
        return out

    def _uses_batch_statistics(self) -> bool:
        """Whether the batch normalisation of the image pooling uses statistics of the batch."""
        bn = cast(torch.nn.Sequential, self.convs[-1])[2]
        return type(bn) is torch.nn.BatchNorm2d and (bn.training or bn.running_mean is None)

    def extra_repr(self) -> str:
        """The arguments that the layers do not show."""
        return f"form={self.form!r}" + backend_repr(self.backend)


def _layers(in_channels: int, out_channels: int, kernel: int, rate: int = 1) -> torch.nn.Sequential:
    padding = rate * (kernel // 2)
    return torch.nn.Sequential(
        torch.nn.Conv2d(
            in_channels, out_channels, kernel, padding=padding, dilation=rate, bias=False
        ),
        torch.nn.BatchNorm2d(out_channels),
        torch.nn.ReLU(),
    )


def _conv_and_bn(layers: torch.nn.Sequential) -> _ConvAndBN:
    """Return the convolution and the normalisation, the first two of `layers`."""
    return cast(_ConvAndBN, (layers[0], layers[1]))
