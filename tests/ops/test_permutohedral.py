"""Permutohedral lattice filter: pydensecrf's values, the float64 reference, gradients, keys,
errors, layouts, determinism, compilation and torch.func."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulation import ON_CUDA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lattice_points import (
    EVERY_DIMS,
    assert_near,
    draw_features,
    normal,
    poisoned,
    raised_by_check,
    raises_in_call,
    weights_of,
)
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError

from segkernels import PermutohedralLattice, _native, permutohedral_filter
from segkernels.ops.permutohedral import native, reference
from segkernels.ops.permutohedral.native import MAX_DIMS, NORMALIZATIONS

DATA = Path(__file__).resolve().parent.parent / "data"
DTYPES = (torch.float32, torch.float64)
WAYS = list(product(NORMALIZATIONS, (False, True)))  # (normalization, transpose)
# Relative to the largest magnitude of the result.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
CHANNELS = (1, 2, 4, 5, 21, 33, 150)


def overlapping(dims: int, *spatial: int, batch: int = 2, margin: float = 1e-3) -> torch.Tensor:
    """Features (batch, dims, *spatial) close enough for points to share vertices."""
    return draw_features((batch, dims, *spatial), spread=1.2 / dims**0.5, margin=margin)


def oracle(values: torch.Tensor, features: torch.Tensor) -> dict[tuple[str, bool], torch.Tensor]:
    """The reference for every way of filtering; builds each image's lattice once."""
    lattices = [reference.ReferenceLattice(f.flatten(1).T) for f in features]
    out = {}
    for way in WAYS:
        images = zip(values.flatten(2), lattices, strict=True)
        filtered = [lattice.filter(v.T, *way).T for v, lattice in images]
        out[way] = torch.stack(filtered).view_as(values)
    return out


# --- golden values from pydensecrf ---


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / "permutohedral_pydensecrf.npz") as file:
        return dict(file)


@pytest.mark.parametrize("dims", [1, 2, 3, 4, 5, 6, 8])
def test_agrees_with_pydensecrf(dims, device, golden):
    figures = {
        name.removeprefix(f"d{dims}_"): torch.from_numpy(value)
        for name, value in golden.items()
        if name.startswith(f"d{dims}_") and value.ndim
    }
    lattice = PermutohedralLattice(figures["features"].to(device))
    assert lattice.num_vertices == [int(golden[f"d{dims}_vertices"])]
    values = figures["values"].to(device)
    ones = torch.ones_like(values[:, :1])
    for got, name in (
        (lattice.filter(values, "none"), "filtered"),
        (lattice.filter(values, "none", transpose=True), "filtered_transpose"),
        (lattice.filter(ones, "none"), "norm"),
    ):
        want = figures[name]
        error = (got.cpu() - want).abs().amax(dim=1) / want.abs().max()
        assert float((error > 1e-4).float().mean()) <= 0.005, name
        assert float(error.median()) <= 1e-6, name


def test_golden_values_distinguish_the_transpose(golden):
    for dims in (2, 5, 8):
        forward, back = golden[f"d{dims}_filtered"], golden[f"d{dims}_filtered_transpose"]
        assert np.abs(forward - back).max() > 0.005 * np.abs(forward).max()


# --- the float64 reference ---


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_DIMS
def test_agrees_with_reference(dims, dtype, device):
    features, values = overlapping(dims, 5, 7), normal(2, 3, 5, 7, dtype=dtype)
    lattice = PermutohedralLattice(features.to(device, dtype))
    for way, want in oracle(values.double(), features).items():
        got = lattice.filter(values.to(device), *way)
        assert got.dtype == dtype
        assert got.device.type == device.type
        assert_near(got, want, TOLERANCE[dtype])
        once = permutohedral_filter(values.to(device), features.to(device, dtype), *way)
        assert torch.equal(once, got)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dims=st.integers(1, MAX_DIMS),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    spatial=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    way=st.sampled_from(WAYS),
    # 0: all points coincide, so all comparisons are ties.
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_any_call_agrees_with_reference(dims, batch, channels, spatial, way, spread, seed, device):
    generator = torch.Generator().manual_seed(seed)
    features, values = (
        torch.randn(batch, n, *spatial, generator=generator, dtype=torch.float64)
        for n in (dims, channels)
    )
    features *= spread
    want = reference.permutohedral_filter(values, features, *way)
    assert_near(permutohedral_filter(values.to(device), features.to(device), *way), want, 1e-12)


def test_pixels_on_a_grid(device):
    # Integer coordinates from 0, as in an image, give exact ties where one is 0.
    y, x = torch.meshgrid(torch.arange(37.0), torch.arange(53.0), indexing="ij")
    features = torch.stack([x / 3, y / 3])[None]
    values = normal(1, 2, 37, 53, dtype=torch.float32)
    want = reference.permutohedral_filter(values.double(), features.double())
    error = (permutohedral_filter(values.to(device), features.to(device)).cpu() - want).abs()
    assert float((error > 1e-5).double().mean()) <= 0.005


