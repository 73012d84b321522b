"""Other implementations, each optional; where one is missing, why."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from shapes import CrfShape

Result = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Peer:
    """Another implementation of a case.

    Attributes:
        name: what it is called in reports, with its version.
        where: what it runs on.
        run: does the case once, inputs prepared; None where it is missing.
        missing: why.
        on_device: whether it runs on the device of this run, and is timed as ours is.
    """

    name: str
    where: str
    run: Callable[[], Any] | None = field(repr=False, default=None)
    missing: str = ""
    on_device: bool = False


def pydensecrf(shape: CrfShape, image: npt.NDArray[np.uint8], probs: Result) -> Peer:
    """pydensecrf2, the installable fork of pydensecrf, with the same parameters as `dense_crf`.

    Its energies are computed here, outside of its time: in pydensecrf they are the caller's work,
    while `dense_crf` takes probabilities and is timed with the logarithm.

    Args:
        shape: the case; one picture.
        image: (H, W, 3) uint8.
        probs: (C, H, W) float32.
    """
    name, where = "pydensecrf2", "CPU, one thread"
    try:
        crf: Any = importlib.import_module("pydensecrf.densecrf")
    except ImportError as error:
        return Peer(name, where, missing=f"{error}; pip install pydensecrf2")
    if shape.batch > 1:
        return Peer(name, where, missing="takes one picture a call")
    energy = np.ascontiguousarray(-np.log(np.clip(probs, 1e-5, 1)).reshape(shape.classes, -1))
    image = np.ascontiguousarray(image)

    def run() -> Result:
        field_ = crf.DenseCRF2D(shape.width, shape.height, shape.classes)
        field_.setUnaryEnergy(energy)
        field_.addPairwiseGaussian(sxy=3, compat=3)
        field_.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
        return np.array(field_.inference(shape.iterations), np.float32).reshape(probs.shape)

    version = importlib.metadata.version("pydensecrf2")
    return Peer(f"{name} {version}", where, run)


def brute_force(values: torch.Tensor, features: torch.Tensor) -> Peer:
    """The exact filter as one writes it in torch: some rows of the weights at a time, distances by
    matrix product. `values` (1, C, H, W) and `features` (1, d, H, W) are float32."""
    v, f = values[0].flatten(1).T.contiguous(), features[0].flatten(1).T.contiguous()
    squares = f.square().sum(dim=1)

    def run() -> torch.Tensor:
        out = []
        for x, square in zip(f.split(1024), squares.split(1024), strict=True):
            q = torch.addmm(squares, x, f.T, alpha=-2).add_(square.unsqueeze(1))
            weights = q.mul_(-0.5).exp_()
            out.append((weights @ v) / weights.sum(dim=1, keepdim=True))
        return torch.cat(out)

    return Peer("torch, 1024 rows at a time", str(values.device), run, on_device=True)


def pykeops(values: torch.Tensor, features: torch.Tensor) -> Peer:
    """The exact filter by KeOps' symbolic matrices, which compiles a kernel at its first call."""
    name = "pykeops"
    try:
        keops: Any = importlib.import_module("pykeops.torch")
    except ImportError as error:
        return Peer(name, str(values.device), missing=f"{error}; pip install pykeops")
    v, f = values[0].flatten(1).T.contiguous(), features[0].flatten(1).T.contiguous()

    def run() -> torch.Tensor:
        x, y = keops.LazyTensor(f[:, None, :]), keops.LazyTensor(f[None, :, :])
        weights = (-((x - y) ** 2).sum(-1) / 2).exp()
        result: torch.Tensor = (weights @ v) / weights.sum(dim=1)
        return result

    version = importlib.metadata.version("pykeops")
    return Peer(f"{name} {version}", str(values.device), run, on_device=True)
