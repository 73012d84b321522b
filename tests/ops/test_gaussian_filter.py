"""Exact Gaussian filter: brute force in float64, gradients, culling, extreme features, errors.

test_gaussian_filter_triton.py tests the Triton kernels separately.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from emulation import interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lattice_points import assert_near, normal, raised_by_check, raises_in_call
from ops import suite
from ops.suite import Error, Float, Sample, message

from segkernels import gaussian_filter, permutohedral_filter
from segkernels.ops.gaussian_filter import blocked, native, points, reference
from segkernels.ops.gaussian_filter import plan as plans
from segkernels.ops.gaussian_filter.points import TILE, Points
from segkernels.ops.permutohedral.native import NORMALIZATIONS

DTYPES = (torch.float32, torch.float64)
# Relative to the largest magnitude of the result; CUDA runs with precision="high" (float32).
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def high(values: torch.Tensor, features: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return gaussian_filter(values, features, precision="high", **kwargs)


def _spread(*shape: int) -> suite.Make:
    return lambda g: 1.5 * torch.randn(shape, generator=g, dtype=torch.float64)


VALUES, FEATURES = Float(2, 3, 4, 5), Float(2, 2, 4, 5, make=_spread(2, 2, 4, 5))


@pytest.fixture(params=interpreter.DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, CUDA and Triton's interpreter: the CUDA code of this operator is Triton's."""
    return torch.device(request.param)


class TestGaussianFilter(suite.OpSuite):
    function = staticmethod(high)
    reference = staticmethod(reference.gaussian_filter)
    traces = False
    samples: ClassVar[list[Sample]] = [
        Sample("image", (VALUES, FEATURES), grad=True, compile=True),
        Sample(
            "queries",
            (VALUES, FEATURES),
            {"query_features": Float(2, 2, 7), "normalization": "symmetric"},
            grad=True,
            compile=True,
        ),
        Sample(
            "line",
            (Float(2, 1, 70), Float(2, 5, 70, make=_spread(2, 5, 70))),
            {"normalization": "before"},
        ),
        Sample("one point", (Float(1, 2, 1, 1), Float(1, 16, 1, 1)), {"normalization": "none"}),
    ]
    forward_mode = False
    not_differentiable: ClassVar[tuple[str, ...]] = ("gaussian_filter_backward",)
    same_sums_on_cuda = False  # because of torch's sums in the normalisation
    tolerance: ClassVar[dict[torch.dtype, tuple[float, float] | None]] = {
        torch.float16: (1e-3, 1e-4),
        torch.bfloat16: (8e-3, 1e-3),
        torch.float32: (1e-5, 2e-6),
        torch.float64: (1e-11, 1e-12),
    }
    errors: ClassVar[list[Error]] = [
        Error(
            "normalization",
            lambda d: high(*_pair(d), normalization="mean"),
            ValueError,
            message("normalization", "symmetric", "'mean'"),
        ),
        Error(
            "precision",
            lambda d: gaussian_filter(*_pair(d), precision="low"),  # type: ignore[arg-type]
            ValueError,
            message("precision", "'default', 'high'", "'low'"),
        ),
        Error(
            "too many features",
            lambda d: high(_zeros(d, 1, 1, 4), _zeros(d, 1, 17, 4)),
            ValueError,
            message("features", "1 to 16", "(1, 17, 4)"),
        ),
        Error(
            "shapes",
            lambda d: high(_zeros(d, 1, 1, 4), _zeros(d, 1, 2, 5)),
            ValueError,
            message("values must match", "(1, 2, 5)", "(1, 1, 4)"),
        ),
        Error(
            "queries",
            lambda d: high(*_pair(d), query_features=_zeros(d, 1, 3, 4)),
            ValueError,
            message("query_features", "(B, d, *spatial)", "(1, 2, 4)", "(1, 3, 4)"),
        ),
        Error(
            "queries of another kind",
            lambda d: high(*_pair(d), query_features=_zeros(d, 4, 2)),
            ValueError,
            message("query_features", "(4, 2)"),
        ),
        Error(
            "rank",
            lambda d: high(_zeros(d, 4), _zeros(d, 4)),
            ValueError,
            message("values", "(N, n)", "(4,)"),
        ),
        Error(
            "integers",
            lambda d: high(_zeros(d, 1, 1, 4).int(), _zeros(d, 1, 1, 4)),
            TypeError,
            message("values", "float16", "int32"),
        ),
        Error(
            "no tensor",
            lambda d: high([1.0], _zeros(d, 1, 1)),  # type: ignore[arg-type]
            TypeError,
            message("argument 'values' must be Tensor", "list"),
        ),
    ]

    @classmethod
    def devices(cls, check: str) -> list[Any]:
        # These test the operators' definitions, the same for the interpreter, which is slow here.
        calls = check in ("test_opcheck", "test_compile", "test_compile_with_inductor")
        return interpreter.DEVICES[:-1] if calls else interpreter.DEVICES

    def test_nan_propagation(self, sample: Sample, device: str) -> None:
        call = suite.build(sample, torch.float32, device)
        values, features = call.args
        for bad, place in product((float("nan"), float("inf")), (0, values.numel() - 1)):
            before = values.view(-1)[place].item()
            values.view(-1)[place] = bad
            (mine,), (theirs,) = call.run(high), call.run(reference.gaussian_filter)
            assert torch.equal(mine.isfinite(), theirs.isfinite())
            values.view(-1)[place] = before
        features.view(-1)[0] = float("nan")
        with raises_in_call(message("gaussian_filter", "features", "finite")):
            call.run(high)


