"""Benchmarks of the permutohedral lattice: build, filter, and both in one call."""

from __future__ import annotations

import functools

import cases
import checks
import pytest
import torch
from budget import each
from inputs import filter_inputs
from measure import measure
from memory import peak_bytes
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import FILTER, FilterShape
from timing import clock

import segkernels

pytestmark = pytest.mark.benchmark(timer=clock)
each_shape = each(FILTER)


@each_shape
def test_permutohedral(
    benchmark: BenchmarkFixture, shape: FilterShape, device: torch.device
) -> None:
    values, features = filter_inputs(shape, device)
    measure(
        benchmark,
        f"permutohedral_filter {shape.name}",
        cases.permutohedral(shape, device),
        checked=checks.filtered(shape, segkernels.permutohedral_filter, values, features),
        moved=cases.filter_bytes(shape),
        peak=functools.partial(peak_bytes, cases.permutohedral, shape, device, device=device),
        source=shape.source,
        vertices=cases.vertices(shape, device),
    )


@each_shape
def test_permutohedral_reused(
    benchmark: BenchmarkFixture, shape: FilterShape, device: torch.device
) -> None:
    values, features = filter_inputs(shape, device)
    checked = checks.filtered(
        shape, lambda v, f: segkernels.PermutohedralLattice(f).filter(v), values, features
    )
    measure(
        benchmark,
        f"PermutohedralLattice.filter {shape.name}",
        cases.permutohedral_reused(shape, device),
        checked=checked,
        source=shape.source,
    )


@each_shape
def test_permutohedral_build(
    benchmark: BenchmarkFixture, shape: FilterShape, device: torch.device
) -> None:
    values, features = filter_inputs(shape, device)
    checked = checks.filtered(
        shape, lambda v, f: segkernels.PermutohedralLattice(f).filter(v), values, features
    )
    measure(
        benchmark,
        f"PermutohedralLattice {shape.name}",
        cases.permutohedral_build(shape, device),
        checked=checked,
        source=shape.source,
    )
