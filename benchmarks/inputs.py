"""Inputs of the benchmarks: a drawn image at any size, and smooth random probabilities."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from shapes import CrfShape, FilterShape

from segkernels.cli import demo

# Standard deviation of camera noise, added after resizing, which would smooth it. The noise spreads
# colours over the lattice: with it, the image has 20,600 vertices at 512 x 512 (bilateral term,
# default sigmas). Five photographs resized to 512 x 512 had 10,600 to 27,700.
_NOISE = 6.0


@functools.lru_cache(maxsize=4)
def landscape(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """The image of `segkernels demo`, resized, with noise: (H, W, 3) uint8."""
    image = Image.fromarray(demo.scene("image"))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    noise = np.random.default_rng(seed).normal(0, _NOISE, resized.shape)
    return np.clip(resized + noise, 0, 255).round().astype(np.uint8)


@functools.lru_cache(maxsize=4)
def probabilities(height: int, width: int, classes: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """Softmax of smooth random fields, like coarse network scores: (C, H, W) float32."""
    random = np.random.default_rng(seed)
    coarse = random.normal(0, 2, (classes, height // 16 + 1, width // 16 + 1)).astype(np.float32)
    fields = np.stack(
        [
            np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC))
            for c in coarse
        ]
    )
    fields -= fields.max(axis=0)
    np.exp(fields, out=fields)
    return np.ascontiguousarray(fields / fields.sum(axis=0), np.float32)


def normal(size: Sequence[int], device: torch.device, seed: int = 0) -> torch.Tensor:
    """Standard normal values, generated on the device, which is faster for large tensors."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(size), generator=generator, device=device)


def crf_inputs(shape: CrfShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W) uint8 and probabilities (B, C, H, W) float32."""
    images = [landscape(shape.height, shape.width, seed) for seed in range(shape.batch)]
    probs = [
        probabilities(shape.height, shape.width, shape.classes, 1 + seed)
        for seed in range(shape.batch)
    ]
    image = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return image.to(device), torch.from_numpy(np.stack(probs)).to(device)


def filter_inputs(shape: FilterShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (1, C, H, W) and features (1, d, H, W) divided by the dense CRF's default sigmas."""
    y, x = np.mgrid[: shape.height, : shape.width].astype(np.float32)
    if shape.features == "spatial":
        planes: list[npt.NDArray[Any]] = [x / 3, y / 3]
    else:
        colours = landscape(shape.height, shape.width).astype(np.float32) / 13
        planes = [x / 80, y / 80, *np.moveaxis(colours, 2, 0)]
    features = torch.from_numpy(np.stack(planes).astype(np.float32)).unsqueeze(0)
    values = torch.from_numpy(probabilities(shape.height, shape.width, shape.channels)).unsqueeze(0)
    return values.to(device), features.to(device)


def feature_planes(height: int, width: int, dims: int) -> npt.NDArray[np.float32]:
    """Features (d, H, W): positions / 80, colours / 13, then smooth random fields; float32."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    colours = np.moveaxis(landscape(height, width).astype(np.float32) / 13, 2, 0)
    planes: list[npt.NDArray[Any]] = [x / 80, y / 80, *colours]
    if dims > len(planes):
        more = probabilities(height, width, dims - len(planes), seed=2)
        planes += list(np.log(more + 0.1))
    return np.stack(planes[:dims]).astype(np.float32)
