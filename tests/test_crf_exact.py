"""`dense_crf(..., method="exact")`: brute force in float64, gradients, volumes, errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulation import interpreter
from lattice_points import raised_by_check
from PIL import Image
from typer.testing import CliRunner

from segkernels import DenseCRF, PairwiseTerm, _native, dense_crf
from segkernels.cli import app
from segkernels.ops.dense_crf import exact, reference
from segkernels.ops.dense_crf.reference import compat_matrix, energy
from segkernels.ops.gaussian_filter.reference import kernel

DATA = Path(__file__).resolve().parent / "data"
NORMALIZATIONS = ("symmetric", "before", "after", "none")
SIGMAS = {"sxy_gaussian": 2.0, "sxy_bilateral": 6.0, "srgb": 40.0}


@pytest.fixture(params=interpreter.DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, CUDA and Triton's interpreter: the CUDA code of this method is Triton's."""
    return torch.device(request.param)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64)


def coordinates(*spatial: int) -> torch.Tensor:
    """Coordinates (1, n, N) in the order x, y, z."""
    lines = [torch.arange(size, dtype=torch.float64) for size in spatial]
    return torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1]).flatten(1)[None]


def brute_force(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[Any],
    *,
    kind: str = "probs",
    normalization: str | Sequence[str] = "symmetric",
    iterations: int = 3,
    log: bool = False,
) -> torch.Tensor:
    """Mean field with dense weight matrices."""
    channels = scores.shape[1]
    u = energy(scores, kind).flatten(2)
    ways = [normalization] * len(features) if isinstance(normalization, str) else normalization
    matrices = []
    for f, way in zip(features, ways, strict=True):
        weights = kernel(f, f)
        sums = weights.sum(dim=2)
        if way == "symmetric":
            weights = weights * sums.rsqrt().unsqueeze(1) * sums.rsqrt().unsqueeze(2)
        elif way != "none":
            weights = weights / sums.unsqueeze(1 if way == "before" else 2)
        matrices.append(weights)
    mus = [compat_matrix(torch.as_tensor(c, dtype=torch.float64), channels) for c in compat]
    z = -u
    for _ in range(iterations):
        q = z.softmax(dim=1)
        z = -u
        for weights, mu in zip(matrices, mus, strict=True):
            z = z - mu @ q @ weights.transpose(1, 2)
    return (z.log_softmax(dim=1) if log else z.softmax(dim=1)).view(scores.shape)


def both_terms(img: torch.Tensor, sxy: Any, bilateral: Any, srgb: Any) -> list[torch.Tensor]:
    place = coordinates(*img.shape[2:])
    colour = torch.cat([(place / bilateral).expand(len(img), -1, -1), img.flatten(2) / srgb], dim=1)
    return [place / sxy, colour]


COMPATS = {
    "potts": lambda: (torch.tensor(3.0), torch.tensor(5.0)),
    "vector": lambda: (-uniform(4), -3 * uniform(4)),
    "matrix": lambda: (uniform(4, 4) - 2 * torch.eye(4), uniform(4, 4) - 3 * torch.eye(4)),
}


@pytest.mark.parametrize("compat", list(COMPATS))
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_outputs_and_gradients_agree_with_brute_force(normalization, compat, device):
    start = [
        uniform(2, 4, 9, 11),
        255 * uniform(2, 3, 9, 11),
        torch.tensor([2.0, 3.0], dtype=torch.float64),
        torch.tensor(6.0, dtype=torch.float64),
        torch.tensor([30.0, 40.0, 50.0], dtype=torch.float64),
        *(c.double() for c in COMPATS[compat]()),
    ]
    mine = [t.clone().to(device).requires_grad_() for t in start]
    theirs = [t.clone().requires_grad_() for t in start]
    probs, img, sxy, bilateral, srgb, first, second = mine
    got = dense_crf(
        img,
        probs,
        iterations=3,
        sxy_gaussian=sxy,
        sxy_bilateral=bilateral,
        srgb=srgb,
        compat_gaussian=first,
        compat_bilateral=second,
        normalization=normalization,
        method="exact",
    )
    probs, img, sxy, bilateral, srgb, first, second = theirs
    features = both_terms(img, sxy.view(1, 2, 1), bilateral, srgb.view(1, 3, 1))
    want = brute_force(probs, features, (first, second), normalization=normalization)
    assert float((got.cpu() - want).abs().max()) < 1e-11
    weight = torch.randn_like(want)
    found = torch.autograd.grad(got, mine, weight.to(device))
    expected = torch.autograd.grad(want, theirs, weight)
    for g, w in zip(found, expected, strict=True):
        # A sharp softmax makes gradients small differences of terms of about 1.
        assert float((g.cpu() - w).abs().max()) < 1e-10 * float(w.abs().max()) + 1e-13


