"""The figures of a model, counted: parameters and floating-point operations."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from segkernels import models


def parameters(model: torch.nn.Module) -> int:
    """The number of learned parameters."""
    return sum(p.numel() for p in model.parameters())


def flops(model: models.SegmentationModel, height: int, width: int) -> int:
    """Operations of the convolutions for one image; the model is on the meta device.

    The model needs ``backend="torch"``: the counter knows torch's convolutions.
    """
    image = torch.empty(1, model.in_channels, height, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops())
