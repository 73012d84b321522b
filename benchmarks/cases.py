"""The calls that are timed, with inputs prepared from a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import crf_inputs, filter_inputs
from shapes import CrfShape, FilterShape

import segkernels

Call = Callable[[], torch.Tensor]


def crf(shape: CrfShape, device: torch.device, max_vertices: int | None = None) -> Call:
    """`dense_crf` with default arguments except the iterations."""
    images, probs = crf_inputs(shape, device)

    def call() -> torch.Tensor:
        return segkernels.dense_crf(
            images, probs, iterations=shape.iterations, max_vertices=max_vertices
        )

    return call


def crf_exact(shape: CrfShape, device: torch.device) -> Call:
    """`dense_crf` with exact filters, and otherwise default arguments except the iterations."""
    images, probs = crf_inputs(shape, device)
    return lambda: segkernels.dense_crf(images, probs, iterations=shape.iterations, method="exact")


def crf_training(shape: CrfShape, device: torch.device) -> Call:
    """Forward and backward of `DenseCRF`; returns the gradient with respect to the logits."""
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
    """Lattice vertices of the spatial and the bilateral term, summed over the batch."""
    kinds = ("spatial", "bilateral")
    shapes = [FilterShape(shape.height, shape.width, kind, 1, "") for kind in kinds]
    return {
        kind: shape.batch * sum(vertices(s, device)) for kind, s in zip(kinds, shapes, strict=True)
    }


def crf_bytes(shape: CrfShape) -> int:
    """Bytes to read image and probabilities once and to write the result once."""
    return shape.pixels * (3 + 2 * 4 * shape.classes)


def permutohedral(shape: FilterShape, device: torch.device) -> Call:
    """Build a lattice and filter once."""
    values, features = filter_inputs(shape, device)
    return lambda: segkernels.permutohedral_filter(values, features)


def permutohedral_reused(shape: FilterShape, device: torch.device) -> Call:
    """Filter on an existing lattice."""
    values, features = filter_inputs(shape, device)
    lattice = segkernels.PermutohedralLattice(features)
    return lambda: lattice.filter(values)


def permutohedral_build(shape: FilterShape, device: torch.device) -> Callable[[], Any]:
    """Build a lattice."""
    _, features = filter_inputs(shape, device)
    return lambda: segkernels.PermutohedralLattice(features)


def filter_bytes(shape: FilterShape) -> int:
    """Bytes to read values and features once and to write the result once, in float32."""
    return shape.height * shape.width * 4 * (2 * shape.channels + shape.dims)


def vertices(shape: FilterShape, device: torch.device) -> list[int]:
    """Number of lattice vertices of each image."""
    _, features = filter_inputs(shape, device)
    return segkernels.PermutohedralLattice(features).num_vertices


def gaussian(shape: FilterShape, device: torch.device, precision: str = "default") -> Call:
    """The exact filter, including the sorting of the points."""
    values, features = filter_inputs(shape, device)
    return lambda: segkernels.gaussian_filter(values, features, precision=precision)


def gaussian_training(shape: FilterShape, device: torch.device) -> Call:
    """Forward and backward of the exact filter; returns the gradient with respect to features."""
    values, features = filter_inputs(shape, device)
    values.requires_grad_()
    features.requires_grad_()

    def call() -> torch.Tensor:
        values.grad = features.grad = None
        segkernels.gaussian_filter(values, features).square().sum().backward()
        assert features.grad is not None
        return features.grad

    return call