@pytest.mark.parametrize("kind", ["probs", "logits", "unary"])
@pytest.mark.parametrize("log", [False, True])
def test_kinds_of_scores(kind, log, device):
    scores, img = uniform(1, 3, 6, 7), 255 * uniform(1, 3, 6, 7)
    got = dense_crf(
        img.to(device),
        **{kind: scores.to(device)},
        **SIGMAS,
        iterations=4,
        log=log,
        method="exact",
    )
    want = brute_force(scores, both_terms(img, 2, 6, 40), (3, 10), kind=kind, iterations=4, log=log)
    assert float((got.cpu() - want).abs().max()) < 1e-11


def test_reference_equals_brute_force():
    scores, img = uniform(2, 3, 6, 7), 255 * uniform(2, 3, 6, 7)
    features = [f.expand(2, -1, -1) for f in both_terms(img, 2, 6, 40)]
    compat = [torch.tensor(3.0).double(), torch.tensor(10.0).double()]
    want = brute_force(scores, features, compat)
    ways = ("symmetric", "symmetric")
    got = reference.mean_field(
        scores.flatten(2), features, compat, "probs", ways, 3, False, method="exact"
    )
    assert float((got.view_as(want) - want).abs().max()) < 1e-12


def test_float32_is_near_float64(device):
    images, rows = (1, 5) if interpreter.on() else (2, 20)
    scores, img = uniform(images, 21, rows, 30), 255 * uniform(images, 3, rows, 30)
    want = dense_crf(img, scores, method="exact", **SIGMAS)
    got = dense_crf(img.float().to(device), scores.float().to(device), method="exact", **SIGMAS)
    assert got.dtype == torch.float32
    limit = 2e-3 if _native.on_cuda(device) else 1e-5
    assert float((got.cpu() - want).abs().max()) < limit


def test_volumes_and_terms(device):
    scores, img, own = uniform(1, 3, 4, 5, 6), uniform(1, 2, 4, 5, 6), 2 * uniform(1, 1, 4, 5, 6)
    term = PairwiseTerm(own.to(device), compat=2.0, normalization="after")
    got = dense_crf(
        img.to(device),
        scores.to(device),
        iterations=2,
        sxy_gaussian=(3, 2, 1),
        sxy_bilateral=(5, 4, 2),
        srgb=0.3,
        pairwise=[term],
        method="exact",
    )
    place = coordinates(4, 5, 6)
    features = [
        place / torch.tensor([3.0, 2.0, 1.0]).view(1, 3, 1),
        torch.cat([place / torch.tensor([5.0, 4.0, 2.0]).view(1, 3, 1), img.flatten(2) / 0.3], 1),
        own.flatten(2),
    ]
    ways = ("symmetric", "symmetric", "after")
    want = brute_force(scores, features, (3, 10, 2), normalization=ways, iterations=2)
    assert float((got.cpu() - want).abs().max()) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 2.0, 7.0, 1e6])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("device", interpreter.DEVICES[:-1], indirect=True)  # no Triton kernel
def test_spatial_term_equals_the_dense_kernel(sigma, dtype, as_tensor, device):
    values = torch.rand(2, 3, 7 * 300, dtype=dtype)
    sigmas = torch.full((2,), sigma, dtype=dtype, device=device)
    one = exact.SpatialFilter((7, 300), sigmas, None if as_tensor else [sigma] * 2)
    place = coordinates(7, 300)[0] / sigma
    want = values.double() @ kernel(place, place)
    error = (one.apply(values.to(device)).cpu() - want).abs().max()
    assert float(error) < 32 * torch.finfo(dtype).eps * float(want.abs().max())
    if sigma == 2.0 and not as_tensor:
        assert one.axes[0][0].shape[0] < 150  # truncated, not 300


def test_batches_no_iterations_and_one_class(device):
    scores, img = uniform(2, 3, 6, 7).to(device), 255 * uniform(2, 3, 6, 7).to(device)
    together = dense_crf(img, scores, method="exact")
    alone = torch.stack([dense_crf(i, s, method="exact") for i, s in zip(img, scores, strict=True)])
    assert float((together - alone).abs().max()) < 1e-13
    nothing = dense_crf(img, scores, iterations=0, method="exact")
    assert float((nothing - scores / scores.sum(dim=1, keepdim=True)).abs().max()) < 1e-13
    one = dense_crf(img, torch.ones_like(scores[:, :1]), method="exact")
    assert torch.equal(one, torch.ones_like(one))


