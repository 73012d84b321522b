"""Helpers for the lattice and CRF tests: feature points, expected errors, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

import segkernels
from segkernels.ops.permutohedral.native import MAX_DIMS
from segkernels.ops.permutohedral.reference import barycentric, elevate, simplex

# Each dimension has its own kernel instance; the quick part runs a few of them.
EVERY_DIMS = pytest.mark.parametrize(
    "dims",
    [
        pytest.param(d, marks=[] if d in (1, 2, 3, 5, 16) else [pytest.mark.slow])
        for d in range(1, MAX_DIMS + 1)
    ],
)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Assert a maximal error relative to the largest magnitude of `want`."""
    assert got.shape == want.shape
    want = want.detach().cpu().double()
    error = (got.detach().cpu().double() - want).abs().max()
    assert float(error) <= tolerance * float(want.abs().max())


def weights_of(points: torch.Tensor) -> torch.Tensor:
    """Barycentric weights (N, d + 1) of points (N, d) in float64."""
    elevated = elevate(points.double())
    return barycentric(elevated, *simplex(elevated))


def draw_features(
    shape: Sequence[int], spread: float = 1.0, margin: float = 1e-3, seed: int = 0
) -> torch.Tensor:
    """Random float64 features (B, d, *spatial), each at least `margin` inside its simplex.

    The values are exact in float32, and float32 rounding moves none to another simplex. So float32
    and float64 give the same lattice, and a finite-difference step does not change it.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return spread * torch.randn(count, shape[1], generator=generator)

    count = torch.Size((shape[0], *shape[2:])).numel()
    points = draw(count)
    while True:
        bad = weights_of(points).amin(dim=1) < margin
        if not bad.any():
            break
        points[bad] = draw(int(bad.sum()))
    points = points.double().view(shape[0], -1, shape[1])
    return points.transpose(1, 2).reshape(tuple(shape)).contiguous()


@contextmanager
def raises_in_call(match: str) -> Iterator[None]:
    """Expect a ValueError about invalid values from the call itself, on CUDA too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGKERNELS_CHECK", "1")
        with pytest.raises(ValueError, match=match):
            yield


@contextmanager
def raised_by_check(match: str) -> Iterator[None]:
    """Expect no error from a call on CUDA, and one error from the next `segkernels.check()`."""
    yield
    with pytest.raises(ValueError, match=f"^segkernels: {match}"):
        segkernels.check()
    segkernels.check()


@contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill memory from torch.empty and the like with NaN, or 99 for integers."""

    def spoil(allocate):
        def allocated(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.device.type != "meta":
                with torch.no_grad():
                    out.fill_(float("nan") if out.dtype.is_floating_point else 99)
            return out

        return allocated

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", spoil(torch.empty))
        patch.setattr(torch, "empty_like", spoil(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", spoil(torch.Tensor.new_empty))
        yield
