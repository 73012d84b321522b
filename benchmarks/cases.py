"""The calls that are timed, made ready from a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import crf_inputs, filter_inputs
from shapes import CrfShape, FilterShape

import segkernels

Call = Callable[[], torch.Tensor]


def crf(shape: CrfShape, device: torch.device, max_vertices: int | None = None) -> Call:
    """`dense_crf` with its defaults, but for the iterations."""
    images, probs = crf_inputs(shape, device)

    def call() -> torch.Tensor:
        return segkernels.dense_crf(
            images, probs, iterations=shape.iterations, max_vertices=max_vertices
        )

    return call


def crf_exact(shape: CrfShape, device: torch.device) -> Call:
    """`dense_crf` with its defaults and exact filters."""
    images, probs = crf_inputs(shape, device)
    return lambda: segkernels.dense_crf(images, probs, iterations=shape.iterations, method="exact")


def crf_training(shape: CrfShape, device: torch.device) -> Call:
    """Forward and backward of the layer behind logits; returns the logits' gradient."""
    images, probs = crf_inputs(shape, device)
    logits = probs.log().requires_grad_()
    layer = segkernels.DenseCRF(shape.classes, iterations=shape.iterations).to(device)
    weights = torch.linspace(-1, 1, probs.numel(), device=device).view_as(probs)

    def call() -> torch.Tensor:
        logits.grad = None
        layer.zero_grad()
        layer(images, logits=logits).backward(weights)
        assert logits.grad is not None
        return logits.grad

    return call


def crf_vertices(shape: CrfShape, device: torch.device) -> dict[str, int]:
    """Vertices of the lattices of the smoothing and the colour term, the whole batch together."""
    kinds = ("spatial", "bilateral")
    shapes = [FilterShape(shape.height, shape.width, kind, 1, "") for kind in kinds]
    return {
        kind: shape.batch * sum(vertices(s, device)) for kind, s in zip(kinds, shapes, strict=True)
    }


def crf_bytes(shape: CrfShape) -> int:
    """The image and the probabilities read once, the result written once."""
    return shape.pixels * (3 + 2 * 4 * shape.classes)


def permutohedral(shape: FilterShape, device: torch.device) -> Call:
    """Building a lattice and filtering once."""
    values, features = filter_inputs(shape, device)
    return lambda: segkernels.permutohedral_filter(values, features)


def permutohedral_reused(shape: FilterShape, device: torch.device) -> Call:
    """Filtering on a lattice that is there already."""
    values, features = filter_inputs(shape, device)
    lattice = segkernels.PermutohedralLattice(features)
    return lambda: lattice.filter(values)


def permutohedral_build(shape: FilterShape, device: torch.device) -> Callable[[], Any]:
    """Building a lattice."""
    _, features = filter_inputs(shape, device)
    return lambda: segkernels.PermutohedralLattice(features)


def filter_bytes(shape: FilterShape) -> int:
    """Values and features read once, the result written once, in float32."""
    return shape.height * shape.width * 4 * (2 * shape.channels + shape.dims)


def vertices(shape: FilterShape, device: torch.device) -> list[int]:
    """Occupied vertices of the lattice."""
    _, features = filter_inputs(shape, device)
    return segkernels.PermutohedralLattice(features).num_vertices


def gaussian(shape: FilterShape, device: torch.device, precision: str = "default") -> Call:
    """The exact filter once, its points sorted anew."""
    values, features = filter_inputs(shape, device)
    return lambda: segkernels.gaussian_filter(values, features, precision=precision)


def gaussian_training(shape: FilterShape, device: torch.device) -> Call:
    """Forward and backward of the exact filter; returns the features' gradient."""
    values, features = filter_inputs(shape, device)
    values.requires_grad_()
    features.requires_grad_()

    def call() -> torch.Tensor:
        values.grad = features.grad = None
        segkernels.gaussian_filter(values, features).square().sum().backward()
        assert features.grad is not None
        return features.grad

    return call