@pytest.mark.parametrize(
    "spatial",
    [
        *((1, 20011), (131, 137)),
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ((20011,), (20011, 1), (64, 300), (3, 67, 101))
        ),
    ],
)
def test_images_of_several_tiles(spatial, device):
    points = torch.Size(spatial).numel()
    features = torch.rand(2, 3, points, dtype=torch.float64) * 6
    # Neighbouring points are similar, as in a photograph.
    features += torch.linspace(0, 40, points, dtype=torch.float64)
    features = features.view(2, 3, *spatial)
    values, weight = normal(2, 2, *spatial), normal(2, 2, *spatial)
    want_in = [values.clone().requires_grad_(), features.clone().requires_grad_()]
    want = reference.permutohedral_filter(*want_in, "symmetric")
    got_in = [values.to(device).requires_grad_(), features.to(device).requires_grad_()]
    got = permutohedral_filter(*got_in, "symmetric")
    assert_near(got, want, 1e-12)
    grads = zip(
        torch.autograd.grad(got, got_in, weight.to(device)),
        torch.autograd.grad(want, want_in, weight),
        strict=True,
    )
    for g, w in grads:
        assert_near(g, w, 1e-11)


def test_more_channels_than_16_bits():
    features, values = draw_features((1, 2, 3)), normal(1, 33_000, 3)
    got = permutohedral_filter(values, features)
    for some in (slice(0, 3), slice(-3, None)):
        assert_near(got[:, some], reference.permutohedral_filter(values[:, some], features), 1e-12)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_channels(channels, dtype, device):
    features, values = draw_features((2, 5, 6, 5)), normal(2, channels, 6, 5, dtype=dtype)
    want = reference.permutohedral_filter(values.double(), features, "symmetric")
    got = permutohedral_filter(values.to(device), features.to(device, dtype), "symmetric")
    assert_near(got, want, TOLERANCE[dtype])


def test_default_is_a_weighted_average(device):
    features = draw_features((1, 3, 40), spread=2).to(device)
    values = normal(1, 2, 40).to(device)
    filtered = permutohedral_filter(values, features)
    assert torch.equal(filtered, permutohedral_filter(values, features, "after", False))
    assert torch.equal(filtered, PermutohedralLattice(features).filter(values))
    ones = torch.ones_like(values)
    assert_near(permutohedral_filter(ones, features), ones, 1e-14)
    assert bool((filtered.amax(2) < values.amax(2)).all())


# --- the operator as a matrix: transposes and normalisations ---


@pytest.mark.parametrize("dims", [1, 2, 3, 5, 8, 16])
def test_transposes_and_normalisations_as_matrices(dims, device):
    count = 50
    lattice = PermutohedralLattice(overlapping(dims, count, batch=1).to(device))
    eye = torch.eye(count, dtype=torch.float64, device=device)[None]

    def matrix(normalization, transpose=False):
        # Channel c holds the c-th unit vector, so the output is column c of the operator.
        return lattice.filter(eye, normalization, transpose)[0].T

    kernel = matrix("none")
    norm = kernel.sum(dim=1)
    root = norm.rsqrt().diag()
    expected = {
        "none": kernel,
        "before": kernel @ norm.reciprocal().diag(),
        "after": norm.reciprocal().diag() @ kernel,
        "symmetric": root @ kernel @ root,
    }
    for normalization, want in expected.items():
        assert_near(matrix(normalization), want, 1e-13)
        assert_near(matrix(normalization, transpose=True), want.T, 1e-13)
    # The operator is symmetric only in one dimension.
    asymmetry = float((kernel - kernel.T).abs().max() / kernel.abs().max())
    assert asymmetry < 1e-13 if dims == 1 else asymmetry > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_transpose_is_the_adjoint(way, device):
    normalization, transpose = way
    features = draw_features((2, 5, 9, 8)).to(device)
    v, w = normal(2, 3, 9, 8).to(device), normal(2, 3, 9, 8).to(device)
    left = (permutohedral_filter(v, features, normalization, transpose) * w).sum()
    right = (v * permutohedral_filter(w, features, normalization, not transpose)).sum()
    assert float((left - right).abs()) <= 1e-13 * float(left.abs() + v.abs().sum())


# --- gradients ---


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dims", [1, 2, 5])
def test_gradcheck(dims, way, device):
    features = overlapping(dims, 2, 3, margin=1e-2).to(device).requires_grad_()
    values = normal(2, 2, 2, 3).to(device).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, f: permutohedral_filter(v, f, *way), (values, features), atol=1e-7
    )


def test_gradcheck_detects_a_wrong_transpose():
    # Other implementations use the filter itself in place of its transpose.
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, features):
            ctx.save_for_backward(features)
            return permutohedral_filter(values, features)

        @staticmethod
        def backward(ctx, grad):
            return permutohedral_filter(grad, *ctx.saved_tensors), None

    values, features = normal(1, 1, 8).requires_grad_(), overlapping(3, 8, batch=1)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(Wrong.apply, (values, features))


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_DIMS
def test_gradients_agree_with_reference(dims, dtype, device):
    features, values = overlapping(dims, 4, 5), normal(2, 3, 4, 5, dtype=dtype)
    weight = normal(2, 3, 4, 5)
    want_in = [values.double().requires_grad_(), features.clone().requires_grad_()]
    got_in = [values.to(device).requires_grad_(), features.to(device, dtype).requires_grad_()]
    lattice = PermutohedralLattice(got_in[1])
    for way, out in oracle(*want_in).items():
        want = torch.autograd.grad((out * weight).sum(), want_in, retain_graph=True)
        filtered = lattice.filter(got_in[0], *way)
        got = torch.autograd.grad((filtered * weight.to(filtered)).sum(), got_in)
        for g, w in zip(got, want, strict=True):
            assert float(w.abs().max()) > 1e-3
            assert g.dtype == dtype
            assert_near(g, w, 30 * TOLERANCE[dtype])


