"""Lattice construction, splat and mean field: the emulated CUDA code against the CPU code."""

import math

import pytest
import torch
from emulation import emulated
from lattice_points import raised_by_check

from segkernels.ops.dense_crf import Config
from segkernels.ops.dense_crf import native as crf
from segkernels.ops.permutohedral import native
from segkernels.ops.permutohedral.native import Lattice

pytestmark = pytest.mark.emulated


def build(features: torch.Tensor, spatial: tuple[int, ...], **options: int) -> Lattice:
    (lattice,) = native.build([features], spatial, **options)
    return lattice


SHAPES = [
    (1, (40, 52)),
    (3, (17, 33)),
    (2, (1, 500)),
    (2, (500, 1)),
    (1, (150, 3)),
    (2, (300,)),
    (2, (3,)),
    (1, (7, 9, 11)),
]


def test_tiles_fit_narrow_images() -> None:
    for size, least in (((500, 1), 512), ((1, 500), 512), ((150, 3), 3 * 256), ((16, 16), 256)):
        grid = native.make_grid(torch.device("cpu"), 1, size, 5)
        assert grid.positions == least, size


def test_too_many_tiles_raise() -> None:
    features = torch.empty(2**22, 1, 1)
    message = r"must be below 2\*\*31 .* got 1073741824 \* 2 for 4194304"
    with pytest.raises(ValueError, match=message):
        build(features, (1, 1))


@pytest.mark.parametrize(("batch", "spatial"), SHAPES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_the_cpu(
    dims: int, batch: int, spatial: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(dims)
    points = math.prod(spatial)
    features = 6 * torch.rand(batch, dims, points, dtype=dtype)
    values = torch.randn(batch, 5, points, dtype=dtype)
    ways = [("symmetric", True), ("after", False), ("none", False)]
    config = Config("unary", ("after",), 3, False, spatial)
    terms = [features, torch.tensor(2.0, dtype=dtype)]
    found = []
    for on in (True, False):
        with emulated(on):
            lattice = build(features, spatial)
            results = [lattice.filter(values, *way) for way in ways]
            results.append(crf.mean_field(values, terms, config._replace(lattices=(lattice,))))
            found.append((lattice, results))
    (other, ours), (own, expected) = found
    assert own.num_vertices() == other.num_vertices()
    assert other.grid.tile_points == 256
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.nightly
def test_more_images_than_16_bits() -> None:
    # Two coincident points per image share their vertices, in the last image as in the first.
    values = torch.randn(33_000, 1, 2)
    lattice = build(torch.full((33_000, 1, 2), 0.25), (1, 2))
    out = lattice.filter(values, "after", False)
    torch.testing.assert_close(out, values.mean(2, keepdim=True).expand_as(values))


def test_partly_filled_tiles() -> None:
    # At 17 x 33 most positions of the last tiles hold no point.
    features = torch.rand(2, 2, 17 * 33) * 4
    lattice = build(features, (17, 33))
    ones = lattice.filter(torch.ones(2, 3, 17 * 33), "after", False)
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_worst_case_table_size_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    features, values = torch.rand(2, 3, 400) * 5, torch.randn(2, 6, 400)
    exact = build(features, (20, 20))
    worst = build(features, (20, 20), max_vertices=exact.entries)
    assert worst.view.pair_bound > exact.view.pair_bound
    for normalization in ("symmetric", "before"):
        a = exact.filter(values, normalization, False)
        assert torch.equal(worst.filter(values, normalization, False), a)


def test_max_vertices_equal_to_the_count() -> None:
    features = torch.rand(1, 3, 400) * 5
    found = build(features, (20, 20)).num_vertices()[0]
    assert build(features, (20, 20), max_vertices=found).num_vertices() == [found]
    with raised_by_check("max_vertices"):
        build(features, (20, 20), max_vertices=found - 1)


@pytest.mark.parametrize(
    ("fault", "told"),
    [("bound", "max_vertices"), ("nan", "features .*finite"), ("huge", "features .*too large")],
)
def test_invalid_points_give_nan_and_leave_the_rest(fault: str, told: str) -> None:
    torch.manual_seed(0)
    features, values = torch.rand(1, 2, 400) * 5, torch.randn(1, 3, 400)
    features[0, 1, 7] = {"nan": float("nan"), "huge": 3e7}.get(fault, 0.0)
    with raised_by_check(told):
        lattice = build(features, (20, 20), max_vertices=20 if fault == "bound" else 1200)
    out = lattice.filter(values, "none", False)
    missing = out.isnan().any(dim=1)[0]
    if fault == "bound":
        assert 0 < int(missing.sum()) < 400
    else:
        assert missing.nonzero().flatten().tolist() == [7]
        kept = ~missing
        alone = build(features[:, :, kept], (399,)).filter(values[:, :, kept], "none", False)
        torch.testing.assert_close(out[:, :, kept], alone)
