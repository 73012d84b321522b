"""A narrow variant of every model learns drawn shapes from scratch, in seconds.

A prediction of ground everywhere has a mean IoU of about 0.15.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from models.drawn import CLASSES, draw, mean_iou

from segkernels import models


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: name of the model.
        least: mean IoU to reach on images outside the training set.
        size: height and width of the images.
        options: arguments of the model.
        steps: number of steps.
        rate: largest learning rate.
        batch: batch size.
    """

    name: str
    least: float
    size: int = 49
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 100
    rate: float = 5e-3
    batch: int = 4

    def __str__(self) -> str:
        return self.name


VGG = {"width": 1 / 8, "dropout": 0.0}
DILATED = {**VGG, "padding": "zeros"}
RESNET = {"width": 1 / 8, "layers": (1, 1, 1, 1)}
TIRAMISU = {"width": 1 / 2, "depths": (2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2), "dropout": 0.0}

RUNS = [
    Run("fcn32s", 0.33, 128, VGG, 300, 2e-3, 2),
    Run("fcn16s", 0.55, 128, VGG, 220, 2e-3, 2),
    Run("fcn8s", 0.5, 128, VGG, 150, 3e-3, 2),
    Run("fcn_resnet50", 0.6, options=RESNET, steps=60),
    Run("unet", 0.7, 48, VGG, 250, 3e-3),
    Run("dilatednet_frontend", 0.5, 80, DILATED, 300, 2e-3),
    Run("dilatednet", 0.4, 96, DILATED, 300, 2e-3),
    Run("dilatednet_large", 0.3, 96, DILATED, 350, 2e-3),
    Run("deeplab_v1", 0.5, 97, VGG, 450, 2e-3),
    Run("deeplab_v2_vgg16", 0.5, 97, VGG, 400, 3e-3),
    Run("deeplab_v2_resnet101", 0.6, options=RESNET, steps=60),
    # It learns slowly from scratch; its authors train it in two stages (section 4.2.2).
    Run("deconvnet", 0.35, 224, {"width": 1 / 16}, 200, 3e-2),
    Run("segnet", 0.5, 64, {"width": 1 / 8}, 180, 1e-2, 8),
    Run("fc_densenet56", 0.7, 48, TIRAMISU, 40),
    Run("pspnet50", 0.6, options=RESNET, steps=60),
    Run("deeplab_v3_resnet50", 0.6, options=RESNET),
    Run("deeplab_v3plus_resnet101", 0.6, options=RESNET),
]
STARTS = 3
# These differ from the models in RUNS only in depth.
DEEPER = {
    *("fcn_resnet101", "fc_densenet67", "fc_densenet103", "pspnet101", "deeplab_v3_resnet101"),
}


@cache
def pictures(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(count, size, seed)


def test_all_are_here() -> None:
    assert {run.name for run in RUNS} | DEEPER == set(models.list_models())


def train(run: Run, seed: int) -> float:
    """Train a model that is initialised with `seed`; return the mean IoU on other images."""
    torch.manual_seed(seed)
    model = models.create_model(run.name, len(CLASSES), **run.options)
    images, labels = pictures(64, run.size, 0)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.rate, total_steps=run.steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(run.steps):
        chosen = torch.randint(0, len(images), (run.batch,), generator=generator)
        loss = model.loss(images[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    images, labels = pictures(16, run.size, 1)
    return mean_iou(model.eval().predict(images), labels)


@pytest.mark.nightly
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_learns(run: Run) -> None:
    # The result of such a short training depends on the initialisation and on the processor's
    # rounding, so a run that fails is repeated with other seeds.
    reached: list[float] = []
    while len(reached) < STARTS and max(reached, default=0.0) < run.least:
        reached.append(train(run, seed=len(reached)))
    print(f"{run.name}: mean IoU " + ", ".join(f"{value:.3f}" for value in reached))
    assert max(reached) >= run.least