def test_gradient_of_features_in_rows(device):
    features, values = draw_features((1, 3, 30)), normal(1, 4, 30)
    weight = normal(1, 4, 30).to(device)
    whole = [values.to(device).requires_grad_(), features.to(device).requires_grad_()]
    rows = [t[0].T.contiguous().to(device).requires_grad_() for t in (values, features)]
    want = torch.autograd.grad((permutohedral_filter(*whole) * weight).sum(), whole)
    got = torch.autograd.grad((permutohedral_filter(*rows) * weight[0].T).sum(), rows)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.T, w[0])


@pytest.mark.parametrize("needed", ["values", "features"])
def test_gradient_with_respect_to_one_input(needed, device):
    features, values = draw_features((1, 3, 30)).to(device), normal(1, 4, 30).to(device)
    both = [values.clone().requires_grad_(), features.clone().requires_grad_()]
    permutohedral_filter(*both).square().sum().backward()
    alone = [values.requires_grad_(needed == "values"), features]
    alone[1].requires_grad_(needed == "features")
    permutohedral_filter(*alone).square().sum().backward()
    for tensor, known in zip(alone, both, strict=True):
        if tensor.requires_grad:
            assert torch.equal(tensor.grad, known.grad)
        else:
            assert tensor.grad is None


def test_gradients_of_two_calls_on_one_lattice(device):
    features = draw_features((1, 4, 25)).to(device).requires_grad_()
    values = normal(1, 2, 25).to(device).requires_grad_()
    lattice = PermutohedralLattice(features)
    twice = lattice.filter(lattice.filter(values, "symmetric"), "after", True)
    got = torch.autograd.grad(twice.square().sum(), (values, features))
    want_in = [t.detach().cpu().requires_grad_() for t in (values, features)]
    inner = reference.permutohedral_filter(*want_in, "symmetric")
    outer = reference.permutohedral_filter(inner, want_in[1], "after", True)
    for g, w in zip(got, torch.autograd.grad(outer.square().sum(), want_in), strict=True):
        assert_near(g, w, 1e-12)


@pytest.mark.parametrize("changed", [0, 1])
def test_in_place_change_before_backward_raises(changed, device):
    inputs = [normal(1, 2, 20).to(device), draw_features((1, 3, 20)).to(device)]
    inputs = [t.requires_grad_() for t in inputs]
    out = permutohedral_filter(*inputs)
    with torch.no_grad():
        inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


