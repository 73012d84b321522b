"""dense_crf: one class, impossible classes, clipping, doubtful values, and what errors say."""

from __future__ import annotations

import re
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from emulation import DEVICES, EMULATED, ON_CUDA
from lattice_points import raised_by_check, raises_in_call

import segkernels
from segkernels import DenseCRF, PairwiseTerm, _native, dense_crf, permutohedral_filter
from segkernels.ops.dense_crf.product import product
from segkernels.ops.dense_crf.reference import mean_field as reference

SIZE = (9, 11)
METHODS = ("lattice", "exact")
methods = pytest.mark.parametrize("method", METHODS)
# The emulation has no Triton, which filters float32 for "exact".
_CASES = [
    *(("lattice", device) for device in DEVICES),
    *(("exact", device) for device in DEVICES if device is not EMULATED),
]
methods_and_devices = pytest.mark.parametrize(
    ("method", "device"),
    [
        pytest.param(method, *d.values, marks=d.marks, id=f"{method}-{d.id or d.values[0]}")
        if hasattr(d, "marks")
        else pytest.param(method, d, id=f"{method}-{d}")
        for method, d in _CASES
    ],
    indirect=["device"],
)
INF = float("inf")


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) * 255


def probabilities(*shape: int, seed: int = 1) -> torch.Tensor:
    """Softmax over axis 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(1)


def without_image(**changes: Any) -> dict[str, Any]:
    return {"img": None, "compat_gaussian": None, "compat_bilateral": None, **changes}


# --- one class ---


def one_class(kind: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of one class, and the same for background and foreground, in float64."""
    p = probabilities(shape[0], 2, *shape[1:])[:, 1:]
    if kind == "probs":
        return p, torch.cat([1 - p, p], dim=1)
    scores = 4 * p - 2
    return scores, torch.cat([torch.zeros_like(p), scores], dim=1)


@methods_and_devices
@pytest.mark.parametrize("kind", ["probs", "logits", "unary"])
def test_one_class_equals_two(kind, method, device):
    img = image(2, 3, *SIZE).to(device)
    one, two = (s.to(device) for s in one_class(kind, 2, *SIZE))
    for compat in (4.0, [-1.0, -3.0], [[0.0, 2.0], [1.0, -1.0]], torch.tensor([-2.0]), [[-2.0]]):
        same = {(1,): [-2.0, -2.0], (1, 1): [[-2.0, 0.0], [0.0, -2.0]]}
        options = {"compat_gaussian": compat, "method": method}
        of_two = {**options, "compat_gaussian": same.get(np.shape(compat), compat)}
        for log in (False, True):
            got = dense_crf(img, **{kind: one}, log=log, **options)
            want = dense_crf(img, **{kind: two}, log=log, **of_two)[:, 1:]
            assert torch.equal(got, want)
            assert bool((got.exp() if log else got).std() > 0.05)


def test_kinds_of_one_class_agree(device):
    img, p = image(1, 3, *SIZE).to(device), one_class("probs", 1, *SIZE)[0].to(device)
    want = dense_crf(img, p)
    logit = (p / (1 - p)).log()
    torch.testing.assert_close(dense_crf(img, logits=logit), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense_crf(img, unary=-logit), want, rtol=0, atol=1e-12)


@methods_and_devices
def test_shapes_of_one_class(method, device):
    img, p = image(1, 3, *SIZE).to(device), one_class("probs", 1, *SIZE)[0].to(device)
    want = dense_crf(img, torch.cat([1 - p, p], dim=1), method=method)[0, 1]
    for shape in (SIZE, (1, *SIZE), (1, 1, *SIZE)):
        for one in (img, img[0]):
            got = dense_crf(one, p.view(shape), method=method)
            assert got.shape == shape
            assert torch.equal(got.view(SIZE), want)
    if not _native.on_cuda(device):
        for array in (img[0].permute(1, 2, 0).numpy(), img.permute(0, 2, 3, 1).numpy()):
            got = dense_crf(array, p.view(SIZE).numpy(), method=method)
            assert np.array_equal(got, want.numpy())
    volume, q = image(2, 1, 3, 5, 4).to(device), one_class("probs", 2, 3, 5, 4)[0].to(device)
    want = dense_crf(volume, torch.cat([1 - q, q], dim=1), method=method)[:, 1:]
    assert torch.equal(dense_crf(volume, q, method=method), want)
    # (H, W) never goes with several images, and (B, H, W) has B classes.
    with pytest.raises(ValueError, match=r"img .* sizes \(1, 9, 11\), got shape \(2, 3, 9, 11\)"):
        dense_crf(image(2, 3, *SIZE), p.view(SIZE).cpu())
    with pytest.raises(ValueError, match=r"img .* sizes \(1, 9, 11\), got shape \(2, 3, 9, 11\)"):
        dense_crf(image(2, 3, *SIZE), torch.rand(2, *SIZE))