def test_no_terms_and_one_term():
    scores, img = uniform(1, 3, 6, 7), 255 * uniform(1, 3, 6, 7)
    none: Any = None
    got = dense_crf(none, scores, compat_gaussian=None, compat_bilateral=None, method="exact")
    assert float((got - scores / scores.sum(dim=1, keepdim=True)).abs().max()) < 1e-13
    features = both_terms(img, 2, 6, 40)
    got = dense_crf(none, scores, sxy_gaussian=2, compat_bilateral=None, method="exact")
    want = brute_force(scores, features[:1], (3,), iterations=10)
    assert float((got - want).abs().max()) < 1e-12
    got = dense_crf(img, scores, **{**SIGMAS, "compat_gaussian": None}, method="exact")
    want = brute_force(scores, features[1:], (10,), iterations=10)
    assert float((got - want).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["31x37x2", "36x52x3", "40x48x21"])
def test_lattice_approximates_the_exact_method(name):
    with np.load(DATA / f"dense_crf_pydensecrf_{name}.npz") as file:
        image, probs, theirs = file["image"], file["probs"], file["default_Q10"] / 65535
    ours = dense_crf(image, probs, method="exact")
    lattice = dense_crf(image, probs)
    for approximation in (theirs, lattice):
        apart = np.abs(ours - approximation)
        assert 1e-7 < apart.mean() < 0.02
        assert (ours.argmax(axis=0) == approximation.argmax(axis=0)).mean() > 0.95


def test_huge_and_tiny_sigmas(device):
    scores, img = uniform(1, 3, 6, 7), 255 * uniform(1, 3, 6, 7)
    for sigma, values in ((1e9, scores.mean(dim=(2, 3), keepdim=True)), (1e-9, scores)):
        got = dense_crf(
            img.to(device),
            unary=-scores.to(device).log(),
            iterations=1,
            sxy_bilateral=sigma,
            srgb=sigma,
            compat_gaussian=None,
            normalization="after",
            method="exact",
        )
        q = values / values.sum(dim=1, keepdim=True)
        if sigma > 1:
            q = (scores / scores.sum(dim=1, keepdim=True)).mean(dim=(2, 3), keepdim=True)
        want = (scores.log() + 10 * q).softmax(dim=1)
        assert float((got.cpu() - want).abs().max()) < 1e-10


# --- return types and errors ---


def test_types_and_layouts_of_results():
    image = (255 * np.random.default_rng(0).random((6, 7, 3))).astype(np.uint8)
    probs = np.random.default_rng(1).random((3, 6, 7)).astype(np.float32)
    refined = dense_crf(image, probs, method="exact")
    assert isinstance(refined, np.ndarray)
    assert refined.dtype == np.float32
    assert np.array_equal(refined, dense_crf(Image.fromarray(image), probs, method="exact"))
    half = torch.from_numpy(probs).half()[None].contiguous(memory_format=torch.channels_last)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    got = dense_crf(tensor, half, method="exact")
    assert got.dtype == torch.float16
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_deterministic():
    # Of any number of threads: tests/test_crf_values.py.
    scores, img = uniform(1, 3, 20, 20).float(), 255 * uniform(1, 3, 20, 20).float()
    first = dense_crf(img, scores, method="exact")
    assert torch.equal(first, dense_crf(img, scores, method="exact"))


def test_autocast_has_no_effect(device):
    rows = 2 if interpreter.on() else 9
    scores = uniform(1, 3, rows, 70).float().to(device)
    img = 255 * uniform(1, 3, rows, 70).to(device)
    compat = (torch.eye(3) - 2).to(device)
    want = dense_crf(img, scores, compat_gaussian=compat, method="exact")
    with torch.autocast(device.type, torch.bfloat16):
        got = dense_crf(img, scores, compat_gaussian=compat, method="exact")
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_too_many_points_raise(monkeypatch):
    img, scores = torch.zeros(1, 3, 400, 400), torch.full((1, 2, 400, 400), 0.5)
    with pytest.raises(
        ValueError, match=r"131,072 points.*160,000.*(seconds|minutes).*MiB"
    ) as told:
        dense_crf(img, scores, method="exact")
    assert "method='lattice'" in str(told.value)
    assert "SEGKERNELS_EXACT_POINTS=160000" in str(told.value)
    # The spatial term alone takes linear time.
    none: Any = None
    dense_crf(none, scores, compat_bilateral=None, iterations=1, method="exact")
    small = scores[:, :, :5, :5]
    monkeypatch.setenv("SEGKERNELS_EXACT_POINTS", "24")
    with pytest.raises(ValueError, match="got 25 points"):
        dense_crf(img[:, :, :5, :5], small, method="exact")
    monkeypatch.setenv("SEGKERNELS_EXACT_POINTS", "25")
    dense_crf(img[:, :, :5, :5], small, method="exact")
    monkeypatch.setenv("SEGKERNELS_EXACT_POINTS", "many")
    with pytest.raises(ValueError, match="SEGKERNELS_EXACT_POINTS must be a number"):
        dense_crf(img[:, :, :5, :5], small, method="exact")


