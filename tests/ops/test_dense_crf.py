"""Mean field of the dense CRF: pydensecrf's values, the float64 reference, gradients, layouts,
determinism, instruction sets, the dispatcher and torch.func."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation import ON_CUDA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lattice_points import (
    EVERY_DIMS,
    draw_features,
    normal,
    poisoned,
    raised_by_check,
    raises_in_call,
)

import segkernels
from segkernels.ops.dense_crf import MAX_TERMS, Config, mean_field, reference
from segkernels.ops.dense_crf.gradients import gradients
from segkernels.ops.permutohedral.native import NORMALIZATIONS

DATA = Path(__file__).resolve().parent.parent / "data"
DTYPES = (torch.float32, torch.float64)
KINDS = ("probs", "logits", "unary")
COMPATS = ("potts", "diagonal", "matrix")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def scores_of(kind: str, *shape: int) -> torch.Tensor:
    logits = 2 * normal(*shape)
    return {"probs": logits.softmax(1), "logits": logits, "unary": -logits}[kind]


def compat_of(kind: str, channels: int) -> torch.Tensor:
    """A compatibility that is not symmetric if it is a matrix."""
    shape = {"potts": (), "diagonal": (channels,), "matrix": (channels, channels)}[kind]
    return normal(*shape) if shape else torch.tensor(1.5, dtype=torch.float64)


def overlapping(dims: int, *spatial: int, batch: int = 2, margin: float = 1e-3) -> torch.Tensor:
    """Features (batch, dims, N) close enough for points to share vertices."""
    return draw_features((batch, dims, *spatial), 1.2 / dims**0.5, margin).flatten(2)


def config_of(*spatial: int, normalization: Sequence[str] = ("symmetric",), **changes) -> Config:
    return Config(
        **{
            "kind": "logits",
            "normalization": tuple(normalization),
            "iterations": 4,
            "log": False,
            "spatial": spatial,
            **changes,
        }
    )


def oracle(
    scores: torch.Tensor,
    features: Sequence[torch.Tensor],
    compat: Sequence[torch.Tensor],
    config: Config,
) -> torch.Tensor:
    c = config
    return reference.mean_field(
        scores, features, compat, c.kind, c.normalization, c.iterations, c.log
    )


def to(
    tensors: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    return [t.to(device, dtype) for t in tensors]


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got.detach().cpu().double() - want.detach().cpu().double()).abs().max()
    assert float(error) <= tolerance


# --- golden values from pydensecrf ---

GOLDEN = ("31x37x2", "36x52x3", "40x48x21")


@cache
def golden(size: str) -> dict[str, np.ndarray]:
    """Golden values; probabilities are stored in 16 bits (steps of 1/65535)."""
    with np.load(DATA / f"dense_crf_pydensecrf_{size}.npz") as file:
        return {k: v / np.float32(65535) if "_Q" in k else v for k, v in file.items()}


FIGURES = [(size, name) for size in GOLDEN for name in golden(size) if "_Q" in name]


def test_golden_values_are_complete():
    every = {f"{n}_{c}_Q{i}" for n, c, i in product(NORMALIZATIONS, COMPATS, (1, 5, 10))}
    for size, normalizations in zip(GOLDEN, (4, 4, 1), strict=True):
        names = {name for s, name in FIGURES if s == size}
        assert "default_Q10" in names
        assert names - {"default_Q10"} <= every
        assert len(names) == 1 + normalizations * 9


@pytest.mark.parametrize(("size", "name"), FIGURES)
def test_agrees_with_pydensecrf(size, name, device):
    figures = golden(size)
    arguments = {}
    if name != "default_Q10":
        normalization, kind, iterations = name.split("_")
        compat = 4.0 if kind == "potts" else torch.from_numpy(figures[f"compat_{kind}"])
        if kind != "potts":
            compat = compat.to(device)
        arguments = {
            "iterations": int(iterations[1:]),
            "sxy_gaussian": (3, 2),
            "sxy_bilateral": (40, 30),
            "srgb": (13, 10, 7),
            "compat_gaussian": compat,
            "compat_bilateral": compat,
            "normalization": normalization,
        }
    img = torch.from_numpy(figures["image"]).permute(2, 0, 1).to(device)
    got = segkernels.dense_crf(img, torch.from_numpy(figures["probs"]).to(device), **arguments)
    error = (got.cpu() - torch.from_numpy(figures[name])).abs().amax(dim=0)
    assert float((error > 1e-4).float().mean()) <= 0.005
    assert float(error.median()) <= 1e-5


@pytest.mark.parametrize("size", GOLDEN)
def test_defaults_on_numpy_agree_with_pydensecrf(size):
    figures = golden(size)
    probs = figures["probs"].clip(1e-5, 1)
    for given_as in (
        {"probs": figures["probs"]},
        {"logits": np.log(probs)},
        {"logits": np.log(probs) + 7},
        {"unary": -np.log(probs)},
    ):
        got = segkernels.dense_crf(figures["image"], **given_as)
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.float32
        error = np.abs(got - figures["default_Q10"]).max(0)
        assert (error > 1e-4).mean() <= 0.005
        assert np.median(error) <= 1e-5
    assert np.abs(figures["default_Q10"] - probs).max() > 0.1


# --- the float64 reference ---


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_DIMS
def test_agrees_with_reference(dims, dtype, device):
    features = overlapping(dims, 5, 7)
    for normalization, kind, compat in zip(
        NORMALIZATIONS, (*KINDS, "probs"), (*COMPATS, "potts"), strict=True
    ):
        # The reference gets the values as rounded to the dtype.
        scores = scores_of(kind, 2, 3, 35).to(dtype).double()
        mu = compat_of(compat, 3).to(dtype).double()
        config = config_of(5, 7, kind=kind, normalization=[normalization])
        want = oracle(scores, [features], [mu], config)
        got = mean_field(
            scores.to(device, dtype),
            to([features], device, dtype),
            to([mu], device, dtype),
            config,
        )
        assert got.dtype == dtype
        assert_near(got, want, TOLERANCE[dtype])
        assert float((want - scores.softmax(1)).abs().max()) > 1e-2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_any_call_agrees_with_reference(data, seed, device):
    draw = data.draw
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    spatial = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    terms = draw(st.integers(0, 3))
    config = config_of(
        *spatial,
        kind=draw(st.sampled_from(KINDS)),
        normalization=[draw(st.sampled_from(NORMALIZATIONS)) for _ in range(terms)],
        iterations=draw(st.integers(0, 4)),
        log=draw(st.booleans()),
    )
    points = torch.Size(spatial).numel()
    torch.manual_seed(seed)
    scores = scores_of(config.kind, batch, channels, points)
    dims = [draw(st.integers(1, 6)) for _ in range(terms)]
    spreads = [draw(st.sampled_from([0.0, 0.3, 20.0])) for _ in range(terms)]
    features = [s * normal(batch, d, points) for d, s in zip(dims, spreads, strict=True)]
    compat = [0.5 * compat_of(draw(st.sampled_from(COMPATS)), channels) for _ in range(terms)]
    want = oracle(scores, features, compat, config)
    got = mean_field(
        *(scores.to(device), to(features, device, torch.float64)),
        *(to(compat, device, torch.float64), config),
    )
    assert_near(got, want, 1e-9)


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 16, 21, 33, 150])
def test_any_number_of_classes(channels, compat, device):
    features = [overlapping(2, 6, 5), overlapping(5, 6, 5)]
    mu = [0.3 * compat_of(compat, channels), compat_of("potts", channels)]
    scores = scores_of("logits", 2, channels, 30)
    for log in (False, True):
        config = config_of(6, 5, normalization=["symmetric", "after"], log=log)
        want = oracle(scores, features, mu, config)
        for dtype in DTYPES:
            got = mean_field(
                *(scores.to(device, dtype), to(features, device, dtype)),
                *(to(mu, device, dtype), config),
            )
            assert_near(got, want, 100 * TOLERANCE[dtype])
            if not log:
                assert_near(got.sum(1), torch.ones(2, 30), 1e-6)


@pytest.mark.parametrize(
    "spatial",
    [(131, 137), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 20011), (3, 67, 101)))],
)
def test_images_of_several_tiles(spatial, device):
    points = torch.Size(spatial).numel()
    line = torch.linspace(0, 40, points, dtype=torch.float64)
    features = [line + 4 * torch.rand(2, d, points, dtype=torch.float64) for d in (2, 4)]
    mu = [compat_of("matrix", 3), compat_of("potts", 3)]
    config = config_of(*spatial, normalization=["symmetric", "after"], iterations=2)
    inputs = [scores_of("logits", 2, 3, points), *features, *mu]
    want_in, got_in = leaves_of(inputs), leaves_of(to(inputs, device, torch.float64))
    want = oracle(want_in[0], want_in[1:3], want_in[3:], config)
    got = mean_field(got_in[0], got_in[1:3], got_in[3:], config)
    assert_near(got, want, 1e-11)
    wanted = torch.autograd.grad(want[:, 1].square().sum(), want_in)
    for g, w in zip(torch.autograd.grad(got[:, 1].square().sum(), got_in), wanted, strict=True):
        assert_near(g, w, 1e-9 * max(1.0, float(w.abs().max())))


def test_maximum_number_of_terms(device):
    features = [draw_features((1, 1 + i, 30), seed=i) for i in range(MAX_TERMS)]
    mu = [compat_of("potts", 4) * 0.2 * (i + 1) for i in range(MAX_TERMS)]
    normalization = [NORMALIZATIONS[i % 4] for i in range(MAX_TERMS)]
    config = config_of(30, normalization=normalization)
    scores = scores_of("logits", 1, 4, 30)
    device_arguments = to(features, device, torch.float64), to(mu, device, torch.float64)
    got = mean_field(scores.to(device), *device_arguments, config)
    assert_near(got, oracle(scores, features, mu, config), 1e-11)
    # Every term affects the result.
    for i in range(MAX_TERMS):
        fewer = [m.clone() for m in device_arguments[1]]
        fewer[i].zero_()
        without = mean_field(scores.to(device), device_arguments[0], fewer, config)
        assert float((without - got).abs().max()) > 1e-6


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_iterations_or_terms(kind, log, device):
    scores = scores_of(kind, 2, 5, 12)
    config = config_of(3, 4, kind=kind, log=log)
    z = -reference.energy(scores, kind)
    want = z.log_softmax(1) if log else z.softmax(1)
    features, mu = [overlapping(2, 3, 4).to(device)], [compat_of("matrix", 5).to(device)]
    got = mean_field(scores.to(device), features, mu, config._replace(iterations=0))
    assert_near(got, want, 1e-14)
    assert_near(mean_field(scores.to(device), [], [], config._replace(normalization=())), got, 0)


def test_scores_of_any_magnitude(device):
    # Large scores do not overflow, and smaller differences are not lost.
    features, mu = [overlapping(2, 4, 4).to(device)], [compat_of("potts", 5).to(device)]
    scores = scores_of("logits", 2, 5, 16)
    scores[:, 2] += 1e10
    scores[:, 3] -= 1e10
    got = mean_field(scores.to(device), features, mu, config_of(4, 4))
    assert bool(got.isfinite().all())
    assert_near(got[:, 2], torch.ones(2, 16), 1e-12)
    shifted = scores_of("logits", 2, 5, 16)
    want = mean_field(shifted.to(device), features, mu, config_of(4, 4))
    for shift in (1e4, -1e4):
        got = mean_field((shifted + shift).to(device), features, mu, config_of(4, 4))
        assert_near(got, want, 1e-9)


# --- invalid values ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores(bad, kind, device):
    features, mu = [overlapping(2, 4, 4).to(device)], [compat_of("potts", 3).to(device)]
    for dtype, iterations in product(DTYPES, (0, 2)):
        scores = scores_of(kind, 2, 3, 16).to(device, dtype)
        scores[1, 2, 7] = bad
        config = config_of(4, 4, kind=kind, iterations=iterations)
        if bad == {"logits": -float("inf"), "unary": float("inf")}.get(kind):
            got = mean_field(scores, to(features, device, dtype), to(mu, device, dtype), config)
            assert float(got[1, 2, 7]) == 0
            assert bool(got.isfinite().all())
            continue
        message = "probs, logits or unary must be finite, got NaN or infinity"
        if kind == "probs" and bad < 0:
            message = "probs must be from 0 to 1"
        with raises_in_call(f"dense_crf: {message}"):
            mean_field(scores, to(features, device, dtype), to(mu, device, dtype), config)


@pytest.mark.parametrize("device", ON_CUDA)
def test_invalid_pixel_is_ignored_on_cuda(device):
    features, mu = [overlapping(2, 6, 6).to(device)], [compat_of("potts", 3).to(device)]
    scores = scores_of("logits", 2, 3, 36).to(device)
    scores[1, 2, 7] = float("nan")
    with raised_by_check("probs, logits or unary must be finite"):
        got = mean_field(scores, features, mu, config_of(6, 6))
    bad = torch.zeros(2, 36, dtype=torch.bool)
    bad[1, 7] = True
    assert torch.equal(got.isnan().any(1).cpu(), bad)


def test_invalid_pixel_is_ignored_in_gradients():
    # As in the backward pass on CUDA, where the forward pass does not raise.
    features, mu = [overlapping(2, 6, 6)], [compat_of("matrix", 3)]
    config, scores, grad = config_of(6, 6), scores_of("logits", 2, 3, 36), normal(2, 3, 36)
    found = []
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = scores.clone()
        bad[1, 2 if value > -float("inf") else slice(None), 7] = value
        needs = (True, True, True)
        found.append(gradients(grad, bad, [*features, *mu], needs, config))
        assert not found[-1][0][1, :, 7].any()
        for one in found[-1]:
            assert bool(one.isfinite().all())
        for one, first in zip(found[-1], found[0], strict=True):
            assert torch.equal(one, first)
    whole = gradients(grad, scores, [*features, *mu], needs, config)
    torch.testing.assert_close(found[0][0][0], whole[0][0])  # the other image


def test_backward_under_autocast(device):
    img = (normal(1, 3, 8, 9).abs() * 80).to(device)
    compat = (normal(5, 5) - 3 * torch.eye(5)).to(device, torch.float32).requires_grad_()
    logits = normal(1, 5, 8, 9).to(device, torch.float32).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            out = segkernels.dense_crf(img, logits=logits, compat_bilateral=compat, iterations=3)
            loss = (out * torch.linspace(-1, 1, 9, device=device)).sum()
            found.append(torch.autograd.grad(loss, (logits, compat)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# --- gradients ---


def leaves_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("compat", COMPATS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, compat, device):
    features = [overlapping(d, 5, batch=2, margin=1e-2) for d in (2, 3)]
    inputs = leaves_of(
        [scores_of(kind, 2, 3, 5), *features, compat_of(compat, 3), compat_of("potts", 3)]
    )
    inputs = [t.detach().to(device).requires_grad_() for t in inputs]
    config = config_of(5, kind=kind, iterations=3, normalization=["symmetric", "after"])
    assert torch.autograd.gradcheck(
        lambda s, f, g, m, n: mean_field(s, [f, g], [m, n], config), inputs, atol=1e-7
    )


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_DIMS
def test_gradients_agree_with_reference(dims, dtype, device):
    kind, compat = KINDS[dims % 3], COMPATS[dims % 3]
    config = config_of(
        *(4, 5), kind=kind, normalization=["symmetric", NORMALIZATIONS[dims % 4]], log=dims % 2 == 0
    )
    scores = scores_of(kind, 2, 3, 20)
    if kind == "probs":
        scores[0, 0, 3] = 0  # clipped, so its gradient is 0
    inputs = [scores, overlapping(2, 4, 5), overlapping(dims, 4, 5)]
    inputs += [compat_of("potts", 3), compat_of(compat, 3)]
    inputs = [t.to(dtype).double() for t in inputs]
    weight = normal(2, 3, 20)
    want_in = leaves_of(inputs)
    want = torch.autograd.grad(
        (oracle(want_in[0], want_in[1:3], want_in[3:], config) * weight).sum(), want_in
    )
    got_in = leaves_of(to(inputs, device, dtype))
    out = mean_field(got_in[0], got_in[1:3], got_in[3:], config)
    got = torch.autograd.grad((out * weight.to(out)).sum(), got_in)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        assert float(w.abs().max()) > 1e-4
        assert_near(g, w, 100 * TOLERANCE[dtype] * max(1.0, float(w.abs().max())))


def test_gradients_only_for_inputs_that_need_them(device):
    inputs = [scores_of("logits", 1, 3, 20), overlapping(2, 20, batch=1), compat_of("matrix", 3)]
    config = config_of(20)

    def call(s, f, m):
        return mean_field(s, [f], [m], config).square().sum()

    full = leaves_of(to(inputs, device, torch.float64))
    call(*full).backward()
    for i in range(3):
        tensors = [t.detach().clone().requires_grad_(j == i) for j, t in enumerate(full)]
        call(*tensors).backward()
        for j, tensor in enumerate(tensors):
            assert (tensor.grad is None) == (j != i)
        assert_near(tensors[i].grad, full[i].grad, 1e-13)


def test_second_derivative_raises(device):
    scores = scores_of("logits", 1, 3, 20).to(device).requires_grad_()
    features, mu = [overlapping(2, 20, batch=1).to(device)], [compat_of("potts", 3).to(device)]
    out = mean_field(scores, features, mu, config_of(20))
    (grad,) = torch.autograd.grad(out.square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()


# --- layouts, batches, determinism ---


def outputs_and_gradients(
    scores: torch.Tensor, features: Sequence[torch.Tensor], spatial: Sequence[int]
) -> list[torch.Tensor]:
    """Results and gradients for several compatibilities and normalisations."""
    found = []
    channels, generator = scores.shape[1], torch.Generator().manual_seed(1)
    matrix = torch.randn(channels, channels, generator=generator).to(scores)
    for mu, normalization in (
        ([matrix.new_tensor(2.0), matrix[0]], ["symmetric", "after"]),
        ([matrix, matrix.new_tensor(-1.0)], ["before", "none"]),
    ):
        config = config_of(*spatial, normalization=normalization, iterations=3)
        leaves = leaves_of([scores, *features, *(0.1 * m for m in mu)])
        out = mean_field(leaves[0], leaves[1:3], leaves[3:], config)
        found += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    return found


def test_layouts(device):
    features, mu = [overlapping(2, 5, 6).to(device)], [compat_of("matrix", 4).to(device)]
    scores = scores_of("logits", 2, 4, 30).to(device)
    want = mean_field(scores, features, mu, config_of(5, 6))
    wide = torch.full((2, 8, 61), float("nan"), dtype=torch.float64, device=device)
    wide[:, ::2, 1::2] = scores
    for view in (
        scores.transpose(1, 2).contiguous().transpose(1, 2),
        scores.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        wide[:, ::2, 1::2],
    ):
        kept = view.clone()
        got = mean_field(view, features, mu, config_of(5, 6))
        assert torch.equal(got, want)
        assert got.stride() == torch.empty_like(view).stride()
        assert torch.equal(view, kept)


def test_batch_equals_single_images_bitwise(device):
    for spatial in ((11, 13), (80, 120)):
        points = torch.Size(spatial).numel()
        scores = scores_of("logits", 3, 5, points).to(device, torch.float32)
        features = [overlapping(d, *spatial, batch=3) for d in (2, 5)]
        features = to(features, device, torch.float32)
        mu = [scores.new_tensor(2.0), normal(5, 5, dtype=torch.float32).to(device)]
        config = config_of(*spatial, normalization=["symmetric", "symmetric"])
        whole = mean_field(scores, features, mu, config)
        for b in range(3):
            one = [f[b : b + 1].contiguous() for f in features]
            assert torch.equal(mean_field(scores[b : b + 1], one, mu, config), whole[b : b + 1])


@pytest.mark.parametrize("channels", [1, 21, 40])
def test_same_bits_for_any_number_of_threads(channels):
    # Several tiles per image, so that there is work for several threads.
    spatial = (80, 110)
    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(110.0), indexing="ij")
    place = torch.stack([x, y]).flatten(1).expand(2, -1, -1)
    features = [
        (place / 3).contiguous(),
        torch.cat([place / 40, torch.randn(2, 1, 80 * 110)], dim=1),
    ]
    scores = torch.randn(2, channels, 80 * 110)
    assert_same_on_threads(scores, features, spatial)


@pytest.mark.parametrize("dims", [1, 6])
def test_same_bits_for_any_number_of_threads_with_few_points(dims):
    features = [f.float() for f in (overlapping(2, 7, 9), overlapping(dims, 7, 9))]
    assert_same_on_threads(torch.randn(2, 3, 63), features, (7, 9))


def assert_same_on_threads(
    scores: torch.Tensor, features: Sequence[torch.Tensor], spatial: Sequence[int]
) -> None:
    mu = [torch.tensor(2.0), torch.randn(scores.shape[1])]
    matrices = [torch.randn(scores.shape[1], scores.shape[1]), torch.tensor(-1.0)]
    config = config_of(*spatial, normalization=["symmetric", "after"], iterations=3)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = leaves_of([scores, *features, *mu])
        out = mean_field(leaves[0], leaves[1:3], leaves[3:], config)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        other = mean_field(scores, features, matrices, config)
        found.append([out.detach(), *grads, other])
    assert all(bool(t.isfinite().all()) for t in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_same_bits_twice(device):
    scores = scores_of("logits", 2, 5, 60 * 70).to(device, torch.float32)
    features = to([overlapping(d, 60, 70) for d in (2, 5)], device, torch.float32)
    first, second = (outputs_and_gradients(scores, features, (60, 70)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("channels", [1, 3, 21, 40])
def test_every_element_is_written(channels, device, monkeypatch):
    scores = scores_of("logits", 2, channels, 13 * 11).to(device)
    features = to([overlapping(d, 13, 11) for d in (2, 5)], device, torch.float64)
    want = outputs_and_gradients(scores, features, (13, 11))
    with poisoned(monkeypatch):
        got = outputs_and_gradients(scores, features, (13, 11))
    assert all(bool(t.isfinite().all()) for t in got)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- instruction sets ---

SIMD = """
import sys
import numpy as np
import torch
from segkernels import dense_crf, permutohedral_filter