@methods_and_devices
def test_one_class_that_is_certain_everywhere(method, device):
    """A softmax over one channel is 1 everywhere, and so is the result."""
    img = image(2, 3, *SIZE).to(device)
    for dtype in (torch.float16, torch.float32, torch.float64):
        ones = torch.ones(2, 1, *SIZE, dtype=dtype, device=device)
        assert torch.equal(dense_crf(img, ones, method=method), ones)
        assert torch.equal(dense_crf(img, ones, method=method, log=True), torch.zeros_like(ones))
    # An image of the batch does not depend on the others.
    mixed = torch.cat([ones[:1], one_class("probs", 1, *SIZE)[0].to(device)])
    got = dense_crf(img, mixed, method=method)
    assert bool((got[0] == 1).all())
    torch.testing.assert_close(got[1:], dense_crf(img[1:], mixed[1:], method=method))
    ones[0, 0, 3, 4] = 1 - 1e-6
    assert bool((dense_crf(img, ones, method=method)[0] != 1).any())


@methods_and_devices
@pytest.mark.parametrize("kind", ["probs", "logits", "unary"])
def test_gradients_of_one_class(kind, method, device):
    img, scores = image(1, 3, 4, 5).to(device), one_class(kind, 1, 4, 5)[0].to(device)
    options = {"sxy_bilateral": 3, "srgb": 60, "iterations": 2, "method": method}

    def refine(s: torch.Tensor, compat: torch.Tensor) -> torch.Tensor:
        return dense_crf(img, **{kind: s}, log=True, compat_bilateral=compat, **options)

    compat = torch.tensor([-1.0, -2.0], dtype=torch.float64, device=device)
    inputs = scores.requires_grad_(), compat.requires_grad_()
    assert torch.autograd.gradcheck(refine, inputs)


@methods
def test_module_of_one_class(method):
    crf = DenseCRF(1, compat_gaussian=[2.0], learn_sigmas=True, method=method)
    assert {k: tuple(v.shape) for k, v in crf.state_dict().items() if "compat" in k} == {
        "compat_gaussian": (1,),
        "compat_bilateral": (),
    }
    img, one = image(2, 3, *SIZE), one_class("logits", 2, *SIZE)[0].float()
    two = torch.cat([torch.zeros_like(one), one], dim=1)
    want = dense_crf(img, logits=two, compat_gaussian=[2.0, 2.0], method=method)[:, 1:]
    torch.testing.assert_close(crf(img, logits=one), want)
    assert crf(img[:1], logits=one[0, 0]).shape == SIZE
    target = one.detach() > 0
    log_p = crf(img, logits=one.requires_grad_(), log=True)
    log_p[target].sum().backward()
    for gradient in (one.grad, crf.compat_gaussian.grad, crf.compat_bilateral.grad):
        assert bool(gradient.isfinite().all())
        assert bool(gradient.any())


# --- impossible classes ---


def test_impossible_class_equals_pydensecrf():
    """pydensecrf's result for U = zeros(3, 2, 2), U[2] = inf and a constant image."""
    unary = torch.zeros(3, 2, 2)
    unary[2] = INF
    for method in METHODS:
        got = dense_crf(torch.zeros(3, 2, 2), unary=unary, method=method)
        want = torch.tensor([0.5, 0.5, 0]).view(3, 1, 1).expand(3, 2, 2)
        torch.testing.assert_close(got, want)
        logs = dense_crf(torch.zeros(3, 2, 2), logits=-unary, log=True, method=method)
        torch.testing.assert_close(logs.exp(), want)
        assert bool((logs[2] == -INF).all())


