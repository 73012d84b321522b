"""Checks of results, made before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from peers import Peer
from shapes import CrfShape, FilterShape

import segkernels
from segkernels.ops.dense_crf import reference as crf_reference
from segkernels.ops.gaussian_filter.reference import gaussian_filter as brute_force
from segkernels.ops.permutohedral.reference import permutohedral_filter as reference_filter

# Relative L2 errors against torch in float64; torch may compute float32 convolutions in TF32.
CONV_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-3}
LAYER_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-3}
_CROP = 64
_TOLERANCE = 1e-4
# Share of points that may differ: where lattice coordinates nearly tie, rounding, which depends on
# the compiler, decides which simplex contains the point.
_OUTLIERS = 0.005


class WrongResultError(AssertionError):
    """A result is wrong, so the case is not timed."""


def crf(
    shape: CrfShape, result: torch.Tensor, images: torch.Tensor, probs: torch.Tensor, peer: Peer
) -> str:
    """Check `result` against the peer's, or a crop against the torch reference if it is missing.

    Returns:
        what the result was checked against, for the report.
    """
    if peer.run is not None:
        expected = torch.from_numpy(peer.run())
        check_close(result[0].cpu(), expected, 1.0, f"{shape.name} against {peer.name}")
        return peer.name
    return crf_crop(shape, images, probs, "lattice", _CROP, 1.0)


def crf_crop(
    shape: CrfShape,
    images: torch.Tensor,
    probs: torch.Tensor,
    method: Literal["lattice", "exact"],
    size: int,
    scale: float,
) -> str:
    """Check `dense_crf` on a crop of `size` x `size` against the torch reference.

    Returns:
        what the result was checked against, for the report.
    """
    crop = (slice(None), slice(None), slice(0, size), slice(0, size))
    image, scores = images[:1][crop].contiguous(), probs[:1][crop].contiguous()
    ours = segkernels.dense_crf(image, scores, iterations=shape.iterations, method=method)
    height, width = scores.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack([x, y]).float().view(1, 2, -1)
    colours = image.cpu().float().flatten(2)
    expected = crf_reference.mean_field(
        scores.cpu().flatten(2),
        [positions / 3, torch.cat([positions / 80, colours / 13], dim=1)],
        [torch.tensor(3.0), torch.tensor(10.0)],
        "probs",
        ("symmetric", "symmetric"),
        shape.iterations,
        False,
        method,
    )
    found = ours.cpu().flatten(2)[0]
    check_close(found, expected[0], scale, f"{shape.name}, crop against the torch reference")
    return f"the torch reference on a crop of {width} x {height}"


def term(
    refine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    probs: torch.Tensor,
    iterations: int,
) -> str:
    """Check a CRF with one term of weight 4 on a crop against the torch reference.

    Args:
        refine: the CRF, called with features and probabilities.
        features: (d, H, W) float32.
        probs: (C, H, W) float32.
        iterations: number of mean-field iterations.
    """
    crop = (slice(None), slice(0, _CROP), slice(0, _CROP))
    planes, scores = features[crop].contiguous(), probs[crop].contiguous()
    found = refine(planes, scores).cpu()
    expected = crf_reference.mean_field(
        scores.cpu().flatten(1)[None],
        [planes.cpu().flatten(1)[None]],
        [torch.tensor(4.0)],
        "probs",
        ("symmetric",),
        iterations,
        False,
    )
    check_close(found.flatten(1), expected[0], 1.0, f"{len(features)} features, crop")
    return f"the torch reference on a crop of {_CROP} x {_CROP}"


def check_equal(result: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Check that two results are bit for bit equal."""
    if not torch.equal(result, expected):
        raise WrongResultError(f"{what}: results are not bit for bit equal")


def check_float64(
    result: torch.Tensor, exact: torch.Tensor, tolerances: dict[torch.dtype, float], what: str
) -> str:
    """Check a result against torch's in float64 by its relative L2 error.

    Args:
        result: the result.
        exact: torch's result in float64.
        tolerances: largest relative error, by the dtype of `result`.
        what: name of the result, for the error message.

    Returns:
        what the result was checked against, for the report.
    """
    error = float((result.double() - exact).norm() / exact.norm())
    if not error <= tolerances[result.dtype]:
        raise WrongResultError(f"{what}: relative error {error:g} against torch in float64")
    return "torch in float64"


def filtered(
    shape: FilterShape,
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    features: torch.Tensor,
) -> str:
    """Check a filter, `call(values, features)`, on a crop against the torch reference."""
    crop = (slice(None), slice(None), slice(0, _CROP), slice(0, _CROP))
    values, features = values[crop].contiguous(), features[crop].contiguous()
    expected = reference_filter(values.cpu(), features.cpu())
    scale = float(expected.abs().max())
    found = call(values, features).cpu()
    check_close(found[0], expected[0], scale, f"{shape.name}, crop against the torch reference")
    return f"the torch reference on a crop of {_CROP} x {_CROP}"


def gaussian(
    shape: FilterShape,
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    features: torch.Tensor,
    tolerance: float,
) -> str:
    """Check an exact filter, `call(values, features)`, on a crop against brute force in float64."""
    crop = (slice(None), slice(None), slice(0, _CROP), slice(0, _CROP))
    values, features = values[crop].contiguous(), features[crop].contiguous()
    expected = brute_force(values.cpu().double(), features.cpu().double())
    error = float((call(values, features).cpu() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise WrongResultError(f"{shape.name}: relative error {error:.1e} exceeds {tolerance:g}")
    return f"brute force in float64 on a crop of {_CROP} x {_CROP}, error {error:.1e}"


def check_close(found: torch.Tensor, expected: torch.Tensor, scale: float, what: str) -> None:
    """Check that two (C, ...) tensors agree at all but a small share of points."""
    if found.shape != expected.shape:
        raise WrongResultError(
            f"{what}: shape must be {tuple(expected.shape)}, got {tuple(found.shape)}"
        )
    worst = (found - expected).abs().amax(dim=0)  # NaN propagates and counts as wrong
    wrong = 1 - float((worst <= _TOLERANCE * scale).float().mean())
    if wrong > _OUTLIERS:
        raise WrongResultError(
            f"{what}: {wrong:.2%} of the points differ by more than {_TOLERANCE * scale:g}, "
            f"at most by {float(worst.max()):g}"
        )
