"""The steps of the CUDA build and splat, emulated on the CPU, against the CPU's own build.

The functors are those that the GPU runs; scans, sorts and the work of a block of threads are plain
loops (csrc/permutohedral/lattice_emulated.cpp).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from segkernels import _status
from segkernels.ops.dense_crf import Config
from segkernels.ops.dense_crf import native as crf
from segkernels.ops.permutohedral import native
from segkernels.ops.permutohedral.native import Lattice


@pytest.fixture
def emulated() -> Iterator[None]:
    native.emulate_cuda = True
    yield
    native.emulate_cuda = False


def build(features: torch.Tensor, spatial: tuple[int, ...], **options: int) -> Lattice:
    (lattice,) = native.build([features], spatial, **options)
    return lattice


def both(
    features: torch.Tensor, spatial: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> tuple[Lattice, Lattice]:
    own = build(features, spatial)
    monkeypatch.setattr(native, "emulate_cuda", True)
    return own, build(features, spatial)


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


def test_tiles_fit_narrow_images(emulated: None) -> None:
    for size, least in (((500, 1), 512), ((1, 500), 512), ((150, 3), 3 * 256), ((16, 16), 256)):
        grid = native.make_grid(torch.device("cpu"), 1, size, 5)
        assert grid.positions == least, size


def test_too_many_tiles_for_one_call(emulated: None) -> None:
    features = torch.empty(2**22, 1, 1)
    message = r"must be below 2\*\*31 .* got 1073741824 \* 2 for 4194304"
    with pytest.raises(ValueError, match=message):
        build(features, (1, 1))


@pytest.mark.parametrize(("batch", "spatial"), SHAPES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_lattice_and_same_results(
    dims: int,
    batch: int,
    spatial: tuple[int, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(dims)
    points = math.prod(spatial)
    features = 6 * torch.rand(batch, dims, points, dtype=dtype)
    values = torch.randn(batch, 5, points, dtype=dtype)
    own, other = both(features, spatial, monkeypatch)
    assert own.num_vertices() == other.num_vertices()
    assert other.grid.tile_points == 256
    tolerance = 2e-5 if dtype == torch.float32 else 1e-13
    for normalization, transpose in [("symmetric", True), ("after", False), ("none", False)]:
        results = []
        for lattice, emulate in ((own, False), (other, True)):
            native.emulate_cuda = emulate
            results.append(lattice.filter(values, normalization, transpose))
        torch.testing.assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)
    config = Config("unary", ("after",), 3, False, spatial)
    terms = [features, torch.tensor(2.0, dtype=dtype)]
    native.emulate_cuda = False
    expected = crf.mean_field(values, terms, config._replace(lattices=(own,)))
    native.emulate_cuda = True
    got = crf.mean_field(values, terms, config._replace(lattices=(other,)))
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_more_images_than_16_bits_count(emulated: None) -> None:
    # Two points in one place share their vertices, in the last images as in the first.
    values = torch.randn(33_000, 1, 2)
    lattice = build(torch.full((33_000, 1, 2), 0.25), (1, 2))
    out = lattice.filter(values, "after", False)
    torch.testing.assert_close(out, values.mean(2, keepdim=True).expand_as(values))


def test_points_in_no_tile_order_are_all_found(emulated: None) -> None:
    # 17 x 33 leaves most of the last tiles' positions without a point.
    features = torch.rand(2, 2, 17 * 33) * 4
    lattice = build(features, (17, 33))
    ones = lattice.filter(torch.ones(2, 3, 17 * 33), "after", False)
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_worst_case_sizes_give_the_same_bits(emulated: None) -> None:
    torch.manual_seed(0)
    features, values = torch.rand(2, 3, 400) * 5, torch.randn(2, 6, 400)
    exact = build(features, (20, 20))
    worst = build(features, (20, 20), max_vertices=exact.entries)
    assert worst.view.pair_bound > exact.view.pair_bound
    for normalization in ("symmetric", "before"):
        a = exact.filter(values, normalization, False)
        assert torch.equal(worst.filter(values, normalization, False), a)


def test_a_bound_of_exactly_the_vertices_is_enough(emulated: None) -> None:
    features = torch.rand(1, 3, 400) * 5
    found = build(features, (20, 20)).num_vertices()[0]
    assert build(features, (20, 20), max_vertices=found).num_vertices() == [found]
    with pytest.raises(_status.StatusError, match="max_vertices"):
        build(features, (20, 20), max_vertices=found - 1)


@pytest.mark.parametrize("fault", ["bound", "nan", "huge"])
def test_faulty_points_give_nan_and_the_rest_stays_finite(
    fault: str, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On CUDA the words are read later: nothing raises, the points in question take no part.
    monkeypatch.setattr(_status, "watch", _watch_without_raising)
    torch.manual_seed(0)
    features, values = torch.rand(1, 2, 400) * 5, torch.randn(1, 3, 400)
    features[0, 1, 7] = {"nan": float("nan"), "huge": 3e7}.get(fault, 0.0)
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


@contextmanager
def _watch_without_raising(*_: object) -> Iterator[torch.Tensor]:
    yield torch.zeros(16, dtype=torch.int32)


def test_features_that_are_not_finite_raise(emulated: None) -> None:
    features = torch.rand(1, 2, 400)
    features[0, 1, 7] = float("nan")
    with pytest.raises(_status.StatusError, match="finite"):
        build(features, (20, 20))