@methods_and_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [2, 3, 8, 21])
def test_impossible_classes_equal_very_improbable_ones(channels, dtype, method, device):
    img = image(2, 3, *SIZE).to(device)
    generator = torch.Generator().manual_seed(channels)
    logits = torch.randn(2, channels, *SIZE, generator=generator, dtype=torch.float64)
    closed = torch.rand(logits.shape, generator=generator) < 0.4
    closed[:, 0] = False
    closed[:, :, :2] = False
    logits = logits.to(device, dtype)
    closed = closed.to(device)
    finite = dense_crf(img, logits=logits.masked_fill(closed, -30000.0), method=method)
    got = dense_crf(img, logits=logits.masked_fill(closed, -INF), method=method)
    torch.testing.assert_close(got, finite, rtol=0, atol=1e-6)
    assert not got[closed].any()
    minus = dense_crf(img, unary=(-logits).masked_fill(closed, INF), method=method)
    assert torch.equal(minus, got)


@methods_and_devices
@pytest.mark.parametrize("log", [False, True])
def test_gradients_with_impossible_classes(log, method, device):
    img = image(1, 3, *SIZE).to(device)
    logits = torch.randn(
        1, 4, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    closed = torch.zeros(1, 4, *SIZE, dtype=torch.bool)
    closed[:, 3, 2:5], closed[:, 0, 4:] = True, True
    weight = torch.randn(1, 4, *SIZE, dtype=torch.float64).masked_fill(closed, 0).to(device)
    closed = closed.to(device)
    found = []
    for value in (-INF, -500.0):
        scores = logits.to(device).masked_fill(closed, value).requires_grad_()
        compat = torch.tensor(3.0, dtype=torch.float64, device=device, requires_grad=True)
        colours = img.double().requires_grad_()
        out = dense_crf(
            colours, logits=scores, log=log, compat_gaussian=compat, iterations=3, method=method
        )
        (out.masked_fill(closed, 0) * weight).sum().backward()
        found.append((scores.grad, compat.grad, colours.grad))
    assert not found[0][0][closed].any()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert bool(got.any())


def test_gradient_at_infinite_scores_is_zero_even_if_asked_for():
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 2] = -INF
    for method in METHODS:
        scores = logits.clone().requires_grad_()
        out = dense_crf(image(1, 3, 4, 4), logits=scores, log=True, method=method)
        out.backward(torch.ones_like(out))
        assert not scores.grad[:, 2].any()
        assert bool(scores.grad.isfinite().all())


@methods_and_devices
@pytest.mark.parametrize("kind", ["logits", "unary"])
def test_what_stays_invalid(kind, method, device):
    sign = 1 if kind == "logits" else -1
    img = image(2, 3, *SIZE).to(device)
    for values, place, message in (
        (float("nan"), (1, 2, 3, 4), "nan at [1, 2, 3, 4]"),
        (sign * INF, (1, 2, 3, 4), f"{sign * INF} at [1, 2, 3, 4]"),
        (-sign * INF, (1, slice(None), 3, 4), f"{-sign * INF} at [1, 0, 3, 4] for all classes"),
    ):
        scores = torch.zeros(2, 4, *SIZE).to(device)
        scores[place] = values
        if not _native.on_cuda(device):
            with pytest.raises(ValueError, match=re.escape(message)):
                dense_crf(img, **{kind: scores}, method=method)
            continue
        with raised_by_check("probs, logits or unary must be finite"):
            got = dense_crf(img, **{kind: scores}, method=method)
        bad = torch.zeros(2, *SIZE, dtype=torch.bool)
        bad[1, 3, 4] = True
        assert torch.equal(got.isnan().all(1).cpu(), bad)
        assert torch.equal(got.isnan().any(1).cpu(), bad)