@pytest.mark.parametrize("form", ["function", "lattice"])
def test_second_derivative_raises(form, device):
    features = draw_features((1, 2, 12)).to(device).requires_grad_()
    values = normal(1, 1, 12).to(device).requires_grad_()
    if form == "function":
        out = permutohedral_filter(values, features)
    else:
        out = PermutohedralLattice(features).filter(values)
    (grad,) = torch.autograd.grad(out.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


# --- exact keys ---


def unelevate(shift: torch.Tensor) -> torch.Tensor:
    """The float64 features that `elevate` maps to `shift` (d + 1,), which sums to 0."""
    dims = shift.shape[0] - 1
    basis = reference.elevate(torch.eye(dims, dtype=torch.float64))
    return torch.linalg.lstsq(basis.T, shift.double().unsqueeze(1)).solution.flatten()


# Up to the largest integers that are exact in the dtype.
FAR = [
    (dims, dtype, bits)
    for dims in (1, 2, 3, 5, 7)
    for dtype, most in ((torch.float32, 2**23), (torch.float64, 2**29))
    for bits in (8, 12, 16, 18, 21, 26)
    if (dims + 1) * 2**bits <= most
]


@pytest.mark.parametrize(("dims", "dtype", "bits"), FAR)
def test_keys_are_distinct_beyond_any_packing(dims, dtype, bits, device):
    step = (dims + 1) * 2**bits
    # Copies of one cluster, shifted so that key coordinates differ by multiples of 2**bits: cut to
    # that many bits, the keys would be equal.
    cluster = draw_features((1, dims, 60), spread=0.3, margin=0.3 / (dims + 1))[0].T
    shifts = [torch.zeros(dims + 1)]
    for axis in range(dims + 1):
        shift = torch.zeros(dims + 1)
        shift[axis] += step
        shift[(axis + 1) % (dims + 1)] -= step
        shifts.append(shift)
    # Round to the dtype before counting vertices. Far from the origin this loses the low digits of
    # the points, and all points of a cluster may coincide.
    moved = [(cluster + unelevate(shift)).to(dtype) for shift in shifts]
    values = torch.arange(1.0, len(shifts) + 1, dtype=dtype).repeat_interleave(60).unsqueeze(1)
    lattice = PermutohedralLattice(torch.cat(moved).to(device))
    alone = [PermutohedralLattice(points.to(device)).num_vertices[0] for points in moved]
    assert lattice.num_vertices == [sum(alone)]
    assert_near(lattice.filter(values.to(device)), values, TOLERANCE[dtype])


def colliding_keys() -> tuple[int, int]:
    """Two coordinates of one-dimensional keys that collide in the hash table: their hashes agree in
    the 32 bits stored in a slot and in the slot bits (`hash_of` in csrc/permutohedral/keys.h)."""
    keys = np.arange(2**20, 2**23, 64, dtype=np.uint64)
    keys = np.concatenate([keys + np.uint64(i) for i in range(0, 64, 2)])
    with np.errstate(over="ignore"):
        h = (np.uint64(0x9E3779B97F4A7C15) ^ keys) * np.uint64(0xD6E8FEB86659FD93)
        h ^= h >> np.uint64(32)
        h *= np.uint64(0xD6E8FEB86659FD93)
        h ^= h >> np.uint64(32)
    seen = h >> np.uint64(28)
    order = np.argsort(seen, kind="stable")
    same = np.flatnonzero(seen[order][1:] == seen[order][:-1])
    assert same.size > 0
    return int(keys[order[same[0]]]), int(keys[order[same[0] + 1]])


def test_keys_with_equal_fingerprints_are_distinct(device):
    # E = (c, -c) with c = f sqrt(2/3) 2 / sqrt(2): the nearest even c is the key of a vertex.
    keys = torch.tensor(colliding_keys(), dtype=torch.float64)
    features = ((keys + 0.25) / (2 / 3**0.5)).unsqueeze(1)
    lattice = PermutohedralLattice(features.to(device))
    assert lattice.num_vertices == [4]
    values = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    assert_near(lattice.filter(values.to(device)), values, 1e-14)


def test_images_of_a_batch_share_no_vertices(device):
    features = draw_features((1, 3, 20)).to(device).expand(3, -1, -1)
    values = torch.arange(1.0, 4.0, dtype=torch.float64).view(3, 1, 1).expand(3, 1, 20).to(device)
    assert_near(permutohedral_filter(values, features), values, 1e-14)


# --- invalid values ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_non_finite_features(bad, dtype, device):
    features = normal(1, 3, 4, 5, dtype=dtype).to(device)
    features[0, 1, 2, 3] = bad
    kept = features.clone()
    values = normal(1, 2, 4, 5).to(device)
    for call in (
        lambda: permutohedral_filter(values, features),
        lambda: PermutohedralLattice(features),
    ):
        where = "NaN or infinity" if _native.on_cuda(device) else rf"{bad} at \[0, 1, 2, 3\]"
        with raises_in_call(f"features must be finite, got {where}"):
            call()
    assert torch.equal(features.nan_to_num(7, 8, 9), kept.nan_to_num(7, 8, 9))


@pytest.mark.parametrize("dims", [1, 2, 5, 16])
def test_coordinates_beyond_exact_integers(dims, device):
    far = torch.zeros(1, dims, 3)
    far[0, dims - 1, 1] = 3e7
    values = torch.ones(1, 1, 3, device=device)
    message = r"lattice coordinates in float32, .* use a larger sigma, or float64 features"
    with raises_in_call(message):
        permutohedral_filter(values, far.to(device))
    # float64 represents them exactly.
    assert_near(permutohedral_filter(values, far.to(device).double()), values, 1e-6)
    with raises_in_call(r"lattice coordinates in float64, .* use a larger sigma$"):
        permutohedral_filter(values, far.to(device).double() * 1e3)
    with raises_in_call("use a larger sigma"):
        PermutohedralLattice((far * 1e30).to(device))


@pytest.mark.parametrize("device", ON_CUDA)
def test_invalid_points_are_ignored_on_cuda(device):
    features, values = draw_features((2, 3, 40)), normal(2, 2, 40)
    kept = torch.ones(40, dtype=torch.bool)
    kept[[3, 17]] = False
    spoilt = features.clone()
    spoilt[0, 1, 3], spoilt[0, 2, 17] = float("nan"), 1e30
    with raised_by_check("features .*NaN or infinity.*too large"):
        got = permutohedral_filter(values.to(device), spoilt.to(device)).cpu()
    assert bool(got[0, :, ~kept].isnan().all())
    alone = reference.permutohedral_filter(values[:1, :, kept], features[:1, :, kept])
    assert_near(got[:1, :, kept], alone, 1e-13)
    whole = reference.permutohedral_filter(values[1:], features[1:])
    assert_near(got[1:], whole, 1e-13)


def test_max_vertices(device):
    features, values = draw_features((2, 4, 9, 9)).to(device), normal(2, 3, 9, 9).to(device)
    free = PermutohedralLattice(features)
    vertices = sum(free.num_vertices)
    for bound in (vertices, vertices + 1, 10**9):
        bounded = PermutohedralLattice(features, max_vertices=bound)
        assert bounded.num_vertices == free.num_vertices
        for way in WAYS:
            assert torch.equal(bounded.filter(values, *way), free.filter(values, *way))
    for bound in (vertices - 1, 1):
        with raises_in_call("max_vertices must be at least the number of lattice vertices"):
            PermutohedralLattice(features, max_vertices=bound)


@pytest.mark.parametrize("bound", [0, -1, 2.5, True, "9"])
def test_invalid_max_vertices(bound):
    with pytest.raises(ValueError, match="max_vertices must be a positive int, got"):
        PermutohedralLattice(normal(5, 2), max_vertices=bound)


def test_non_finite_values_affect_only_their_neighbours_and_channel(device):
    features = draw_features((1, 2, 60), spread=0.5)
    features[:, :, 30:] += 100
    values = normal(1, 6, 60)
    clean = permutohedral_filter(values.to(device), features.to(device)).cpu()
    for bad in (float("nan"), float("inf")):
        spoilt = values.clone()
        spoilt[0, 2, 4] = bad
        got = permutohedral_filter(spoilt.to(device), features.to(device)).cpu()
        assert not bool(got[0, 2, 4].isfinite())
        assert torch.equal(got[:, :, 30:], clean[:, :, 30:])
        others = [0, 1, 3, 4, 5]
        assert torch.equal(got[:, others], clean[:, others])


# --- invalid arguments ---


def bad_calls() -> Iterator[tuple[str, type[Exception], str, tuple]]:
    features, values = torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 4, 5)
    points = torch.zeros(7, 3)
    yield (
        "1-d features",
        ValueError,
        r"features must be \(N, d\) or .* got shape \(7,\)",
        (
            values,
            torch.zeros(7),
        ),
    )
    yield (
        "0-d features",
        ValueError,
        r"features must be .* got shape \(\)",
        (
            values,
            torch.tensor(1.0),
        ),
    )
    for dims in (0, 17):
        yield (
            f"{dims} features",
            ValueError,
            rf"features must have 1 to 16 channels .* got shape \(7, {dims}\)",
            (
                torch.zeros(7, 1),
                torch.zeros(7, dims),
            ),
        )
    match = r"values must match the features \(2, 3, 4, 5\) .* got shape "
    for shape in ((1, 6, 4, 5), (2, 6, 5, 4), (2, 6, 20), (2, 6, 4, 5, 1), (2, 6), ()):
        yield f"values {shape}", ValueError, match, (torch.zeros(shape), features)
    yield (
        "(M, C) values",
        ValueError,
        r"values must match the features \(7, 3\)",
        (torch.zeros(8, 2), points),
    )
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        name = rf"must be one of float16, bfloat16, float32, float64, got {dtype}"
        yield f"{dtype} values", TypeError, f"values {name}", (values.to(dtype), features)
        yield f"{dtype} features", TypeError, f"features {name}", (values, features.to(dtype))
    yield (
        "numpy values",
        TypeError,
        "argument 'values' must be Tensor, not .*ndarray",
        (
            values.numpy(),
            features,
        ),
    )
    yield "a list", TypeError, "argument 'features' must be Tensor, not .*list", (values, [1.0])
    match = "normalization must be one of 'symmetric', 'before', 'after', 'none', got 'mean'"
    yield "normalization", ValueError, match, (values, features, "mean")