def test_errors():
    scores, img = uniform(1, 3, 6, 7), 255 * uniform(1, 3, 6, 7)
    bad: Any = "brute force"
    with pytest.raises(
        ValueError, match="method must be one of 'lattice', 'exact', got 'brute force'"
    ):
        dense_crf(img, scores, method=bad)
    with pytest.raises(ValueError, match="DenseCRF: method must be one of 'lattice', 'exact'"):
        DenseCRF(3, method=bad)
    bad_scores, bad_img = scores.clone(), img.clone()
    bad_scores[0, 1, 2, 3], bad_img[0, 0, 0, 5] = float("inf"), float("nan")
    with pytest.raises(ValueError, match=r"probs must be finite, got inf at \[0, 1, 2, 3\]$"):
        dense_crf(img, bad_scores, method="exact")
    with pytest.raises(ValueError, match=r"img must be finite, got nan at \[0, 0, 0, 5\]$"):
        dense_crf(bad_img, scores, method="exact")
    with pytest.raises(ValueError, match=r"from 0 to 1, got .* at \[0, 0, 0, 0\] \(and 125 more"):
        dense_crf(img, scores + 2, method="exact")


@interpreter.on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("where", "told"), [("scores", "probs, logits"), ("image", "features")])
def test_invalid_points_are_ignored_on_cuda(where, told, dtype, device):
    scores, img = (uniform(1, 3, 6, 7).to(device, dtype) for _ in range(2))
    (scores if where == "scores" else img)[0, 1, 2, 3] = float("nan")
    with raised_by_check(f"{told}[^;]*$"):
        got = dense_crf(255 * img, scores, method="exact", **SIGMAS)
    assert bool(got[0, :, 2, 3].isnan().all())
    assert int(got.isnan().sum()) == 3


# --- module, torch.compile, command line ---


def test_gradcheck():
    scores, img = uniform(1, 2, 3, 3), 255 * uniform(1, 3, 3, 3)
    inputs = [
        (0.1 + 0.8 * scores).requires_grad_(),
        img.requires_grad_(),
        torch.tensor(1.5, dtype=torch.float64, requires_grad=True),
        torch.tensor(50.0, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(
        lambda p, i, sxy, srgb: dense_crf(
            i, p, iterations=2, sxy_gaussian=sxy, sxy_bilateral=4, srgb=srgb, method="exact"
        ),
        inputs,
    )


def test_module_has_gradients(device):
    layer = DenseCRF(3, iterations=2, learn_sigmas=True, method="exact").to(device)
    assert "method='exact'" in repr(layer)
    scores = torch.randn(1, 3, 6, 7, device=device, requires_grad=True)
    img = 255 * torch.rand(1, 3, 6, 7, device=device)
    out = layer(img, logits=scores, log=True)
    want = dense_crf(img, logits=scores, iterations=2, log=True, method="exact")
    assert float((out - want).detach().abs().max()) < 1e-5
    out[0, 0].sum().backward()
    for parameter in (scores, *layer.parameters()):
        assert parameter.grad is not None
        assert math.isfinite(float(parameter.grad.abs().sum()))
        assert float(parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize("device", interpreter.DEVICES[:-1], indirect=True)  # slow if interpreted
def test_compiles_to_one_graph(device):
    def refine(img, probs, srgb):
        return dense_crf(img, probs, iterations=2, srgb=srgb, method="exact")

    torch.compiler.reset()
    compiled = torch.compile(refine, fullgraph=True, backend="aot_eager")
    found = []
    for function in (refine, compiled):
        torch.manual_seed(0)
        inputs = [255 * torch.rand(1, 3, 6, 7), torch.rand(1, 3, 6, 7), torch.tensor(20.0)]
        inputs = [t.to(device).requires_grad_() for t in inputs]
        out = function(*inputs)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_refine_command(tmp_path):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (12, 15, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    probs = random.random((3, 12, 15)).astype(np.float32)
    np.save(tmp_path / "p.npy", probs)
    paths = [str(tmp_path / name) for name in ("i.png", "p.npy", "o.npy")]
    arguments = ["refine", *paths[:2], "-o", paths[2], "--method", "exact", "--device", "cpu"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    image = np.asarray(Image.open(tmp_path / "i.png"))
    want = dense_crf(image, probs, method="exact")
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), want, atol=1e-5)


@pytest.mark.gpu
def test_no_synchronisation_on_cuda() -> None:
    scores, img = torch.rand(2, 5, 60, 70).cuda(), 255 * torch.rand(2, 3, 60, 70).cuda()
    want = dense_crf(img, scores, method="exact")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = dense_crf(img, scores, method="exact")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dense_crf(img, scores, method="exact")
    graph.replay()
    assert torch.equal(captured, want)