given = np.load(sys.argv[1])
found = {}
for name in given.files:
    if not name.startswith("values"):
        continue
    channels = name.removeprefix("values")
    for dtype in (torch.float32, torch.float64):
        values = torch.from_numpy(given[name]).to(dtype).requires_grad_()
        features = torch.from_numpy(given["features"]).to(dtype).requires_grad_()
        out = permutohedral_filter(values, features, "symmetric")
        grads = torch.autograd.grad(out.square().sum(), (values, features))
        crf = dense_crf(
            torch.from_numpy(given["image"]).to(dtype),
            logits=values,
            srgb=1,
            compat_gaussian=torch.from_numpy(given["compat" + channels]),
        )
        for i, result in enumerate((out, *grads, crf, torch.autograd.grad(crf.sum(), values)[0])):
            found[f"{channels}_{dtype}_{i}"] = result.detach().double().numpy()
np.savez(sys.argv[2], **found)
"""


@pytest.mark.slow
def test_instruction_sets_agree(tmp_path):
    rng = np.random.default_rng(0)
    arguments = {
        "features": draw_features((1, 5, 12, 14), spread=0.5).numpy(),
        "image": draw_features((1, 3, 12, 14)).numpy(),
    }
    for channels in (1, 3, 8, 21, 33, 40):
        arguments[f"values{channels}"] = rng.normal(size=(1, channels, 12, 14))
        arguments[f"compat{channels}"] = rng.normal(size=(channels, channels)) / channels
    np.savez(tmp_path / "given.npz", **arguments)
    found = {}
    for name in ("base", "avx2", "avx512"):
        files = (str(tmp_path / "given.npz"), str(tmp_path / f"{name}.npz"))
        environment = {**os.environ, "SEGKERNELS_SIMD": name}
        subprocess.run(
            [sys.executable, "-c", SIMD, *files],
            cwd=tmp_path,
            check=True,
            env=environment,
            timeout=300,
        )
        with np.load(files[1]) as file:
            found[name] = dict(file)
    assert len(found["base"]) == 6 * 2 * 5
    for name in ("avx2", "avx512"):
        for key, want in found["base"].items():
            tolerance = 3e-5 if "float32" in key else 1e-11
            scale = max(1.0, np.abs(want).max())
            assert np.abs(found[name][key] - want).max() <= tolerance * scale, (name, key)


# --- dispatcher, torch.func, tracing ---


def operands(device: torch.device, grad: bool) -> tuple:
    scores = scores_of("probs", 2, 3, 20).to(device).requires_grad_(grad)
    features = [overlapping(d, 4, 5).to(device).requires_grad_(grad) for d in (2, 3)]
    compat = [compat_of(kind, 3).to(device).requires_grad_(grad) for kind in ("matrix", "potts")]
    return scores, [*features, *compat], "probs", ["symmetric", "after"], 3, False, [4, 5]


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad, device):
    torch.library.opcheck(torch.ops.segkernels.dense_crf.default, operands(device, grad))


def test_opcheck_of_backward(device):
    scores, terms, *rest = operands(device, grad=False)
    grad = normal(*scores.shape).to(device)
    for needs in ([True] * 5, [True, False, True, False, True]):
        arguments = grad, scores, terms, needs, *rest
        torch.library.opcheck(torch.ops.segkernels.dense_crf_backward.default, arguments)


def test_opcheck_without_terms(device):
    scores = scores_of("logits", 1, 3, 20).to(device).requires_grad_()
    arguments = (scores, [], "logits", [], 3, True, [20])
    torch.library.opcheck(torch.ops.segkernels.dense_crf.default, arguments)


def test_dispatcher_agrees(device):
    scores, terms, *rest = operands(device, grad=True)
    kind, normalization, iterations, log, spatial = rest
    config = config_of(
        *spatial, kind=kind, normalization=normalization, iterations=iterations, log=log
    )
    leaves = [scores, *terms]
    results = []
    for out in (
        mean_field(scores, terms[:2], terms[2:], config),
        torch.ops.segkernels.dense_crf(scores, terms, *rest),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_grad(mode, device):
    scores, terms, *_ = operands(device, grad=True)
    config = config_of(4, 5, kind="probs", normalization=["symmetric", "after"])
    want = mean_field(scores, terms[:2], terms[2:], config)
    with mode():
        got = mean_field(scores, terms[:2], terms[2:], config)
    assert want.requires_grad
    assert not got.requires_grad
    assert torch.equal(got, want)


def crf_inputs(*batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 255 * torch.rand(*batch, 3, 6, 7), torch.randn(*batch, 4, 6, 7)


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_torch_func(method):
    img, logits = crf_inputs(2)

    def loss(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return segkernels.dense_crf(i, logits=x, iterations=2, method=method)[:, 0].square().sum()

    leaves = [t.clone().requires_grad_() for t in (logits, img)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, (0, 1))(logits, img)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if method == "lattice":
        with pytest.raises(NotImplementedError, match=r"dense_crf: forward-mode"):
            torch.func.jvp(loss, (logits, img), (logits, img))
    else:
        small = torch.randn_like(logits)
        _, found = torch.func.jvp(lambda x: loss(x, img), (logits,), (small,))
        torch.testing.assert_close(found, (expected[0] * small).sum(), rtol=1e-4, atol=1e-6)
        with pytest.raises(NotImplementedError, match=r"gaussian_filter.*respect to features"):
            torch.func.jvp(lambda i: loss(logits, i), (img,), (img,))


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_vmap(method):
    img, logits = crf_inputs(3, 2)

    def refined(i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return segkernels.dense_crf(i, logits=x, iterations=2, method=method)

    for dims in ((0, 0), (None, 0)):
        first = img if dims[0] == 0 else img[0]
        found = torch.func.vmap(refined, dims)(first, logits)
        for k in range(3):
            expected = refined(img[k if dims[0] == 0 else 0], logits[k])
            torch.testing.assert_close(found[k], expected)


def test_vmap_over_compatibilities():
    img, logits = crf_inputs(2)

    def loss(c: torch.Tensor) -> torch.Tensor:
        return segkernels.dense_crf(img, logits=logits, compat_gaussian=c)[:, 0].sum()

    several = torch.tensor([1.0, 2.0, 3.0])
    for call in (loss, torch.func.grad(loss)):
        found = torch.func.vmap(call)(several)
        for one, c in zip(found, several, strict=True):
            torch.testing.assert_close(one, call(c))


def test_negated_views_of_parameters_are_checked():
    img, logits = crf_inputs(2)
    for name in ("sxy_gaussian", "srgb"):
        sigmas = torch.tensor([3.0, -3.0, 3.0][: 2 if "sxy" in name else 3])
        with pytest.raises(ValueError, match=rf"{name} must be positive.*-3"):
            segkernels.dense_crf(img, logits=logits, **{name: torch._neg_view(-sigmas)})
    nan = torch._neg_view(torch.full((4,), float("nan")))
    with pytest.raises(ValueError, match="compat_gaussian must be finite"):
        segkernels.dense_crf(img, logits=logits, compat_gaussian=nan)


@pytest.mark.parametrize("method", ["lattice", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_negated_views(kind, method):
    img, _ = crf_inputs(2)
    scores = scores_of(kind, 2, 4, 6, 7).float()
    expected = segkernels.dense_crf(img, **{kind: scores}, method=method)
    for i in (img, torch._neg_view(-img)):
        for s in (scores, torch._neg_view(-scores)):
            assert torch.equal(segkernels.dense_crf(i, **{kind: s}, method=method), expected)
    leaf = scores.clone().requires_grad_()
    (want,) = torch.autograd.grad(
        segkernels.dense_crf(img, **{kind: leaf}, method=method)[:, 0].sum(), leaf
    )
    out = segkernels.dense_crf(img, **{kind: torch._neg_view(-leaf)}, method=method)
    (got,) = torch.autograd.grad(out[:, 0].sum(), leaf)
    assert torch.equal(got.resolve_neg(), want)


@pytest.mark.parametrize("method", ["lattice", "exact"])
def test_meta_tensors_and_jit_trace(method):
    img, logits = (t.to("meta") for t in crf_inputs(2))
    assert segkernels.dense_crf(img, logits=logits, method=method).shape == logits.shape
    img, logits = crf_inputs(2)
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.trace(
            lambda i, x: segkernels.dense_crf(i, logits=x, method=method), (img, logits)
        )