@pytest.mark.parametrize(
    ("error", "match", "arguments"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()]
)
def test_invalid_arguments(error, match, arguments):
    with pytest.raises(error, match=rf"^permutohedral_filter(\(\))?: {match}"):
        permutohedral_filter(*arguments)


def test_invalid_arguments_of_a_lattice():
    lattice = PermutohedralLattice(torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"^PermutohedralLattice.filter: values must match"):
        lattice.filter(torch.zeros(2, 3, 5, 4))
    with pytest.raises(ValueError, match="normalization must be one of"):
        lattice.filter(torch.zeros(2, 3, 4, 5), "norm")
    with pytest.raises(TypeError, match=r"^PermutohedralLattice: features must be"):
        PermutohedralLattice(torch.zeros(2, 3, dtype=torch.int32))


def test_lattice_on_meta_device_raises():
    meta = torch.zeros(7, 2, device="meta")
    with pytest.raises(RuntimeError, match="no values to build a lattice"):
        _ = PermutohedralLattice(meta).num_vertices


@pytest.mark.gpu
def test_different_devices_raise():
    with pytest.raises(ValueError, match="values must be on cpu, as the features are, got cuda:0"):
        permutohedral_filter(torch.zeros(7, 2, device="cuda"), torch.zeros(7, 2))


def test_too_many_entries_raise_before_allocation():
    # An expanded view, so no memory of this size is needed.
    huge = torch.zeros(1, 1).expand(2**27, 16)
    with pytest.raises(ValueError, match=r"at most 2\*\*30 .* split the batch"):
        native.build([huge.T.unsqueeze(0)], [2**27])


# --- layouts, dtypes, sizes ---


def layouts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """`tensor` (B, C, H, W) in other layouts."""
    yield tensor.contiguous(memory_format=torch.channels_last)
    yield tensor.transpose(2, 3).contiguous().transpose(2, 3)
    yield tensor.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    wide = torch.full((*tensor.shape[:3], 2 * tensor.shape[3] + 1), float("nan")).to(tensor)
    wide[..., 1::2] = tensor
    yield wide[..., 1::2]
    yield torch.cat([tensor, tensor], dim=1)[:, tensor.shape[1] :]


def test_layouts(device):
    features = draw_features((2, 3, 6, 5)).to(device, torch.float32)
    values = normal(2, 4, 6, 5, dtype=torch.float32).to(device)
    want = permutohedral_filter(values, features, "symmetric")
    assert want.is_contiguous()
    for view in layouts(values):
        kept = view.clone()
        got = permutohedral_filter(view, features, "symmetric")
        assert torch.equal(got, want)
        assert got.stride() == torch.empty_like(view).stride()
        assert torch.equal(view, kept)
    for view in layouts(features):
        assert torch.equal(permutohedral_filter(values, view, "symmetric"), want)
    expanded = values[:, :1].expand(-1, 4, -1, -1)
    assert torch.equal(
        permutohedral_filter(expanded, features), permutohedral_filter(expanded.clone(), features)
    )


def test_gradients_of_layouts(device):
    features = draw_features((2, 3, 6, 5)).to(device).requires_grad_()
    values, weight = normal(2, 4, 6, 5).to(device), normal(2, 4, 6, 5).to(device)
    plain = values.clone().requires_grad_()
    want = torch.autograd.grad(
        (permutohedral_filter(plain, features) * weight).sum(), (plain, features)
    )
    for view, grad in zip(layouts(values), layouts(weight), strict=True):
        leaf = view.detach().requires_grad_()
        out = permutohedral_filter(leaf, features)
        got = torch.autograd.grad(out, (leaf, features), grad)
        # On CUDA, torch's sum over channels in the norm's gradient depends on the layout.
        tolerance = 0 if device.type == "cpu" else 1e-12
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