@methods_and_devices
def test_large_scores_do_not_lose_precision(method, device):
    img = image(1, 3, *SIZE).to(device)
    unary = (torch.randint(0, 4096, (1, 5, *SIZE)) / 1024).to(device)  # exact after the shift
    want = dense_crf(img, unary=unary, log=True, method=method)
    for shift in (1e4, -4096.0):
        moved = unary + shift
        exact = dense_crf(img, unary=moved.double(), log=True, method=method)
        got = dense_crf(img, unary=moved, log=True, method=method)
        torch.testing.assert_close(got, exact.float(), rtol=0, atol=2e-4)
        torch.testing.assert_close(got.exp().sum(1), torch.ones_like(got[:, 0]), rtol=0, atol=1e-5)
    assert bool((want.exp().sum(1) - 1).abs().max() < 1e-5)


# --- clipping ---


@methods_and_devices
def test_probabilities_a_little_outside_are_clipped_silently(method, device, recwarn):
    img, probs = image(2, 3, *SIZE).to(device), probabilities(2, 4, *SIZE)
    for dtype in (torch.float16, torch.float32, torch.float64):
        bad = probs.clone()
        bad[0, 1, 2, 3], bad[1, 2, 3, 4], bad[1, 0, 0, 0], bad[1, 1, 0, 0] = (
            -1e-8,
            1.0005,
            -0.009,
            1.009,
        )
        bad = bad.to(device, dtype)
        assert torch.equal(
            dense_crf(img, bad, method=method), dense_crf(img, bad.clamp(0, 1), method=method)
        )
        scores = bad.float().requires_grad_()
        dense_crf(img, scores, method=method).square().sum().backward()
        outside = (bad < 0) | (bad > 1)
        assert int(outside.sum()) == 4 or dtype == torch.float16
        assert not scores.grad[outside].any()
        assert bool((scores.grad[~outside] != 0).any())
    assert not [w for w in recwarn if "clipped" in str(w.message)]


@methods
@pytest.mark.parametrize("values", [(1.2, 1.45), (-0.02, -0.5), (1.0101, 1.5)])
def test_probabilities_further_outside_warn_once(values, method):
    img, probs = image(2, 3, *SIZE), probabilities(2, 4, *SIZE).float()
    probs[0, 3, 7, 4], probs[1, 0, 0, 0] = values
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = dense_crf(img, probs, method=method)
    (warning,) = caught
    want = f"dense_crf: probs must be from 0 to 1, got {values[0]} at [0, 3, 7, 4] (and 1 more); "
    assert str(warning.message).startswith(want)
    assert "clipped" in str(warning.message)
    assert warning.filename == __file__
    assert torch.equal(got, dense_crf(img, probs.clamp(0, 1), method=method))


@pytest.mark.parametrize("device", ON_CUDA)
def test_clipping_on_cuda_warns_in_check(device):
    img, probs = image(2, 3, *SIZE).to(device), probabilities(2, 4, *SIZE).float().to(device)
    probs[0, 3, 7, 4] = 1.2
    got = dense_crf(img, probs)
    with pytest.warns(UserWarning, match="^segkernels: probs must be from 0 to 1, .*clipped"):
        segkernels.check()
    segkernels.check()
    assert torch.equal(got, dense_crf(img, probs.clamp(0, 1)))
    probs[0, 3, 7, 4] = 1.6
    with raised_by_check("probs must be from 0 to 1"):
        got = dense_crf(img, probs)
    assert got.isnan().any(1).nonzero().tolist() == [[0, 7, 4]]


@methods_and_devices
@pytest.mark.parametrize("value", [1.51, -0.51, 255.0])
def test_probabilities_far_outside_raise(value, method, device):
    img, probs = image(2, 3, *SIZE).to(device), probabilities(2, 4, *SIZE).to(device)
    probs[0, 3, 7, 4], probs[1, 2:, 0, :3], probs[0, 0, 0, 0] = value, value, 1.2
    where = rf"{value:g} at \[0, 3, 7, 4\] \(and 6 more\)"
    where = "values outside" if _native.on_cuda(device) else where
    with raises_in_call(f"dense_crf: probs must be from 0 to 1, got {where}"):
        dense_crf(img, probs, method=method)