def _zeros(device: str, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, device=device)


def _pair(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _zeros(device, 1, 1, 4), _zeros(device, 1, 2, 4)


# --- brute force in float64 ---


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", range(1, 17))
def test_agrees_with_brute_force(dims, dtype, device):
    count, normalizations = 3 * TILE + 5, NORMALIZATIONS
    if interpreter.on():
        count, normalizations = TILE + 5, (NORMALIZATIONS[dims % 4],)
    features = normal(1, dims, count, dtype=dtype) * (2.5 / dims**0.5)
    values, weight = (normal(1, 3, count, dtype=dtype) for _ in range(2))
    for normalization in normalizations:
        mine = [t.to(device).requires_grad_() for t in (values, features)]
        theirs = [t.double().requires_grad_() for t in (values, features)]
        got = high(*mine, normalization=normalization)
        want = reference.gaussian_filter(*theirs, normalization=normalization)
        assert got.dtype == dtype
        assert_near(got, want, TOLERANCE[dtype])
        found = torch.autograd.grad(got, mine, weight.to(device))
        expected = torch.autograd.grad(want, theirs, weight.double())
        for g, w in zip(found, expected, strict=True):
            assert_near(g, w, 5 * TOLERANCE[dtype])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dims=st.integers(1, 16),
    batch=st.integers(1, 3),
    channels=st.integers(1, 5),
    count=st.integers(1, 300),
    queries=st.none() | st.integers(1, 300),
    normalization=st.sampled_from(NORMALIZATIONS),
    # 0: all weights are 1. 1e4: all weights between different points are 0.
    spread=st.sampled_from([0.0, 0.1, 3.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_any_call_agrees_with_brute_force(
    dims, batch, channels, count, queries, normalization, spread, seed, device
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    features, values = spread * random(batch, dims, count), random(batch, channels, count)
    at = None if queries is None else spread * random(batch, dims, queries)
    if at is not None:  # some queries coincide with points
        at[:, :, ::2] = features[:, :, torch.arange(at[:, :, ::2].shape[2]) % count]
    kwargs = {"query_features": at, "normalization": normalization}
    want = reference.gaussian_filter(values, features, **kwargs)
    kwargs["query_features"] = None if at is None else at.to(device)
    got = high(values.to(device), features.to(device), **kwargs)
    assert_near(got, want, 1e-12)


@pytest.mark.parametrize("channels", [1, 2, 21, 150])
def test_any_number_of_channels(channels, device):
    features, values = normal(2, 5, 9, 13, dtype=torch.float32), normal(2, channels, 9, 13)
    want = reference.gaussian_filter(values, features.double(), normalization="symmetric")
    got = high(values.float().to(device), features.to(device), normalization="symmetric")
    assert_near(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("count", [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 4 * TILE + 1])
def test_any_number_of_points(count, device):
    features, values = 2 * normal(1, 3, count), normal(1, 2, count)
    assert_near(
        high(values.to(device), features.to(device)),
        reference.gaussian_filter(values, features),
        1e-13,
    )


def test_defaults(device):
    features, values = normal(1, 3, 40).to(device), normal(1, 2, 40).to(device)
    filtered = gaussian_filter(values, features)
    want = gaussian_filter(values, features, normalization="after", precision="default")
    assert torch.equal(filtered, want)
    ones = torch.ones_like(values)
    assert_near(gaussian_filter(ones, features), ones, 1e-14)


def test_points_and_images_agree(device):
    features, values = normal(2, 3, 6, 7).to(device), normal(2, 4, 6, 7).to(device)
    image = high(values, features)
    for b in range(2):
        alone = high(values[b].flatten(1).T, features[b].flatten(1).T)
        assert_near(alone.T.reshape(4, 6, 7), image[b], 1e-14)
    at = high(values, features, query_features=features[:, :, :3, :2])
    assert at.shape == (2, 4, 3, 2)
    assert_near(at, image[:, :, :3, :2], 1e-13)


def test_lattice_approximates_the_exact_filter():
    features, values = normal(1, 2, 2000), torch.rand(1, 3, 2000, dtype=torch.float64)
    exact, lattice = high(values, features), permutohedral_filter(values, features)
    apart = float((exact - lattice).norm() / exact.norm())
    assert 1e-4 < apart < 0.05


def test_half_precision_values_keep_their_dtype(device):
    features, values = normal(1, 2, 50, dtype=torch.float32).to(device), normal(1, 3, 50).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        small = values.to(dtype)
        got = high(small, features)
        assert got.dtype == dtype
        assert torch.equal(got, high(small.float(), features).to(dtype))


# --- extreme features ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_sigmas_make_every_weight_one(dtype, device):
    features, values = 1e-9 * normal(1, 3, 150, dtype=dtype), normal(1, 2, 150, dtype=dtype)
    got = high(values.to(device), features.to(device))
    assert_near(got, values.double().mean(dim=2, keepdim=True).expand_as(got), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_tiny_sigmas_give_the_identity(dtype, normalization, device):
    features = torch.arange(150, dtype=dtype).view(1, 1, 150) * 1e7 + 3
    values = normal(1, 2, 150, dtype=dtype)
    got = high(values.to(device), features.to(device), normalization=normalization)
    if device.type == "cuda" and dtype == torch.float32:
        assert_near(got, values, 1e-6)  # the product by 1 is computed by three TF32 products
    else:
        assert torch.equal(got.cpu(), values)


def test_features_far_from_the_origin_keep_their_precision(device):
    # |x|^2 + |y|^2 - 2 x y would cancel all digits of these distances.
    features, values = normal(1, 4, 200), normal(1, 2, 200)
    far = features + 2.0**20
    near = far - 2.0**20
    got, want = (high(values.to(device), f.to(device)) for f in (far, near))
    assert_near(got, want, 1e-15)
    got = high(values.float().to(device), (near.float() + 2**10).to(device))
    want = reference.gaussian_filter(values.float().double(), (near.float() + 2**10).double())
    assert_near(got, want, TOLERANCE[torch.float32])


def test_queries_out_of_reach_give_zero(device):
    features, values = normal(1, 2, 30).to(device), normal(1, 2, 30).to(device)
    far = torch.full((1, 2, 3), 1e6, dtype=torch.float64, device=device)
    for normalization in NORMALIZATIONS:
        got = high(values, features, query_features=far, normalization=normalization)
        assert torch.equal(got, torch.zeros_like(got))


def test_far_query_is_a_weighted_average(device):
    # The weights, exp(-50), are far below float32's epsilon but the only ones of this query.
    features = torch.tensor([[[0.0, 0.1]]], device=device)
    values = torch.tensor([[[1.0, 3.0]]], device=device)
    far = torch.tensor([[[10.0]]], device=device)
    got = high(values, features, query_features=far)
    ratio = math.exp(-0.5 * 9.9**2 + 50)
    assert float(got) == pytest.approx((1 + 3 * ratio) / (1 + ratio), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("high", 4e-6), ("default", 1e-3)])
@pytest.mark.parametrize(("count", "dims", "channels"), [(76_800, 5, 21), (20_001, 16, 150)])
def test_precisions_on_cuda(count, dims, channels, precision, tolerance) -> None:
    features = torch.randn(1, dims, count, device="cuda") * (3 / dims**0.5)
    values = torch.rand(1, channels, count, device="cuda") * 1e5
    want = gaussian_filter(values.double(), features.double())
    got = gaussian_filter(values, features, precision=precision)
    assert_near(got, want, tolerance)
    assert torch.equal(got, gaussian_filter(values, features, precision=precision))


@interpreter.on_triton
def test_more_images_than_a_grid_axis_holds(device, monkeypatch):
    images, most = 70_000, 65_535
    if interpreter.on():
        images, most = 5, 2
        monkeypatch.setattr("segkernels.ops.gaussian_filter._MAX_BATCH", most)
    features, values = (torch.randn(images, n, 3, device=device) for n in (2, 1))
    for at in (None, features + 0.5):
        got = high(values, features, query_features=at)
        for start in (0, most - 1, images - 2):
            part = slice(start, start + 2)
            some = None if at is None else at[part]
            want = high(values[part], features[part], query_features=some)
            assert_near(got[part], want, 1e-6)


@interpreter.on_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_invalid_features_are_ignored_on_cuda(normalization, dtype, device):
    features, values = (normal(1, n, 100, dtype=dtype).to(device) for n in (2, 3))
    features[0, 1, 7] = float("nan")
    with raised_by_check("features .*NaN"):
        got = high(values, features, normalization=normalization)
    rest = torch.arange(100) != 7
    want = high(values[:, :, rest], features[:, :, rest], normalization=normalization)
    assert bool(got[:, :, 7].isnan().all())
    assert_near(got[:, :, rest], want, 5 * TOLERANCE[dtype])


# --- gradients ---


def test_gradients_of_coinciding_points(device):
    # The lattice has no gradient at such points; the exact filter is smooth.
    features = torch.zeros(1, 2, 6, dtype=torch.float64, device=device)
    features[0, 0, 3:] = 1
    values = normal(1, 2, 6).to(device)
    for normalization in NORMALIZATIONS:
        assert torch.autograd.gradcheck(
            lambda v, f, n=normalization: high(v, f, normalization=n),
            (values.requires_grad_(), features.requires_grad_()),
        )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck_of_queries(normalization, device):
    inputs = [normal(1, n, m).to(device).requires_grad_() for n, m in ((2, 5), (3, 5), (3, 4))]
    assert torch.autograd.gradcheck(
        lambda v, f, q: high(v, f, query_features=q, normalization=normalization), inputs
    )


@pytest.mark.parametrize("normalization", ["symmetric", "before", "after"])
@pytest.mark.parametrize("far", [11.0, 11.5, 11.7])
def test_gradients_at_queries_far_from_all_points(far, normalization, device):
    """A query, and a point, at almost the distance where sums of weights count as 0."""
    values = torch.tensor([[1.0], [2.0], [3.0]], device=device)
    points = torch.tensor([[0.0], [1.0], [-far]], device=device)
    queries = torch.tensor([[0.5], [1 + far]], device=device)
    found = []
    for function, dtype in (
        (gaussian_filter, torch.float32),
        (reference.gaussian_filter, torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in (values, points, queries)]
        out = function(
            *leaves[:2],
            query_features=leaves[2],
            normalization=normalization,
            precision="high",
        )
        weight = torch.tensor([[1.0], [2.0]], dtype=dtype, device=device)
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    for got, want in zip(*found, strict=True):
        # Half an ulp of a value of 3, times a distance of 13, cancels in float32.
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=5e-6)


def test_the_gradient_of_the_report():
    points = torch.tensor([[0.0], [1.0]], requires_grad=True)
    queries = torch.tensor([[0.5], [12.0]], requires_grad=True)
    values = torch.tensor([[1.0], [2.0]])
    out = gaussian_filter(values, points, query_features=queries, normalization="symmetric")
    out.sum().backward()
    torch.testing.assert_close(points.grad.flatten(), torch.full((2,), -0.0883883))
    torch.testing.assert_close(queries.grad.flatten(), torch.tensor([0.1767767, -8.5335e-13]))


def test_gradients_of_nan_values(device):
    features, values = normal(1, 2, 70).to(device), normal(1, 2, 70).to(device)
    values[0, 1, 3] = float("nan")
    inputs = [values.requires_grad_(), features.requires_grad_()]
    grads = torch.autograd.grad(high(*inputs, normalization="none").sum(), inputs)
    assert bool(grads[0].isfinite().all())
    assert not bool(grads[1].isfinite().any())


def test_second_derivative_raises():
    features, values = (normal(1, 2, 5).requires_grad_() for _ in range(2))
    for function in (high, torch.compile(high, fullgraph=True, backend="eager")):
        (grad,) = torch.autograd.grad(function(values, features).sum(), features, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            grad.sum().backward()


# --- tiles and culling ---


def _clusters(dims: int = 3, count: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in clusters, most of which are out of each other's reach."""
    centres = 60 * normal(2, dims, 20)
    which = torch.randint(0, 20, (count,))
    return centres[:, :, which] + normal(2, dims, count), normal(2, 2, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [False, True])
def test_culling_does_not_change_results(dtype, queries, device, monkeypatch):
    images, count = (1, 1000) if interpreter.on() else (2, 3000)
    features, values = (t[:images].to(device, dtype) for t in _clusters(count=count))
    at = features[:, :, ::3].contiguous() if queries else None
    inputs = [values.requires_grad_(), features.requires_grad_()]
    weight = torch.randn_like(values if at is None else values[:, :, ::3])

    def run() -> list[torch.Tensor]:
        out = high(*inputs, query_features=at, normalization="none")
        return [out, *torch.autograd.grad(out, inputs, weight)]

    plan = plans.Plan(features.detach(), at, "high", "test")
    assert plan.share() < 0.6
    culled = run()
    monkeypatch.setattr(plans, "reach", lambda *_: float("inf"))
    assert plans.Plan(features.detach(), at, "high", "test").share() == 1
    for mine, whole in zip(culled, run(), strict=True):
        assert_near(mine, whole, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 1000, 10**6])
def test_points_out_of_reach_have_negligible_weight(dtype, keys):
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    assert keys * math.exp(-plans.reach(dtype, keys, True) / 2) == pytest.approx(eps / 2)
    assert math.exp(-plans.reach(dtype, keys, False) / 2) == pytest.approx(tiny)


@pytest.mark.parametrize("count", [1, TILE, TILE + 1, 1000, 4096, 5000])
def test_kd_order_is_a_permutation_with_small_tiles(count):
    features = normal(2, 2, count)
    order = points.kd_order(features, TILE)
    assert torch.equal(order.sort(dim=1).values, torch.arange(count).expand(2, count))
    if count >= 1000:
        low, high_ = Points(features).boxes(TILE)
        assert float((high_ - low).mean()) < 8 * (TILE / count) ** 0.5


def test_rows_round_trip():
    features, values = normal(2, 3, 150), normal(2, 4, 150)
    sorted_ = Points(features)
    rows = sorted_.rows(values)
    assert rows.shape == (2, 3 * TILE, 4)
    assert torch.equal(sorted_.unsorted(rows.transpose(1, 2)), values)
    assert torch.equal(sorted_.sorted(values), rows.transpose(1, 2))
    assert bool((rows[:, 150:] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [False, True])
def test_native_kernel_agrees_with_blocked_torch(dtype, queries):
    features = _clusters()[0].to(dtype)
    keys = Points(features)
    at = Points(features[:, :, ::3].contiguous()) if queries else keys
    a, b = at.sorted(normal(2, 5, at.count, dtype=dtype)), normal(2, 5, 3000, dtype=dtype)
    b = keys.rows(b)
    for reach in (9.0, float("inf")):
        got = native.apply(at, keys, b, reach)
        assert_near(got.transpose(1, 2), blocked.apply(at, keys, b, reach), TOLERANCE[dtype])
        got = native.query_gradient(at, keys, a, b, reach)
        want = blocked.query_gradient(at, keys, a.transpose(1, 2).contiguous(), b, reach)
        assert_near(got.transpose(1, 2), want, 5 * TOLERANCE[dtype])


@pytest.mark.parametrize("simd", ["base", "avx2"])
def test_instruction_sets_agree_with_brute_force(simd, tmp_path):
    code = """
import torch
from segkernels import gaussian_filter
from segkernels.ops.gaussian_filter import reference
for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
    for dims, channels in ((5, 11), (9, 3)):
        inputs = [torch.randn(1, n, 300, dtype=dtype) for n in (channels, dims)]
        mine = [t.clone().requires_grad_() for t in inputs]
        theirs = [t.double().requires_grad_() for t in inputs]
        got, want = gaussian_filter(*mine), reference.gaussian_filter(*theirs)
        grads = [torch.autograd.grad(x.square().sum(), y) for x, y in ((got, mine), (want, theirs))]
        for a, b in zip([got, *grads[0]], [want, *grads[1]]):
            assert float((a - b).abs().max()) <= 5 * tolerance * float(b.abs().max())
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "SEGKERNELS_SIMD": simd, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr


def test_memory_is_linear_in_the_points():
    # The weights of 20,000 points would need 3.2 GB.
    with torch.profiler.profile(profile_memory=True, with_stack=False) as profile:
        high(torch.rand(1, 1, 20_000), torch.rand(1, 2, 20_000) * 200)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 50e6


@pytest.mark.parametrize("device", interpreter.DEVICES)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_forward_mode_with_respect_to_values(normalization: Any, device: str) -> None:
    values, tangent = (torch.randn(2, 3, 20, dtype=torch.float64, device=device) for _ in range(2))
    features = torch.randn(2, 2, 20, dtype=torch.float64, device=device)
    for queries in (None, features[:, :, :7] + 0.1):

        def call(v: torch.Tensor, q: Any = queries) -> torch.Tensor:
            return gaussian_filter(v, features, query_features=q, normalization=normalization)

        out, found = torch.func.jvp(call, (values,), (tangent,))
        torch.testing.assert_close(out, call(values))
        torch.testing.assert_close(found, call(tangent))
        with pytest.raises(NotImplementedError, match=r"gaussian_filter.*respect to features"):
            torch.func.jvp(
                lambda f: gaussian_filter(values, f, normalization=normalization),
                (features,),
                (features,),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_with_and_without_gradients(dtype):
    # Without gradients, native code divides by the sums of weights.
    values, features = normal(2, 3, 700, dtype=dtype), normal(2, 5, 700, dtype=dtype)
    queries = normal(2, 5, 300, dtype=dtype)
    queries[0, 0, 7] = 1e4  # no key is near
    values[1, 2, 5] = torch.inf  # the channel is not finite
    for query_features in (None, queries):
        plain = gaussian_filter(values, features, query_features=query_features)
        with_grad = gaussian_filter(
            values.clone().requires_grad_(), features, query_features=query_features
        )
        assert torch.equal(plain.nan_to_num(9), with_grad.nan_to_num(9))
        assert plain[1, 2].isnan().all()
        if query_features is not None:
            assert (plain[0, :, 7] == 0).all()