def test_features_in_rows(device):
    features, values = draw_features((1, 3, 41)).to(device), normal(1, 5, 41).to(device)
    for way in WAYS:
        rows = permutohedral_filter(values[0].T, features[0].T, *way)
        assert torch.equal(rows, permutohedral_filter(values, features, *way)[0].T)
        assert rows.stride() == torch.empty_like(values[0].T).stride()
        contiguous = permutohedral_filter(
            values[0].T.contiguous(), features[0].T.contiguous(), *way
        )
        assert torch.equal(contiguous, rows)
        assert contiguous.is_contiguous()


def test_any_number_of_spatial_dimensions(device):
    features, values = draw_features((2, 3, 24)).to(device), normal(2, 5, 24).to(device)
    want = permutohedral_filter(values, features)
    for spatial in ((4, 6), (2, 3, 4), (1, 24, 1), (2, 2, 2, 3)):
        got = permutohedral_filter(values.view(2, 5, *spatial), features.view(2, 3, *spatial))
        # CUDA adds the points in another order, so the last bits differ.
        assert_near(got, want.view_as(got), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, device):
    features = (draw_features((2, 3, 6, 5)) * 4).to(device, dtype)
    values = normal(2, 4, 6, 5, dtype=dtype).to(device)
    for way in WAYS:
        want = permutohedral_filter(values.float(), features.float(), *way).to(dtype)
        got = permutohedral_filter(values, features, *way)
        assert got.dtype == dtype
        assert torch.equal(got, want)
        assert torch.equal(PermutohedralLattice(features).filter(values, *way), want)
    leaves = [values.requires_grad_(), features.requires_grad_()]
    full = [t.detach().float().requires_grad_() for t in leaves]
    permutohedral_filter(*leaves).sum().backward()
    permutohedral_filter(*full).sum().backward()
    for half, single in zip(leaves, full, strict=True):
        assert torch.equal(half.grad, single.grad.to(dtype))


def copies(lattice: Any) -> list[Any]:
    return [copy.copy(lattice), copy.deepcopy(lattice), pickle.loads(pickle.dumps(lattice))]


@pytest.mark.parametrize("shape", [(2, 3, 9, 11), (40, 5), (0, 3)])
def test_copies_and_pickles_filter_the_same(shape, device):
    features = torch.randn(shape, device=device)
    values = torch.randn(shape, device=device)
    lattice = PermutohedralLattice(features)
    expected = lattice.filter(values)
    for again in copies(lattice):
        assert again.shape == lattice.shape
        assert again.num_vertices == lattice.num_vertices
        assert torch.equal(again.filter(values), expected)
    module = torch.nn.Module()
    module.lattice = PermutohedralLattice(features, max_vertices=10_000)
    expected = module.lattice.filter(values, "symmetric")
    for again in copies(module):
        assert torch.equal(again.lattice.filter(values, "symmetric"), expected)


def test_what_a_copy_cannot_hold_is_refused():
    features = torch.randn(1, 3, 50, requires_grad=True)
    lattice = PermutohedralLattice(features * 2)
    values = torch.randn(1, 2, 50)
    assert torch.equal(copy.copy(lattice).filter(values), lattice.filter(values))
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="features must not require grad in a deep copy or a p"):
            make(lattice)
    features = torch.randn(1, 3, 50)
    lattice = PermutohedralLattice(features)
    expected = lattice.filter(values)
    features.mul_(2)
    assert torch.equal(lattice.filter(values), expected)
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="features must not be modified in place before a deep"):
            make(lattice)
    with torch.inference_mode():
        lattice = PermutohedralLattice(torch.randn(1, 3, 50))
        assert torch.equal(copy.deepcopy(lattice).filter(values), lattice.filter(values))


def test_mixed_dtypes(device):
    features, values = draw_features((1, 3, 30)).to(device), normal(1, 2, 30).to(device)
    want = permutohedral_filter(values, features)
    single = permutohedral_filter(values.float(), features)
    assert single.dtype == torch.float32
    assert torch.equal(single, permutohedral_filter(values.float().double(), features).float())
    assert torch.equal(permutohedral_filter(values, features.float()), want)
    # A lattice computes in the dtype of its features.
    lattice = PermutohedralLattice(features.float())
    assert lattice.filter(values).dtype == torch.float64
    assert torch.equal(lattice.filter(values), lattice.filter(values.float()).double())


@pytest.mark.parametrize(
    ("values", "features"),
    [
        ((0, 3), (0, 2)),
        ((0, 3, 4, 5), (0, 2, 4, 5)),
        ((2, 3, 0, 5), (2, 2, 0, 5)),
        ((2, 3, 4, 0), (2, 2, 4, 0)),
        ((2, 0, 4, 5), (2, 2, 4, 5)),
        ((7, 0), (7, 2)),
    ],
)
def test_empty(values, features, device):
    v = torch.zeros(values, device=device, requires_grad=True)
    f = torch.zeros(features, device=device, requires_grad=True)
    lattice = PermutohedralLattice(f)
    for out in (permutohedral_filter(v, f), lattice.filter(v, "symmetric", True)):
        assert out.shape == v.shape
        assert out.data_ptr() != v.data_ptr() or v.numel() == 0
        out.sum().backward()
        assert v.grad.shape == v.shape
    images = 1 if len(features) == 2 else features[0]
    assert len(lattice.num_vertices) == images
    if 0 in features:
        assert lattice.num_vertices == [0] * images


def test_one_point(device):
    for dims in (1, 2, 16):
        lattice = PermutohedralLattice(draw_features((1, dims, 1)).to(device))
        assert lattice.num_vertices == [dims + 1]
        value = normal(1, 3, 1).to(device)
        assert_near(lattice.filter(value), value, 1e-14)