def test_places_are_in_the_array_that_was_given():
    probs = probabilities(1, 4, *SIZE)[0]
    probs[2, 3, 5] = 2
    with pytest.raises(ValueError, match=r"got 2 at \[2, 3, 5\]$"):
        dense_crf(image(3, *SIZE), probs.numpy())
    one = probs[2]
    with pytest.raises(ValueError, match=r"got 2 at \[3, 5\]$"):
        dense_crf(image(3, *SIZE), one)
    points = probs.flatten(1).T.contiguous()
    term = PairwiseTerm(torch.rand(99, 2), 3)
    with pytest.raises(ValueError, match=r"got 2 at \[38, 2\]$"):
        dense_crf(probs=points, pairwise=[term], **without_image())
    bad = torch.rand(2, *SIZE)
    bad[1, 2, 3] = float("nan")
    terms = [PairwiseTerm(torch.rand(2, *SIZE), 3), PairwiseTerm(bad.numpy(), 3)]
    with pytest.raises(ValueError, match=r"pairwise\[1\].features .*, got nan at \[1, 2, 3\]$"):
        dense_crf(image(3, *SIZE), probs.clamp(0, 1), pairwise=terms)
    photograph = image(3, *SIZE).permute(1, 2, 0).numpy()
    photograph[4, 5, 1] = INF
    with pytest.raises(ValueError, match=r"img must be finite, got inf at \[4, 5, 1\]$"):
        dense_crf(photograph, probs.clamp(0, 1))
    with pytest.raises(
        ValueError, match=r"values too large, up to 2\.\d*e\+08 at \[0, [234], \d, \d+\]"
    ):
        dense_crf(image(3, *SIZE), probs.clamp(0, 1).float(), srgb=1e-6)


# --- doubtful values ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "effect"), [("unary", "invert"), ("logits", "weaken")])
def test_probabilities_as_unary_or_logits_warn(kind, effect, dtype):
    img, probs = image(2, 3, *SIZE), probabilities(2, 4, *SIZE).to(dtype)
    with pytest.warns(UserWarning, match=f"^dense_crf: {kind} are .*this would {effect}") as caught:
        dense_crf(img, **{kind: probs})
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_crf(img, **{kind: probs * 2})
        dense_crf(img, **{kind: torch.rand(2, 4, *SIZE)})
        dense_crf(img, **{kind: -probs.clamp(1e-3, 1).log()})
        one = probs.clone()
        one[1, 2, 3, 4] += 0.5
        dense_crf(img, **{kind: one})
        dense_crf(img, probs)


