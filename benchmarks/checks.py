"""Whether a result is right, asked before anything is timed."""

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

_CROP = 64
_TOLERANCE = 1e-4
# Points whose lattice coordinates all but tie are rounded to another simplex by another compiler.
_OUTLIERS = 0.005


class WrongResultError(AssertionError):
    """A result is not what it should be, so no time is taken."""


def crf(
    shape: CrfShape, result: torch.Tensor, images: torch.Tensor, probs: torch.Tensor, peer: Peer
) -> str:
    """Holds `result` against the peer's, or a crop against plain torch where there is no peer.

    Returns:
        What it was held against, for the report.
    """
    if peer.run is not None:
        expected = torch.from_numpy(peer.run())
        close(result[0].cpu(), expected, 1.0, f"{shape.name} against {peer.name}")
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
    """Holds `dense_crf` on a crop of `size` x `size` against plain torch.

    Returns:
        What it was held against, for the report.
    """
    crop = (slice(None), slice(None), slice(0, size), slice(0, size))
    some, theirs = images[:1][crop].contiguous(), probs[:1][crop].contiguous()
    ours = segkernels.dense_crf(some, theirs, iterations=shape.iterations, method=method)
    height, width = theirs.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y]).float().view(1, 2, -1)
    colours = some.cpu().float().flatten(2)
    expected = crf_reference.mean_field(
        theirs.cpu().flatten(2),
        [place / 3, torch.cat([place / 80, colours / 13], dim=1)],
        [torch.tensor(3.0), torch.tensor(10.0)],
        "probs",
        ("symmetric", "symmetric"),
        shape.iterations,
        False,
        method,
    )
    found = ours.cpu().flatten(2)[0]
    close(found, expected[0], scale, f"{shape.name}, a crop against plain torch")
    return f"plain torch on a crop of {width} x {height}"


def term(
    refine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    probs: torch.Tensor,
    iterations: int,
) -> str:
    """Holds `refine(features, probs)`, a CRF of one term of weight 4, on a crop.

    Args:
        refine: the CRF.
        features: (d, H, W) float32.
        probs: (C, H, W) float32.
        iterations: of mean field.
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
    close(found.flatten(1), expected[0], 1.0, f"{len(features)} features, a crop")
    return f"plain torch on a crop of {_CROP} x {_CROP}"


def same(result: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Two results of the same kernels: the same bits."""
    if not torch.equal(result, expected):
        raise WrongResultError(f"{what}: not the same bits")


def filtered(
    shape: FilterShape,
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    features: torch.Tensor,
) -> str:
    """Holds a filter, `call(values, features)`, on a crop against plain torch."""
    crop = (slice(None), slice(None), slice(0, _CROP), slice(0, _CROP))
    values, features = values[crop].contiguous(), features[crop].contiguous()
    expected = reference_filter(values.cpu(), features.cpu())
    scale = float(expected.abs().max())
    found = call(values, features).cpu()
    close(found[0], expected[0], scale, f"{shape.name}, a crop against plain torch")
    return f"plain torch on a crop of {_CROP} x {_CROP}"


def gaussian(
    shape: FilterShape,
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: torch.Tensor,
    features: torch.Tensor,
    tolerance: float,
) -> str:
    """Holds an exact filter, `call(values, features)`, on a crop against brute force in float64."""
    crop = (slice(None), slice(None), slice(0, _CROP), slice(0, _CROP))
    values, features = values[crop].contiguous(), features[crop].contiguous()
    expected = brute_force(values.cpu().double(), features.cpu().double())
    error = float((call(values, features).cpu() - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise WrongResultError(f"{shape.name}: off by {error:.1e}, more than {tolerance:g}")
    return f"brute force in float64 on a crop of {_CROP} x {_CROP}, {error:.1e}"


def close(found: torch.Tensor, expected: torch.Tensor, scale: float, what: str) -> None:
    """Raises unless all but few points of two (C, ...) tensors agree."""
    if found.shape != expected.shape:
        raise WrongResultError(f"{what}: {tuple(found.shape)}, not {tuple(expected.shape)}")
    worst = (found - expected).abs().amax(dim=0)  # NaN stays NaN, and is not below the tolerance
    wrong = 1 - float((worst <= _TOLERANCE * scale).float().mean())
    if wrong > _OUTLIERS:
        raise WrongResultError(
            f"{what}: {wrong:.2%} of the points differ by more than {_TOLERANCE * scale:g}, "
            f"the worst by {float(worst.max()):g}"
        )