def test_num_vertices_is_a_list_of_ints(device):
    features = torch.stack([draw_features((1, 2, 50), spread=s)[0] for s in (1e-3, 1, 5)])
    counts = PermutohedralLattice(features.to(device)).num_vertices
    assert isinstance(counts, list)
    assert all(type(count) is int for count in counts)
    assert counts == [len(reference.ReferenceLattice(f.T).vertices) for f in features]
    assert counts[0] < counts[1] < counts[2]


def test_batch_equals_single_images_bitwise(device):
    for spatial in ((19, 23), (70, 130)):
        features = draw_features((3, 5, *spatial)).to(device, torch.float32)
        values = normal(3, 7, *spatial, dtype=torch.float32).to(device)
        for way in WAYS:
            whole = permutohedral_filter(values, features, *way)
            for b in range(3):
                alone = permutohedral_filter(values[b : b + 1], features[b : b + 1], *way)
                assert torch.equal(whole[b : b + 1], alone)


# --- determinism, uninitialised memory ---


def outputs_and_gradients(
    values: torch.Tensor, features: torch.Tensor, ways: Sequence[tuple[str, bool]] = WAYS
) -> list[torch.Tensor]:
    """Filtered values and gradients for each way."""
    leaves = [values.detach().requires_grad_(), features.detach().requires_grad_()]
    found = []
    for way in ways:
        out = permutohedral_filter(*leaves, *way)
        found += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    return found


@pytest.mark.parametrize("channels", [1, 5])
def test_same_bits_for_any_number_of_threads(channels):
    # Several tiles per image, so that there is work for several threads.
    values = normal(2, channels, 80, 110, dtype=torch.float32)
    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(110.0), indexing="ij")
    place = torch.stack([x / 20, y / 20]).expand(2, -1, -1, -1)
    features = torch.cat([place, torch.randn(2, 2, 80, 110)], dim=1)
    assert_same_on_threads(values, features)


@pytest.mark.parametrize("dims", [1, 5, 16])
def test_same_bits_for_any_number_of_threads_with_few_points(dims):
    assert_same_on_threads(normal(2, 3, 7, 9), overlapping(dims, 7, 9))