@pytest.mark.parametrize("srgb", [13, torch.tensor(13.0), torch.tensor([13.0, 14.0, 15.0])])
def test_normalised_images_warn(srgb):
    img, probs = image(1, 3, *SIZE) / 255, probabilities(1, 4, *SIZE)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (img - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for doubtful in (img, normalised):
        with pytest.warns(UserWarning, match="srgb is 13, so the image has almost no") as caught:
            dense_crf(doubtful, probs, srgb=srgb)
        assert [w.filename for w in caught] == [__file__]


# --- volumes ---


def test_unbatched_volume_is_refused():
    img, probs = image(4, 3, 6, 6), torch.rand(4, 3, 6, 6).softmax(0)
    match = (
        r"probs must have a batch axis for a volume, \(1, C, D, H, W\), got shape \(4, 3, 6, 6\)"
    )
    with pytest.raises(ValueError, match=match):
        dense_crf(img, probs)
    with pytest.raises(ValueError, match=r"^dense_crf: logits must have a batch axis"):
        dense_crf(img, logits=probs.log())
    with pytest.raises(ValueError, match=r"^dense_crf: unary must have a batch axis"):
        dense_crf(img, unary=-probs.log())
    with pytest.raises(ValueError, match=r"^dense_crf: probs must have a batch axis"):
        DenseCRF(3)(img, probs)
    # An array (D, H, W, n), with as many slices as classes.
    with pytest.raises(ValueError, match=r"^dense_crf: probs must have a batch axis"):
        dense_crf(image(5, 6, 6, 3).numpy(), torch.rand(5, 5, 6, 6).softmax(0))
    assert dense_crf(img[None], probs[None]).shape == (1, 4, 3, 6, 6)


def test_batches_are_not_taken_for_volumes():
    img = image(4, 4, 6, 6)
    for scores in (
        torch.rand(4, 4, 6, 6).softmax(1),
        torch.full((4, 4, 6, 6), 0.25),  # sums to 1 over both axes
        torch.eye(4).view(4, 4, 1, 1).expand(4, 4, 6, 6),
        torch.rand(4, 4, 6, 6),
    ):
        assert dense_crf(img, scores).shape == scores.shape


def test_errors_about_volumes_name_the_batch_axis():
    scores = torch.rand(4, 5, 6, 6).softmax(0)
    for img in (image(1, 5, 6, 6), image(5, 6, 6, 1).numpy(), image(5, 6, 6).numpy()):
        with pytest.raises(ValueError, match=r"a batch axis, \(1, C, D, H, W\)$"):
            dense_crf(img, scores)
    with pytest.raises(ValueError, match=r"got 5 .*a batch axis, \(1, C, D, H, W\)$"):
        DenseCRF(4)(image(1, 5, 6, 6), scores)


# --- shapes alone ---


def test_what_shapes_forbid_takes_no_time_and_no_memory():
    """Images of 900 million pixels: a copy would take seconds and gigabytes."""
    n = 30000
    blank = torch.zeros(1)
    large, probs = blank.expand(17, n, n), blank.expand(2, n, n)
    array = np.broadcast_to(np.zeros(1, np.uint8), (n, n, 17))
    read_only = np.broadcast_to(np.zeros(1, np.float32), (2, n, n))
    term = PairwiseTerm(blank.expand(17, n, n), 1.0)
    begin = time.perf_counter()
    for match, call in (
        ("at most 16 features, got 19", lambda: dense_crf(large, probs)),
        ("at most 16 features, got 19", lambda: dense_crf(array, probs)),
        ("at most 16 features, got 19", lambda: dense_crf(array, read_only)),
        ("at most 16 features, got 19", lambda: dense_crf(array, logits=read_only[:, ::-1])),
        ("at most 16 features, got 19", lambda: dense_crf(large, probs, method="exact")),
        ("at most 16 features, got 17", lambda: dense_crf(large[:3], probs, pairwise=[term])),
        (r"must be at most 2\*\*30 .*got 1 \* 900000000 \* 6", lambda: dense_crf(large[:3], probs)),
        ("must have at most .* points", lambda: dense_crf(large[:3], probs, method="exact")),
        ("sizes", lambda: dense_crf(large[:3, 1:], probs)),
        ("got 4", lambda: dense_crf(large[:3], probs, srgb=(1, 2, 3, 4))),
        ("vector of 2", lambda: dense_crf(large[:3], probs, compat_bilateral=[1.0, 2, 3])),
        ("max_vertices", lambda: dense_crf(large[:3], probs, max_vertices=0)),
        ("at most 8", lambda: dense_crf(large[:3], probs, pairwise=[term] * 7)),
        (
            "at most 2",
            lambda: permutohedral_filter(blank.expand(1, 1, n, n), blank.half().expand(1, 2, n, n)),
        ),
        (
            "must match",
            lambda: permutohedral_filter(blank.expand(1, 1, n), blank.half().expand(1, 9, n, 999)),
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert time.perf_counter() - begin < 1
    module = DenseCRF(2)
    with pytest.raises(ValueError, match="at most 16 features"):
        module(large, probs)
    assert time.perf_counter() - begin < 1.5


# --- numbers beyond the dtype, and arrays ---


def test_unsigned_images_of_64_bits():
    base = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint64)
    probs = probabilities(1, 4, *SIZE)[0].numpy()
    want = dense_crf(base.astype(np.float64), probs)
    assert np.array_equal(dense_crf(base, probs), want)
    large = base << np.uint64(55)  # up to 255 * 2^55 > 2^62
    top = large + (np.uint64(1) << np.uint64(63)) * (base % np.uint64(2))
    for big in (large, top):
        want = dense_crf(big.astype(np.float64), probs, srgb=13 * 2.0**55)
        for image_ in (big, torch.from_numpy(big).permute(2, 0, 1)):
            scores = probs if isinstance(image_, np.ndarray) else torch.from_numpy(probs)
            got = dense_crf(image_, scores, srgb=13 * 2.0**55)
            np.testing.assert_allclose(np.asarray(got), want, atol=1e-9)
    assert int(top.max()) >= 2**63


@pytest.mark.parametrize("name", ["compat_gaussian", "compat_bilateral"])
def test_compatibilities_that_would_overflow(name):
    img, probs = image(1, 3, *SIZE), probabilities(1, 4, *SIZE).float()
    for compat in (3e38, -3e38, 1e39, [0.0, 0, 3e38, 0], torch.full((4, 4), 3e38)):
        with pytest.raises(ValueError, match=rf"{name} must be from -1.8e\+19 to 1.8e\+19, got "):
            dense_crf(img, probs, **{name: compat})
    for compat in (1e19, -1e19):
        assert bool(dense_crf(img, probs, **{name: compat}).isfinite().all())
    assert bool(dense_crf(img, probs.double(), **{name: 3e38}).isfinite().all())


@pytest.mark.parametrize("name", ["sxy_gaussian", "sxy_bilateral", "srgb"])
@pytest.mark.parametrize("value", [1e39, 1e-40])
def test_sigmas_beyond_float32(name, value):
    img, probs = image(1, 3, *SIZE), probabilities(1, 4, *SIZE)
    for sigma in (value, [value], torch.tensor(value, dtype=torch.float64)):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite in float32, got"):
            dense_crf(img, probs.float(), **{name: sigma})
    with pytest.raises(ValueError, match=f"{name} must be positive and finite in float32, got"):
        DenseCRF(4, **{name: value})
    if value > 1:
        assert bool(dense_crf(img, probs, **{name: value}).isfinite().all())


def test_flipped_axes_of_length_1():
    img, probs = image(1, 3, 1, 11), probabilities(1, 4, 1, 11)
    want = dense_crf(img[0].permute(1, 2, 0).numpy(), probs[0].numpy())
    flipped = probs[0].numpy()[:, ::-1]
    assert flipped.strides[1] < 0
    got = dense_crf(img[0].permute(1, 2, 0).numpy()[::-1], flipped)
    assert np.array_equal(got, want)


def test_terms_over_arrays(device):
    features = np.random.default_rng(0).normal(size=(2, *SIZE))
    probs = probabilities(1, 4, *SIZE)[0].to(device)
    want = dense_crf(
        probs=probs,
        pairwise=[PairwiseTerm(torch.from_numpy(features).to(device), 3)],
        **without_image(),
    )
    for array in (features, features[:, ::-1].copy()[:, ::-1], features.astype(">f8")):
        got = dense_crf(probs=probs, pairwise=[PairwiseTerm(array, 3)], **without_image())
        assert torch.equal(got, want)
    batch = dense_crf(
        probs=torch.stack([probs, probs]),
        pairwise=[PairwiseTerm(np.stack([features, features]), 3)],
        **without_image(),
    )
    torch.testing.assert_close(batch[1], want)


# --- points without a grid ---


@methods_and_devices
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_points(channels, method, device):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(70, 3, generator=generator, dtype=torch.float64) * 3
    probs = torch.rand(70, channels, generator=generator, dtype=torch.float64)
    terms = [PairwiseTerm(features.to(device), 3.0)]
    got = dense_crf(probs=probs.to(device), pairwise=terms, method=method, **without_image())
    assert got.shape == probs.shape
    both = torch.cat([1 - probs, probs], dim=1) if channels == 1 else probs
    want = reference(
        both.T[None],
        [features.T[None]],
        [torch.tensor(3.0).double()],
        "probs",
        ["symmetric"],
        10,
        False,
        method,
    )[0].T
    torch.testing.assert_close(got.cpu(), want[:, -channels:], rtol=0, atol=1e-9)
    if not _native.on_cuda(device):
        array = dense_crf(
            probs=probs.numpy(),
            pairwise=[PairwiseTerm(features.numpy(), 3.0)],
            method=method,
            **without_image(),
        )
        assert np.array_equal(array, got.numpy())


def test_points_need_features_alone():
    probs, term = torch.rand(20, 4), PairwiseTerm(torch.rand(20, 3), 3.0)
    with pytest.raises(ValueError, match="compat_gaussian and compat_bilateral must be None"):
        dense_crf(None, probs, compat_bilateral=None, pairwise=[term])
    short = PairwiseTerm(torch.rand(19, 3), 3.0)
    with pytest.raises(ValueError, match=r"pairwise\[0\].features must be .*got shape \(19, 3\)"):
        dense_crf(probs=probs, pairwise=[short], **without_image())
    mixed = [PairwiseTerm(torch.rand(20, 3), 3.0), PairwiseTerm(torch.rand(3, 20, 4), 3.0)]
    with pytest.raises(ValueError, match=r"scores must be \(N, C\) and features \(N, d\)$"):
        dense_crf(probs=probs, pairwise=mixed, **without_image())
    probs.requires_grad_()
    dense_crf(probs=probs, pairwise=[term], **without_image()).square().sum().backward()
    assert bool(probs.grad.any())


# --- threads ---


@methods
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("matrix", [False, True])
def test_gradients_of_parameters_have_the_same_bits_for_any_number_of_threads(
    matrix, colours, method
):
    """Images so large that torch splits sums and products over the threads."""
    size = (190, 180) if method == "lattice" else (60, 70)
    img, logits = image(1, colours, *size), torch.randn(1, 4, *size)
    compat = torch.randn(4, 4) if matrix else torch.tensor(3.0)
    sigmas = [torch.tensor(3.0), torch.tensor(20.0), torch.tensor(13.0)]
    weight = torch.randn(1, 4, *size)
    found = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = [t.clone().requires_grad_() for t in (logits, compat, *sigmas)]
        s, mu, sxy, sxy_bilateral, srgb = leaves
        out = dense_crf(
            img,
            logits=s,
            iterations=2,
            sxy_gaussian=sxy,
            compat_gaussian=mu,
            sxy_bilateral=sxy_bilateral,
            srgb=srgb,
            compat_bilateral=mu,
            method=method,
        )
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("size", [(200, 210), (1, 40000)])
def test_exact_spatial_term_has_the_same_bits_for_any_number_of_threads(size):
    logits, weight = torch.randn(1, 3, *size), torch.randn(1, 3, *size)
    found = []
    before = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = [logits.clone(), torch.tensor(3.0), torch.tensor([2.0, 3.0, 4.0])]
        s, sxy, mu = leaves = [t.requires_grad_() for t in leaves]
        method = "exact" if size[0] > 1 else "lattice"
        out = dense_crf(
            None,
            logits=s,
            iterations=2,
            sxy_gaussian=sxy,
            compat_gaussian=mu,
            compat_bilateral=None,
            method=method,
        )
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 700, 5), (64, 256, 32), (70, 300, 33), (200, 3, 90)]
)
def test_product(sizes, dtype):
    rows, inner, cols = sizes
    a, b = torch.randn(inner, rows, dtype=dtype).T, torch.randn(rows, inner, dtype=dtype)
    c = torch.randn(inner, 2 * cols, dtype=dtype)[:, ::2]
    eps = torch.finfo(dtype).eps
    for left in (a, b):
        exact = left.double() @ c.double()
        bound = 300 * eps * (left.double().abs() @ c.double().abs())
        assert bool(((product(left, c) - exact).abs() <= bound).all())
    small = [t.double().clone().requires_grad_() for t in (b[:4, :5], c[:5, :3])]
    if inner >= 5:
        assert torch.autograd.gradcheck(product, small, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(product, small)


def test_empty_calls_have_gradients():
    shapes = (0, 2, 5), (0, 3, 5)
    values, points = (torch.zeros(s, requires_grad=True) for s in shapes)
    queries = torch.zeros(0, 3, 4, requires_grad=True)
    leaves = [values, points, queries]
    out = segkernels.gaussian_filter(values, points, query_features=queries)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
    out = permutohedral_filter(values, points)
    assert len(torch.autograd.grad(out.sum(), leaves[:2])) == 2
    sigma, mu = torch.tensor(3.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    probs = torch.rand(1, 2, *SIZE)
    for method in METHODS:
        out = dense_crf(
            image(1, 3, *SIZE), probs, iterations=0, srgb=sigma, compat_bilateral=mu, method=method
        )
        assert [float(g) for g in torch.autograd.grad(out.sum(), (sigma, mu))] == [0, 0]
