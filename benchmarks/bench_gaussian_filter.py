"""Benchmarks of the exact Gaussian filter, against a torch implementation and KeOps."""

from __future__ import annotations

import functools

import cases
import checks
import peers
import pytest
import torch
from budget import each
from inputs import filter_inputs
from measure import measure
from memory import peak_bytes
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import EXACT, FilterShape
from timing import clock

import segkernels
from segkernels.ops.gaussian_filter.plan import Plan

pytestmark = pytest.mark.benchmark(timer=clock)
_CPU_PAIRS = 10**9  # cases with more pairs of points run on the CPU only if selected by name
TOLERANCE = {"default": 1e-3, "high": 1e-6}


def skip_on_cpu(shape: FilterShape, device: torch.device, request: pytest.FixtureRequest) -> None:
    """Skip a large case on the CPU unless it is selected by name."""
    pairs = (shape.height * shape.width) ** 2
    if device.type == "cpu" and pairs > _CPU_PAIRS and shape.name not in str(request.config.args):
        pytest.skip(f"{pairs:.1e} pairs of points; select {shape.name} to run it on the CPU")


@pytest.mark.parametrize("precision", ["default", "high"])
@each(EXACT)
def test_gaussian_filter(
    benchmark: BenchmarkFixture,
    shape: FilterShape,
    precision: str,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    skip_on_cpu(shape, device, request)
    if device.type == "cpu" and precision == "high":
        pytest.skip("on the CPU both precisions are the same")
    values, features = filter_inputs(shape, device)
    exact = functools.partial(segkernels.gaussian_filter, precision=precision)
    plan = Plan(features.flatten(2), None, "default", "bench_gaussian_filter")
    pairs = (shape.height * shape.width) ** 2
    share = plan.share(128 if device.type == "cuda" else 64)
    measure(
        benchmark,
        f"gaussian_filter {shape.name} {precision}",
        cases.gaussian(shape, device, precision),
        checked=checks.gaussian(shape, exact, values, features, TOLERANCE[precision]),
        peers=[peers.brute_force(values, features), peers.pykeops(values, features)],
        flops=int(pairs * share * (3 * shape.dims + 2 * shape.channels)),
        peak=functools.partial(peak_bytes, cases.gaussian, shape, device, device=device),
        source=shape.source,
        pairs=pairs,
        share_of_tile_pairs=share,
    )


@each(EXACT[:2])
def test_gaussian_filter_training(
    benchmark: BenchmarkFixture,
    shape: FilterShape,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    skip_on_cpu(shape, device, request)
    values, features = filter_inputs(shape, device)
    measure(
        benchmark,
        f"gaussian_filter forward + backward {shape.name}",
        cases.gaussian_training(shape, device),
        checked=checks.gaussian(shape, segkernels.gaussian_filter, values, features, 1e-3),
        source=shape.source,
    )