def assert_same_on_threads(values: torch.Tensor, features: torch.Tensor) -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(
            outputs_and_gradients(values, features, [("symmetric", False), ("after", True)])
        )
    assert all(bool(t.isfinite().all()) for t in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_same_bits_twice(device):
    values = normal(2, 5, 60, 70, dtype=torch.float32).to(device)
    features = draw_features((2, 5, 60, 70)).to(device, torch.float32)
    for a, b in zip(
        outputs_and_gradients(values, features),
        outputs_and_gradients(values, features),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("channels", [1, 3, 8, 33])
def test_every_element_is_written(channels, device, monkeypatch):
    values = normal(2, channels, 13, 11).to(device)
    features = draw_features((2, 5, 13, 11)).to(device)
    want = outputs_and_gradients(values, features)
    with poisoned(monkeypatch):
        got = outputs_and_gradients(values, features)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_poisoned(monkeypatch):
    with poisoned(monkeypatch):
        assert bool(torch.empty(3).isnan().all())
        assert bool(torch.zeros(3).new_empty(2).isnan().all())
        assert bool(torch.empty_like(torch.zeros(3)).isnan().all())
    assert weights_of(torch.zeros(1, 2)).shape == (1, 3)


def test_calls_on_a_lattice_are_independent(device):
    features, values = draw_features((1, 4, 80)).to(device), normal(1, 2, 80).to(device)
    lattice = PermutohedralLattice(features)
    first = [lattice.filter(values, *way) for way in WAYS]
    again = [lattice.filter(values, *way) for way in reversed(WAYS)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


# --- compilation, export, autocast, torch.func ---


@pytest.mark.parametrize("way", [("after", False), ("symmetric", True), ("none", False)])
@pytest.mark.parametrize("shape", [(2, 6, 5), (40,)])
def test_opcheck(way, shape, device):
    images = 2 if len(shape) == 3 else 1
    points = torch.Size(shape).numel() // images
    spatial = list(shape[1:]) if images == 2 else list(shape)
    values = normal(images, 3, points).to(device)
    features = draw_features((images, 2, points)).to(device)
    op = torch.ops.segkernels.permutohedral_filter.default
    backward = torch.ops.segkernels.permutohedral_filter_backward.default
    for grad in (False, True):
        leaves = [t.detach().requires_grad_(grad) for t in (values, features)]
        torch.library.opcheck(op, (*leaves, *way, spatial))
    grad = normal(*values.shape).to(device)
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (grad, values, features, *wanted, *way, spatial))


def assert_compiled_agrees(backend: str, device: torch.device, dynamic: bool | None) -> None:
    def call(values, features):
        return permutohedral_filter(values, features, "symmetric").sin()

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in ((2, 6, 5), (1, 4, 7)):
        values, features = normal(shape[0], 3, *shape[1:]), draw_features((shape[0], 2, *shape[1:]))
        results = []
        for f in (call, compiled):
            leaves = [t.detach().to(device).requires_grad_() for t in (values, features)]
            out = f(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            assert a.stride() == b.stride()
            assert_near(b, a, 1e-13)


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_compiles_to_one_graph(dynamic, device):
    torch.compiler.reset()
    assert_compiled_agrees("aot_eager", device, dynamic)


@pytest.mark.compiles
@pytest.mark.slow
def test_compiles_with_inductor(device):
    torch.compiler.reset()
    assert_compiled_agrees("inductor", device, None)


def test_compiled_call_without_gradients(device):
    torch.compiler.reset()
    values, features = normal(30, 3).to(device), draw_features((30, 2)).to(device)
    compiled = torch.compile(permutohedral_filter, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values, features), permutohedral_filter(values, features))


def test_compiled_output_has_the_layout_of_values(device):
    torch.compiler.reset()
    values = normal(2, 4, 6, 5).to(device, memory_format=torch.channels_last)
    features = draw_features((2, 3, 6, 5)).to(device)
    compiled = torch.compile(permutohedral_filter, fullgraph=True, backend="aot_eager")
    out = compiled(values, features)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, permutohedral_filter(values, features))


def test_exports(device):
    class Blur(torch.nn.Module):
        def forward(self, values, features):
            return permutohedral_filter(values, features, "after")

    arguments = (normal(2, 3, 6, 5).to(device), draw_features((2, 2, 6, 5)).to(device))
    program = torch.export.export(Blur(), arguments)
    assert "permutohedral_filter" in str(program.graph)
    assert torch.equal(program.module()(*arguments), Blur()(*arguments))


def test_autocast_has_no_effect(device):
    values, features = (
        normal(1, 2, 20).float().to(device),
        draw_features((1, 3, 20)).float().to(device),
    )
    want = permutohedral_filter(values, features)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = permutohedral_filter(values, features)
    assert torch.equal(got, want)


def filter_calls(features):
    """The function and the lattice's method, as functions of the values."""
    lattice = PermutohedralLattice(features)
    return (
        lambda v: permutohedral_filter(v, features, "symmetric", True),
        lambda v: lattice.filter(v, "symmetric", True),
    )


def test_forward_mode_with_respect_to_values(device):
    features, values, tangent = (
        draw_features((2, 3, 6, 5)).to(device),
        *(normal(2, 4, 6, 5).to(device) for _ in range(2)),
    )
    for call in filter_calls(features):
        out, found = torch.func.jvp(call, (values,), (tangent,))
        assert torch.equal(out, call(values))
        assert torch.equal(found, call(tangent))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(call(forward_ad.make_dual(values, tangent)))
        assert torch.equal(dual.tangent, found)
    for call in (permutohedral_filter, lambda v, f: permutohedral_filter(values, f)):
        tangents = tangent, torch.ones_like(features)
        with pytest.raises(NotImplementedError, match=r"permutohedral_filter.*respect to features"):
            torch.func.jvp(call, (values, features), tangents)


def test_functional_gradients(device):
    features, values = draw_features((2, 3, 6, 5)).to(device), normal(2, 4, 6, 5).to(device)

    def loss(v, f):
        return permutohedral_filter(v, f, "before").square().sum()

    leaves = [t.clone().requires_grad_() for t in (values, features)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, (0, 1))(values, features)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    one_by_one = torch.func.vmap(torch.func.grad(loss, (0, 1)))(
        values.unsqueeze(1), features.unsqueeze(1)
    )
    for a, b in zip(one_by_one, expected, strict=True):
        torch.testing.assert_close(a.squeeze(1), b)


def test_vmap(device):
    features, values = draw_features((3, 2, 3, 6, 5)).to(device), normal(3, 2, 4, 6, 5).to(device)
    found = torch.func.vmap(permutohedral_filter)(values, features)
    for i in range(3):
        torch.testing.assert_close(found[i], permutohedral_filter(values[i], features[i]))
    inner = torch.func.vmap(lambda v, f: PermutohedralLattice(f).filter(v))(values, features)
    torch.testing.assert_close(inner, found)
    for half in (torch.bfloat16, torch.float32):  # only the features are batched
        first = values[0].to(half)
        found = torch.func.vmap(lambda f, v=first: permutohedral_filter(v, f))(features)
        assert found.dtype == half
        expected = permutohedral_filter(first, features[2])
        torch.testing.assert_close(found[2], expected)
    for call in filter_calls(features[0]):
        found = torch.func.vmap(call, 4, 1)(values.movedim(0, 4))
        for i in range(3):
            torch.testing.assert_close(found[:, i], call(values[i]))


def test_negated_views(device):
    """Views with torch's negative bit set, such as torch.complex(a, b).conj().imag."""
    features, values = draw_features((2, 3, 6, 5)).to(device), normal(2, 4, 6, 5).to(device)
    turned = torch._neg_view(-features), torch._neg_view(-values)
    expected = permutohedral_filter(values, features)
    for f in (features, turned[0]):
        for v in (values, turned[1]):
            assert torch.equal(permutohedral_filter(v, f), expected)
            assert torch.equal(PermutohedralLattice(f).filter(v), expected)
    leaves = [t.clone().requires_grad_() for t in (values, features)]
    expected = torch.autograd.grad(permutohedral_filter(*leaves).square().sum(), leaves)
    out = permutohedral_filter(*(torch._neg_view(-t) for t in leaves))
    found = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(a.resolve_neg(), b) for a, b in zip(found, expected, strict=True))


def test_meta_tensors_and_jit_trace():
    values, features = (
        torch.empty(2, 4, 6, 5, device="meta"),
        torch.empty(2, 3, 6, 5, device="meta"),
    )
    assert permutohedral_filter(values, features).shape == values.shape
    assert PermutohedralLattice(features).filter(values).shape == values.shape
    with pytest.raises(NotImplementedError, match=r"permutohedral_filter.*torch\.export"):
        torch.jit.trace(permutohedral_filter, (normal(2, 4, 6, 5), normal(2, 3, 6, 5)))
