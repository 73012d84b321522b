"""A small segmentation data set: drawn shapes of three kinds on a textured ground."""

from __future__ import annotations

import torch
import torch.nn.functional as F

CLASSES = ("ground", "disc", "square", "triangle")


def draw(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images [count, 3, size, size], from about -1 to 1, and labels [count, size, size].

    Each image has a few randomly rotated and overlapping shapes on a ground of smooth coloured
    noise. The shapes have about a third of the image's size. The colour of a shape depends on its
    kind, with a random shift and noise. The ground has all these colours too, so the colour of one
    pixel does not determine its label.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    coarse = uniform(count, 3, 6, 6) * 2 - 1
    images = F.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1) * 0.5
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    colours = torch.tensor([[0.9, -0.6, -0.6], [-0.6, 0.9, -0.6], [-0.6, -0.6, 0.9]])
    for image, label in zip(images, labels, strict=True):
        for _ in range(3):
            kind = int(uniform(1) * 3)
            centre, radius = uniform(2) * size, size * (0.22 + 0.1 * float(uniform(1)))
            angle = float(uniform(1)) * 6.3
            y, x = rows - centre[0], columns - centre[1]
            u = x * torch.tensor(angle).cos() + y * torch.tensor(angle).sin()
            v = y * torch.tensor(angle).cos() - x * torch.tensor(angle).sin()
            if kind == 0:
                inside = u.square() + v.square() < radius**2
            elif kind == 1:
                inside = torch.maximum(u.abs(), v.abs()) < 0.9 * radius
            else:
                inside = (v < 0.6 * radius) & (2 * u.abs() - v < 1.2 * radius)
            colour = colours[kind] + (uniform(3) - 0.5) * 0.4
            image[:, inside] = colour[:, None]
            label[inside] = kind + 1
    images += torch.randn(images.shape, generator=generator) * 0.1
    return images, labels


def mean_iou(found: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean intersection over union of the classes that occur."""
    counts = torch.bincount((labels * len(CLASSES) + found).flatten(), minlength=len(CLASSES) ** 2)
    table = counts.view(len(CLASSES), len(CLASSES)).double()
    both, either = table.diag(), table.sum(0) + table.sum(1) - table.diag()
    return float((both / either)[either > 0].mean())
