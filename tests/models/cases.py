"""Small variants of the models for the shared tests, and the parameter counts of full models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from segkernels import models

CLASSES = 4


@dataclass(frozen=True)
class Case:
    """A small variant of a model.

    Attributes:
        name: name of the model.
        options: arguments that make the model small.
        size: height and width of the images, odd if the model allows odd sizes.
        too_small: a size that the model refuses; None if any size fits.
        one_image: whether the model trains on one image.
        label: name of the test, if it is not `name`.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (33, 45)
    too_small: tuple[int, int] | None = None
    one_image: bool = True
    label: str = ""

    def build(self, backend: str = "segkernels", **more: Any) -> models.SegmentationModel:
        options = {"num_classes": CLASSES, "backend": backend, **self.options, **more}
        return models.create_model(self.name, **options)

    def images(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, *self.size, generator=generator).to(dtype)

    def __str__(self) -> str:
        return self.label or self.name


VGG = {"width": 1 / 16}
RESNET = {"width": 1 / 16, "layers": (1, 1, 2, 1)}
TIRAMISU = {"width": 1 / 3, "depths": (2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 2)}
DILATED = {"width": 1 / 16, "padding": "zeros"}

CASES = [
    Case("fcn32s", VGG),
    Case("fcn16s", VGG),
    Case("fcn8s", VGG),
    Case("fcn_resnet50", {**RESNET, "aux_loss": True}),
    Case("unet", VGG, (32, 48), too_small=(15, 15)),
    Case("unet", {**VGG, "padding": "valid"}, (188, 204), (187, 187), label="unet-valid"),
    Case("dilatednet_frontend", DILATED),
    Case("dilatednet", {**VGG, "width": 1 / 32}, label="dilatednet-reflect"),
    Case("dilatednet_large", DILATED),
    Case("deeplab_v1", VGG),
    Case("deeplab_v2_vgg16", VGG),
    Case("deeplab_v2_resnet101", RESNET),
    Case("deconvnet", {"width": 1 / 32}, (225, 258), too_small=(223, 223)),
    Case("segnet", VGG, too_small=(31, 31)),
    Case("fc_densenet56", TIRAMISU, (33, 69), too_small=(31, 31)),
    Case("pspnet50", {**RESNET, "aux_loss": True}, one_image=False),
    Case("pspnet101", {**RESNET, "stem": "deep"}, one_image=False, label="pspnet-deep"),
    Case("deeplab_v3_resnet50", {**RESNET, "aux_loss": True}, one_image=False),
    Case("deeplab_v3plus_resnet101", RESNET, one_image=False),
]

# Name, arguments and number of parameters; 21 classes and 3 channels without other arguments.
PARAMETERS: list[tuple[str, dict[str, Any], int]] = [
    # VGG16 has 14,714,688, fc6 102,764,544, fc7 16,781,312, score_fr 86,037, score_pool4 10,773,
    # score_pool3 5,397, and a x2 upsampling 21 * 21 * 4 * 4. The last upsampling has none.
    ("fcn32s", {}, 134_346_581),
    ("fcn16s", {}, 134_364_410),
    ("fcn8s", {}, 134_376_863),
    ("fcn_resnet50", {}, 32_957_013),
    ("fcn_resnet101", {}, 51_949_141),
    ("fcn_resnet50", {"aux_loss": True}, 35_322_218),
    ("fcn_resnet101", {"aux_loss": True}, 54_314_346),
    ("unet", {"num_classes": 2, "in_channels": 1}, 31_030_658),
    ("unet", {"num_classes": 2, "in_channels": 1, "padding": "valid"}, 31_030_658),
    ("dilatednet_frontend", {}, 134_346_581),
    ("dilatednet", {}, 134_346_581 + 28_392),
    ("dilatednet_large", {}, 134_346_581 + 6_803_139),
    ("deeplab_v1", {}, 20_505_429),
    ("deeplab_v1", {"field": "4x4"}, 65_140_565),
    ("deeplab_v1", {"field": "7x7"}, 134_346_581),
    ("deeplab_v2_vgg16", {}, 37_877_652),
    ("deeplab_v2_resnet101", {}, 44_048_532),
    ("deconvnet", {}, 251_805_653),
    ("segnet", {"num_classes": 11}, 29_449_355),
    ("fc_densenet56", {"num_classes": 11}, 1_376_795),
    ("fc_densenet67", {"num_classes": 11}, 3_463_243),
    ("fc_densenet103", {"num_classes": 11}, 9_322_091),
    ("pspnet50", {}, 46_592_597),
    ("pspnet101", {}, 65_584_725),
    ("pspnet50", {"stem": "deep"}, 46_592_597 + 123_776),
    ("pspnet101", {"stem": "deep"}, 65_584_725 + 123_776),
    ("pspnet50", {"aux_loss": True}, 46_592_597 + 2_365_205),
    ("pspnet101", {"aux_loss": True}, 65_584_725 + 2_365_205),
    ("deeplab_v3_resnet50", {}, 39_638_869),
    ("deeplab_v3_resnet101", {}, 58_630_997),
    ("deeplab_v3_resnet50", {"aux_loss": True}, 42_004_074),
    ("deeplab_v3_resnet101", {"aux_loss": True}, 60_996_202),
    ("deeplab_v3plus_resnet101", {}, 59_344_309),
]


@torch.no_grad()
def as_if_trained(model: models.SegmentationModel) -> models.SegmentationModel:
    """Randomise what starts at a constant: BatchNorm, and weights and biases that are zero."""
    generator = torch.Generator().manual_seed(2)

    def normal(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            for x, centre in (
                (part.weight, 1.0),
                (part.running_var, 1.0),
                (part.bias, 0.0),
                (part.running_mean, 0.0),
            ):
                x.copy_(centre + 0.2 * normal(x).clamp(-2, 2))
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.1 * normal(parameter))
    return model


def outputs(found: torch.Tensor | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"out": found} if isinstance(found, torch.Tensor) else found
