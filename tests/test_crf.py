"""segkernels.dense_crf: results, argument types, layouts, gradients, compilation, errors."""

from __future__ import annotations

import functools
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from lattice_points import raises_in_call
from PIL import Image

from segkernels import PairwiseTerm, _native, dense_crf, permutohedral_filter, probs_from_labels
from segkernels.ops import _dtypes
from segkernels.ops.dense_crf import inputs, reference

SIZE = (9, 11)


def random_image(*shape: int, seed: int = 0) -> np.ndarray:
    """Random uint8 values of `shape`, channels last."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def probabilities(*shape: int, axis: int = 0, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=shape)
    e = np.exp(2 * scores)
    return e / e.sum(axis=axis, keepdims=True)


def channels_first(img: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(img, -1, 0 if img.ndim == 3 else 1).copy())


def oracle(
    img: np.ndarray | None,
    scores: np.ndarray,
    kind: str = "probs",
    *,
    iterations: int = 10,
    sxy_gaussian: Any = 3,
    compat_gaussian: Any = 3,
    sxy_bilateral: Any = 80,
    srgb: Any = 13,
    compat_bilateral: Any = 10,
    normalization: str = "symmetric",
    log: bool = False,
) -> np.ndarray:
    """The reference in float64, for img (B, *spatial, n) and scores (B, C, *spatial)."""
    spatial = scores.shape[2:]
    axes = [np.arange(n, dtype=float) for n in spatial]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")[::-1]).reshape(len(spatial), -1)
    features, compat = [], []
    if compat_gaussian is not None:
        place = grid / np.reshape(np.broadcast_to(sxy_gaussian, len(spatial)), (-1, 1))
        features.append(np.broadcast_to(place, (scores.shape[0], *place.shape)))
        compat.append(compat_gaussian)
    if compat_bilateral is not None:
        assert img is not None
        place = grid / np.reshape(np.broadcast_to(sxy_bilateral, len(spatial)), (-1, 1))
        colour = np.moveaxis(img.astype(float) / np.asarray(srgb), -1, 1)
        colour = colour.reshape(scores.shape[0], img.shape[-1], -1)
        place = np.broadcast_to(place, (scores.shape[0], *place.shape))
        features.append(np.concatenate([place, colour], axis=1))
        compat.append(compat_bilateral)
    out = reference.mean_field(
        torch.tensor(scores, dtype=torch.float64).flatten(2),
        [torch.tensor(f) for f in features],
        [torch.tensor(np.asarray(c), dtype=torch.float64) for c in compat],
        kind,
        [normalization] * len(features),
        iterations,
        log,
    )
    return out.view(scores.shape).numpy()


def assert_near(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    got, want = (torch.as_tensor(t).detach().cpu().double() for t in (got, want))
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance


# --- results ---


def test_defaults(device):
    img, probs = random_image(*SIZE, 3), probabilities(4, *SIZE)
    want = oracle(img[None], probs[None])[0]
    got = dense_crf(channels_first(img).to(device), torch.from_numpy(probs).to(device))
    assert_near(got, want)
    assert np.abs(want - probs).max() > 0.1
    assert_near(got.sum(0), torch.ones(SIZE), 1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"iterations": 3},
        {"sxy_gaussian": 1.5, "sxy_bilateral": 20, "srgb": 30},
        {"sxy_gaussian": (1.5, 4), "sxy_bilateral": [20, 50], "srgb": (30, 10, 60)},
        {"sxy_gaussian": (1.5,), "srgb": np.array([30.0, 10, 60])},
        {"normalization": "after"},
        {"normalization": "before"},
        {"normalization": "none", "compat_gaussian": 0.1, "compat_bilateral": 0.2},
        {"compat_gaussian": None},
        {"compat_bilateral": None},
        {"compat_gaussian": -1, "compat_bilateral": 0},
        {"compat_gaussian": [-1, -2, -3], "compat_bilateral": np.array([-1.0, 0, 1])},
        {"compat_bilateral": [[0, 1, 2], [3, 0, 4], [5, 6, 0]]},
        {"compat_gaussian": None, "compat_bilateral": None},
        {"log": True},
    ],
    ids=str,
)
def test_parameters(changes, device):
    img, probs = random_image(*SIZE, 3), probabilities(3, *SIZE)
    got = dense_crf(channels_first(img).to(device), torch.from_numpy(probs).to(device), **changes)
    assert_near(got, oracle(img[None], probs[None], **changes)[0])


def test_sxy_is_in_the_order_x_y(device):
    # Smoothing along x only: it spreads within a row, and not within a column.
    probs = torch.full((2, 16, 16), 0.5, dtype=torch.float64, device=device)
    probs[0, 8, :8], probs[1, 8, :8] = 0.99, 0.01
    got = dense_crf(None, probs, sxy_gaussian=(5, 0.2), compat_bilateral=None)
    assert float(got[0, 8, 9]) > 0.6
    assert_near(got[0, 4], torch.full((16,), 0.5), 1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 14])
def test_any_number_of_channels(channels, device):
    img, probs = random_image(*SIZE, channels), probabilities(3, *SIZE)
    srgb = tuple(np.linspace(20, 90, channels))
    want = oracle(img[None], probs[None], srgb=srgb)[0]
    assert_near(
        dense_crf(channels_first(img).to(device), torch.from_numpy(probs).to(device), srgb=srgb),
        want,
    )
    assert_near(dense_crf(img, probs, srgb=srgb), want)
    if channels == 1:
        assert_near(dense_crf(img[..., 0], probs, srgb=srgb), want)
        assert_near(dense_crf(img[..., 0], probs, srgb=20), want)


@pytest.mark.parametrize("batch", [1, 3])
def test_batches(batch, device):
    img, probs = random_image(batch, *SIZE, 3), probabilities(batch, 4, *SIZE, axis=1)
    want = oracle(img, probs)
    x, p = channels_first(img).to(device), torch.from_numpy(probs).to(device)
    whole = dense_crf(x, p)
    assert_near(whole, want)
    for b in range(batch):
        assert torch.equal(whole[b], dense_crf(x[b], p[b]))
    assert_near(dense_crf(img, probs), want)
    if batch == 1:
        assert torch.equal(dense_crf(x[0], p), whole)
        assert_near(dense_crf(img[0], probs), want)


def test_volumes(device):
    img, probs = random_image(2, 4, 5, 6, 2), probabilities(2, 3, 4, 5, 6, axis=1)
    changes = {"sxy_gaussian": (1, 2, 3), "sxy_bilateral": (10, 20, 30), "srgb": (20, 40)}
    want = oracle(img, probs, **changes)
    x, p = channels_first(img).to(device), torch.from_numpy(probs).to(device)
    assert_near(dense_crf(x, p, **changes), want)
    assert_near(dense_crf(img, probs, **changes), want)
    # A volume without the batch axis, and one without the channel axis.
    assert_near(dense_crf(img[0], probs[:1], **changes), want[:1])
    grey = {"sxy_bilateral": (10, 20, 30), "srgb": 20}
    want = oracle(img[:1, ..., :1], probs[:1], **grey)
    assert_near(dense_crf(img[0, ..., 0], probs[:1], **grey), want)


def test_probs_logits_and_unary_agree(device):
    img, probs = channels_first(random_image(*SIZE, 3)).to(device), probabilities(4, *SIZE)
    probs = torch.from_numpy(probs).to(device)
    want = dense_crf(img, probs)
    assert torch.equal(dense_crf(img, probs=probs), want)
    assert_near(dense_crf(img, logits=probs.log()), want, 1e-12)
    assert_near(dense_crf(img, unary=-probs.log()), want, 1e-12)
    # Only differences of logits and ratios of probabilities at a pixel matter.
    shift = torch.randn(SIZE, dtype=torch.float64, device=device)
    assert_near(dense_crf(img, logits=probs.log() + shift), want, 1e-12)
    assert_near(dense_crf(img, unary=shift - probs.log()), want, 1e-12)
    assert_near(dense_crf(img, probs * torch.rand(SIZE).to(probs)), want, 1e-12)


def test_probabilities_are_clamped_from_below(device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    probs = torch.zeros(3, *SIZE, dtype=torch.float64, device=device)
    probs[1] = 1
    low = probs.clamp(min=1e-5)
    assert torch.equal(dense_crf(img, probs), dense_crf(img, low))
    want = torch.full_like(probs, 1e-5)
    want[1] = 1
    assert_near(dense_crf(img, probs, iterations=0), want / want.sum(0), 1e-12)


def test_log_probabilities(device):
    img, probs = channels_first(random_image(*SIZE, 3)).to(device), probabilities(4, *SIZE)
    probs = torch.from_numpy(probs).to(device)
    logs = dense_crf(img, probs, log=True)
    assert_near(logs.exp(), dense_crf(img, probs), 1e-13)
    # Finite where the probability underflows to 0 in float32.
    sure = torch.zeros(2, *SIZE, device=device)
    sure[0], sure[1] = 200.0, -200.0
    logs = dense_crf(img, logits=sure, log=True)
    assert bool((dense_crf(img, logits=sure)[1] == 0).all())
    assert bool((logs[1] < -300).all() & logs.isfinite().all())


def test_without_iterations(device):
    img, logits = channels_first(random_image(*SIZE, 3)).to(device), torch.randn(4, *SIZE)
    got = dense_crf(img, logits=logits.to(device), iterations=0)
    assert_near(got, logits.softmax(0), 1e-6)


@pytest.mark.parametrize("kind", ["probs", "logits", "unary"])
def test_one_class(kind, device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    for dtype in (torch.float16, torch.float32, torch.float64):
        scores = torch.rand(1, *SIZE).to(device, dtype)
        wide = scores.float() if dtype == torch.float16 else scores
        background = 1 - wide if kind == "probs" else torch.zeros_like(wide)
        both = torch.cat([background, wide])
        for log in (False, True):
            want = dense_crf(img, **{kind: both}, log=log)[1:].to(dtype)
            assert torch.equal(dense_crf(img, **{kind: scores}, log=log), want)


def test_one_pixel(device):
    img, probs = torch.full((3, 1, 1), 7, dtype=torch.uint8), torch.tensor([0.2, 0.8])
    probs = probs.view(2, 1, 1).double()
    want = oracle(np.full((1, 1, 1, 3), 7), probs[None].numpy())[0]
    assert_near(dense_crf(img.to(device), probs.to(device)), want)


def test_hard_labels(device):
    labels = torch.randint(0, 4, SIZE)
    img = random_image(*SIZE, 3)
    probs = probs_from_labels(labels.to(device), 4, gt_prob=0.6, ignore_index=3)
    got = dense_crf(channels_first(img).to(device), probs)
    want = oracle(img[None], probs[None].cpu().numpy())[0]
    assert got.dtype == torch.float32
    assert_near(got, want, 1e-4)


# --- pairwise terms ---


def built_in_terms(
    img: torch.Tensor, dtype: torch.dtype, compat: Any = (3, 10)
) -> tuple[PairwiseTerm, PairwiseTerm]:
    """The terms that dense_crf builds itself, for an image (n, H, W).

    Computed on the CPU: on CUDA torch replaces a division by a number with a multiplication.
    """
    height, width = img.shape[1:]
    x = torch.arange(width, dtype=dtype).expand(height, width)
    y = torch.arange(height, dtype=dtype).view(-1, 1).expand(height, width)
    place = torch.stack([x, y])
    features = place / 3, torch.cat([place / 80, img.cpu().to(dtype) / 13])
    first, second = (f.to(img.device) for f in features)
    return PairwiseTerm(first, compat[0]), PairwiseTerm(second, compat[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explicit_terms_equal_the_built_in_ones(dtype, device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    probs = torch.from_numpy(probabilities(4, *SIZE)).to(device, dtype)
    want = dense_crf(img, probs)
    off = {"compat_gaussian": None, "compat_bilateral": None}
    terms = built_in_terms(img, dtype)
    assert torch.equal(dense_crf(None, probs, pairwise=terms, **off), want)
    assert torch.equal(dense_crf(img, probs, pairwise=list(terms), **off), want)
    swapped = dense_crf(None, probs, pairwise=terms[::-1], **off)
    assert_near(swapped, want, 1e-5 if dtype == torch.float32 else 1e-12)
    one = dense_crf(None, probs, compat_bilateral=None, pairwise=terms[1:])
    assert torch.equal(one, want)
    assert not torch.equal(dense_crf(None, probs, compat_bilateral=None), want)


def test_normalization_of_terms(device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    probs = torch.from_numpy(probabilities(4, *SIZE)).to(device)
    off = {"compat_gaussian": None, "compat_bilateral": None}
    terms = built_in_terms(img, torch.float64)
    after = [PairwiseTerm(t.features, t.compat, "after") for t in terms]
    want = dense_crf(img, probs, normalization="after")
    assert torch.equal(dense_crf(None, probs, pairwise=after, **off), want)
    assert torch.equal(dense_crf(None, probs, pairwise=terms, normalization="after", **off), want)
    mixed = dense_crf(img, probs, compat_bilateral=None, pairwise=after[1:])
    assert not torch.equal(mixed, want)
    assert not torch.equal(mixed, dense_crf(img, probs))


def test_batched_terms(device):
    img = channels_first(random_image(2, *SIZE, 3)).to(device)
    probs = torch.from_numpy(probabilities(2, 4, *SIZE, axis=1)).to(device)
    features = torch.randn(2, 16, *SIZE, device=device)
    got = dense_crf(img, probs, pairwise=[PairwiseTerm(features, [-1.0, -2, -3, -4])])
    for b in range(2):
        term = PairwiseTerm(features[b], torch.tensor([-1.0, -2, -3, -4], device=device))
        assert torch.equal(got[b], dense_crf(img[b], probs[b], pairwise=[term]))
    assert float((got - dense_crf(img, probs)).abs().max()) > 1e-3


def test_term_is_immutable_and_can_be_pickled():
    term = PairwiseTerm(torch.zeros(2, 3, 4), 3.0)
    again = pickle.loads(pickle.dumps(term))
    assert again.compat == 3.0
    assert again.normalization is None
    with pytest.raises(AttributeError):
        term.compat = 4.0


# --- types, dtypes, layouts ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_dtypes(dtype, device):
    img, probs = channels_first(random_image(*SIZE, 3)).to(device), probabilities(4, *SIZE)
    probs = torch.from_numpy(probs).to(device, dtype)
    got = dense_crf(img, probs)
    assert got.dtype == dtype
    assert got.device == probs.device
    if dtype != torch.float64:
        assert torch.equal(got, dense_crf(img, probs.float()).to(dtype))


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ],
)
def test_image_dtypes(dtype, device):
    img = torch.randint(0, 128, (3, *SIZE))
    probs = torch.from_numpy(probabilities(4, *SIZE)).to(device)
    want = dense_crf(img.double().to(device), probs)
    assert torch.equal(dense_crf(img.to(dtype).to(device), probs), want)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8"])
def test_numpy_dtypes(dtype):
    img, probs = random_image(*SIZE, 3), probabilities(4, *SIZE).astype(dtype)
    got = dense_crf(img, probs)
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.dtype(dtype)
    native = torch.from_numpy(probs.astype(np.dtype(dtype).newbyteorder("=")))
    assert np.array_equal(got, dense_crf(channels_first(img), native).numpy())


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f2", "f4", "f8", ">i2", ">f4"]
)
def test_numpy_image_dtypes(dtype):
    img, probs = random_image(*SIZE, 3) // 2, probabilities(4, *SIZE)
    assert np.array_equal(dense_crf(img.astype(dtype), probs), dense_crf(img, probs))


def test_numpy_and_torch_agree():
    img, probs = random_image(*SIZE, 3), probabilities(4, *SIZE).astype(np.float32)
    want = dense_crf(channels_first(img), torch.from_numpy(probs))
    assert np.array_equal(dense_crf(img, probs), want.numpy())
    # All combinations of image and score types.
    assert torch.equal(dense_crf(img, torch.from_numpy(probs)), want)
    assert np.array_equal(dense_crf(channels_first(img), probs), want.numpy())
    assert np.array_equal(
        dense_crf(img, logits=np.log(probs)),
        dense_crf(channels_first(img), logits=torch.from_numpy(np.log(probs))).numpy(),
    )


@pytest.mark.gpu
def test_numpy_image_is_moved_to_the_scores_device():
    img, probs = random_image(*SIZE, 3), torch.from_numpy(probabilities(4, *SIZE)).cuda()
    got = dense_crf(img, probs)
    assert got.device == probs.device
    assert torch.equal(got, dense_crf(channels_first(img).cuda(), probs))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16", "I", "F"])
def test_pil_images(mode):
    channels = {"RGB": 3, "RGBA": 4}.get(mode, 1)
    array = random_image(*SIZE, channels) if channels > 1 else random_image(*SIZE)
    array = array.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode, np.uint8))
    image, probs = Image.fromarray(array), probabilities(4, *SIZE)
    assert image.mode == mode
    assert np.array_equal(dense_crf(image, probs), dense_crf(array, probs))
    tensor = torch.from_numpy(probs)
    assert np.array_equal(dense_crf(image, tensor).numpy(), dense_crf(array, probs))


def test_pil_palette_images_use_their_colours():
    image = Image.fromarray(random_image(*SIZE, 3)).quantize(16)
    probs = probabilities(4, *SIZE)
    assert image.mode == "P"
    want = dense_crf(np.asarray(image.convert("RGB")), probs)
    assert np.array_equal(dense_crf(image, probs), want)


def views(array: np.ndarray) -> Iterator[np.ndarray]:
    """The same values in other layouts."""
    yield np.asfortranarray(array)
    yield array[::-1].copy()[::-1]
    yield array[:, ::-1].copy()[:, ::-1]
    yield np.repeat(array, 2, axis=1)[:, ::2]
    readonly = array.copy()
    readonly.flags.writeable = False
    yield readonly
    backwards = array[..., ::-1].copy()[..., ::-1]
    backwards.flags.writeable = False
    yield backwards


def test_numpy_layouts():
    img, probs = random_image(*SIZE, 3), probabilities(4, *SIZE)
    want = dense_crf(img, probs)
    for view in views(img):
        kept = view.copy()
        assert np.array_equal(dense_crf(view, probs), want)
        assert np.array_equal(view, kept)
    for view in views(probs):
        kept = view.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = dense_crf(img, view)
        assert np.array_equal(got, want)
        assert got.flags.writeable
        assert not np.shares_memory(got, view)
        assert np.array_equal(view, kept)
    fortran = dense_crf(img, np.asfortranarray(probs))
    assert fortran.strides == np.empty_like(np.asfortranarray(probs)).strides


def test_torch_layouts(device):
    img = channels_first(random_image(2, *SIZE, 3)).to(device)
    probs = torch.from_numpy(probabilities(2, 4, *SIZE, axis=1)).to(device)
    want = dense_crf(img, probs)
    wide = torch.full((2, 8, 9, 23), float("nan"), dtype=torch.float64, device=device)
    wide[:, ::2, :, 1::2] = probs
    for view in (
        probs.contiguous(memory_format=torch.channels_last),
        probs.transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, ::2, :, 1::2],
    ):
        kept = view.clone()
        got = dense_crf(img.contiguous(memory_format=torch.channels_last), view)
        assert torch.equal(got, want)
        assert got.stride() == torch.empty_like(view).stride()
        assert torch.equal(view, kept)
    expanded = probs[:, :1].expand(-1, 4, -1, -1)
    assert torch.equal(dense_crf(img, expanded), dense_crf(img, expanded.clone()))


def test_inputs_are_not_changed(device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    probs = torch.from_numpy(probabilities(4, *SIZE)).to(device)
    matrix = torch.randn(4, 4, dtype=torch.float64, device=device)
    features = torch.randn(2, *SIZE, dtype=torch.float64, device=device)
    sigma = torch.tensor([3.0, 4.0], device=device)
    given = [img, probs, matrix, features, sigma]
    kept = [t.clone() for t in given]
    versions = [t._version for t in given]
    term = PairwiseTerm(features, matrix)
    dense_crf(img, probs, compat_bilateral=matrix, sxy_bilateral=sigma, pairwise=[term])
    with raises_in_call("use a larger sigma"):
        dense_crf(img, probs, compat_bilateral=matrix, srgb=1e-7, pairwise=[term])
    with pytest.raises(ValueError, match="compat_gaussian"):
        dense_crf(img, probs, compat_bilateral=matrix, compat_gaussian=[1, 2], pairwise=[term])
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert [t._version for t in given] == versions


# --- the warning for images from 0 to 1 ---


@pytest.mark.parametrize("make", [lambda a: a, lambda a: Image.fromarray(a[..., 0])])
def test_unit_range_image_warns(make):
    img, probs = random_image(*SIZE, 3).astype(np.float32) / 255, probabilities(4, *SIZE)
    with pytest.warns(UserWarning, match=r"from 0 to 1 and srgb is 13.*13/255") as caught:
        dense_crf(make(img), probs)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="from 0 to 1"):
        dense_crf(make(img), torch.from_numpy(probs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_unit_range_tensor_warns(dtype):
    img, probs = torch.rand(1, 3, *SIZE, dtype=dtype), torch.rand(1, 4, *SIZE)
    with pytest.warns(UserWarning, match=r"from 0 to 1 and srgb is 13.*13/255") as caught:
        dense_crf(img, probs)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"from -3.25 to 3.25 and srgb is 13.*before its normali"):
        dense_crf(img * 4 - 2, probs)


def test_no_warning():
    img, probs = random_image(*SIZE, 3).astype(np.float32) / 255, probabilities(4, *SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense_crf(img, probs, srgb=13 / 255)
        dense_crf(img, probs, srgb=(13, 13, 0.05))
        dense_crf(img * 255, probs)
        dense_crf(img - 0.5, probs, srgb=0.5)
        dense_crf(img * 4, probs)
        dense_crf(np.full_like(img, 0.5), probs)  # without edges at any srgb
        dense_crf(random_image(*SIZE, 3) // 255, probs)  # integers
        dense_crf(channels_first(img * 255), torch.from_numpy(probs))
        dense_crf(img, probs, compat_bilateral=None)


def test_unit_range_with_scaled_sigma_agrees(device):
    img, probs = random_image(*SIZE, 3), torch.from_numpy(probabilities(4, *SIZE)).to(device)
    want = dense_crf(channels_first(img).to(device), probs)
    unit = channels_first(img.astype(np.float64) / 255).to(device)
    assert_near(dense_crf(unit, probs, srgb=13 / 255), want, 1e-6)


# --- default device and dtype, threads ---


def test_default_device_and_dtype_do_not_matter(device):
    img, probs = random_image(*SIZE, 3), torch.from_numpy(probabilities(4, *SIZE)).to(device)
    values, features = torch.randn(1, 2, 30).to(device), torch.randn(1, 3, 30).to(device)

    def results() -> list[torch.Tensor]:
        leaf = probs.clone().requires_grad_()
        out = dense_crf(channels_first(img).to(device), leaf, compat_bilateral=[1, 2, 3, 4])
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        by_numpy = torch.from_numpy(dense_crf(img, probs.cpu().numpy(), srgb=(1, 2, 3)))
        return [out, grad, by_numpy, permutohedral_filter(values, features, "symmetric")]

    want = results()
    with torch.device("meta"):
        got = results()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    torch.set_default_dtype(torch.float64)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_calls_from_several_threads(device):
    images = [channels_first(random_image(20, 30, 3, seed=i)).to(device) for i in range(8)]
    probs = [torch.rand(4, 20, 30).softmax(0).to(device) for _ in images]
    call = functools.partial(dense_crf, iterations=3)
    want = [call(i, p) for i, p in zip(images, probs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(call, images, probs))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- gradients ---


def test_gradcheck(device):
    logits = torch.randn(3, 3, 4, dtype=torch.float64)
    img = 255 * torch.rand(2, 3, 4, dtype=torch.float64)
    leaves = [
        *(logits, img),
        torch.tensor(2.3, dtype=torch.float64),  # sxy_gaussian
        torch.tensor([21.0, 33.0], dtype=torch.float64),  # sxy_bilateral
        torch.tensor([60.0, 90.0], dtype=torch.float64),  # srgb
        torch.tensor(1.5, dtype=torch.float64),  # compat_gaussian
        torch.randn(3, 3, dtype=torch.float64),  # compat_bilateral
        torch.randn(1, 3, 4, dtype=torch.float64),  # features of a term
        torch.randn(3, dtype=torch.float64),  # compat of that term
    ]
    leaves = [t.to(device).requires_grad_() for t in leaves]

    def call(logits, img, sxy_gaussian, sxy_bilateral, srgb, gaussian, bilateral, own, compat):
        return dense_crf(
            img,
            logits=logits,
            iterations=2,
            sxy_gaussian=sxy_gaussian,
            sxy_bilateral=sxy_bilateral,
            srgb=srgb,
            compat_gaussian=gaussian,
            compat_bilateral=bilateral,
            pairwise=[PairwiseTerm(own, compat, "after")],
        )

    assert torch.autograd.gradcheck(call, leaves, eps=1e-7, atol=1e-6)
    grads = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    assert all(float(g.abs().max()) > 1e-9 for g in grads)


@pytest.mark.parametrize("kind", ["probs", "unary"])
def test_gradcheck_of_scores(kind, device):
    img = channels_first(random_image(3, 4, 3)).to(device)
    scores = torch.from_numpy(probabilities(3, 3, 4)).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: dense_crf(img, **{kind: s}, log=True), scores)


def test_gradient_of_a_channels_last_batch(device):
    img = channels_first(random_image(2, *SIZE, 3)).to(device)
    logits = torch.randn(2, 4, *SIZE, dtype=torch.float64, device=device).requires_grad_()
    (want,) = torch.autograd.grad(dense_crf(img, logits=logits)[:, 1].sum(), logits)
    other = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    (got,) = torch.autograd.grad(dense_crf(img, logits=other)[:, 1].sum(), other)
    assert torch.equal(got, want)


def test_half_precision_gradients(device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    logits = torch.randn(4, *SIZE, device=device).half().requires_grad_()
    full = logits.detach().float().requires_grad_()
    for leaf in (logits, full):
        dense_crf(img, logits=leaf, log=True)[1].float().sum().backward()
    assert logits.grad.dtype == torch.float16
    assert torch.equal(logits.grad, full.grad.half())


@pytest.mark.parametrize("changed", ["logits", "compat", "features"])
def test_in_place_change_before_backward_raises(changed, device):
    tensors = {
        "logits": torch.randn(3, *SIZE, device=device),
        "compat": torch.randn(3, 3, device=device),
        "features": torch.randn(2, *SIZE, device=device),
    }
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    term = PairwiseTerm(tensors["features"], tensors["compat"])
    out = dense_crf(None, logits=tensors["logits"], compat_bilateral=None, pairwise=[term])
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


def test_gradient_only_through_tensors(device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    assert not dense_crf(img, logits=torch.randn(4, *SIZE, device=device)).requires_grad
    sigma = torch.tensor(3.0, device=device, requires_grad=True)
    out = dense_crf(img, logits=torch.randn(4, *SIZE, device=device), sxy_gaussian=sigma)
    out.square().sum().backward()
    assert float(sigma.grad.abs()) > 0


# --- torch.compile ---


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.compiles])],
)
def test_compiles_to_one_graph(backend, device):
    torch.compiler.reset()

    def call(img, logits, compat):
        out = dense_crf(img, logits=2 * logits, compat_bilateral=compat, log=True, iterations=3)
        return out.square().mean()

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for size in (SIZE, (6, 5)):
        img = channels_first(random_image(2, *size, 3)).to(device)
        logits = torch.randn(2, 4, *size, device=device).requires_grad_()
        compat = torch.randn(4, 4, device=device).requires_grad_()
        results = []
        for f in (call, compiled):
            loss = f(img, logits, compat)
            results.append([loss, *torch.autograd.grad(loss, (logits, compat))])
        for a, b in zip(*results, strict=True):
            assert_near(b, a, 1e-5 * max(1.0, float(a.detach().abs().max())))


def test_exports(device):
    class Refine(torch.nn.Module):
        def forward(self, img, logits):
            return dense_crf(img, logits=logits, iterations=2)

    arguments = (
        channels_first(random_image(2, *SIZE, 3)).to(device),
        torch.randn(2, 4, *SIZE, device=device),
    )
    program = torch.export.export(Refine(), arguments)
    assert "segkernels.dense_crf" in str(program.graph)
    assert torch.equal(program.module()(*arguments), Refine()(*arguments))


# --- invalid values ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_image(bad, device):
    img, probs = torch.rand(3, *SIZE) * 255, torch.from_numpy(probabilities(4, *SIZE))
    img[1, 2, 3] = bad
    message = r"dense_crf: features must be finite, got NaN or infinity \(in the image"
    on_cpu = rf"dense_crf: img must be finite, got {bad} at "
    with raises_in_call(message if _native.on_cuda(device) else on_cpu + r"\[1, 2, 3\]"):
        dense_crf(img.to(device), probs.to(device))
    if not _native.on_cuda(device):
        with raises_in_call(on_cpu + r"\[2, 3, 1\]"):
            dense_crf(img.permute(1, 2, 0).numpy(), probs.numpy())
    # The Gaussian term does not use the image.
    assert bool(dense_crf(img.to(device), probs.to(device), compat_bilateral=None).isfinite().all())


@pytest.mark.parametrize("kind", ["probs", "logits", "unary"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores(bad, kind, device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    for dtype in (torch.float16, torch.float32, torch.float64):
        scores = torch.rand(4, *SIZE).to(device, dtype)
        scores[3, 8, 10] = bad
        if bad == {"logits": -float("inf"), "unary": float("inf")}.get(kind):
            assert float(dense_crf(img, **{kind: scores})[3, 8, 10]) == 0
            continue
        message = "must be (finite, got NaN or infinity|from 0 to 1)"
        if not _native.on_cuda(device):
            message = rf"{kind} must be (finite|from 0 to 1).*, got {bad} at \[3, 8, 10\]"
        with raises_in_call(message):
            dense_crf(img, **{kind: scores})


@pytest.mark.parametrize(
    ("name", "sigma"), [("srgb", 1e-5), ("sxy_gaussian", 5e-7), ("sxy_bilateral", 5e-7)]
)
def test_sigma_too_small_for_exact_coordinates(name, sigma, device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    probs = torch.from_numpy(probabilities(4, *SIZE)).to(device)
    message = "lattice coordinates in float32, .* use a larger sigma, or float64"
    with raises_in_call(message):
        dense_crf(img, probs.float(), **{name: sigma})
    # float64 still represents the coordinates, up to a smaller sigma.
    changes = {name: sigma}
    want = oracle(img.permute(1, 2, 0).cpu().numpy()[None], probs[None].cpu().numpy(), **changes)
    assert_near(dense_crf(img, probs, **changes), want[0], 1e-6)
    with raises_in_call("lattice coordinates in float64, .* use a larger sigma$"):
        dense_crf(img, probs, **{name: 1e-12})


def test_max_vertices(device):
    img = channels_first(random_image(*SIZE, 3)).to(device)
    probs = torch.from_numpy(probabilities(4, *SIZE)).to(device)
    want = dense_crf(img, probs)
    assert torch.equal(dense_crf(img, probs, max_vertices=10**6), want)
    with raises_in_call("dense_crf: max_vertices must be at least the number of lattice vertices"):
        dense_crf(img, probs, max_vertices=5)


# --- invalid arguments ---

IMG = torch.zeros(3, 4, 5)
PROBS = torch.full((2, 4, 5), 0.5)
TERM = PairwiseTerm(torch.zeros(2, 4, 5), 1.0)


def call(img: Any = IMG, probs: Any = PROBS, **changes: Any) -> Callable[[], object]:
    return lambda: dense_crf(img, probs, **changes)


def invalid_calls() -> Iterator[tuple[str, type[Exception], str, Callable[[], object]]]:
    one = r"exactly one of probs, logits and unary must be given, got "
    yield "no scores", ValueError, one + "none", call(probs=None)
    yield "two scores", ValueError, one + r"\['probs', 'logits'\]", call(logits=PROBS)
    yield (
        "three",
        ValueError,
        one + r"\['probs', 'logits', 'unary'\]",
        call(logits=PROBS, unary=PROBS),
    )
    for bad in (-1, 2.0, True, None, "5"):
        match = rf"iterations must be an int of 0 or more, got {bad!r}"
        yield f"iterations={bad!r}", ValueError, match, call(iterations=bad)
    match = "normalization must be one of 'symmetric', 'before', 'after', 'none', got 'sym'"
    yield "normalization", ValueError, match, call(normalization="sym")
    term = PairwiseTerm(TERM.features, 1.0, "sym")
    yield "a term's normalization", ValueError, match, call(pairwise=[term])

    for bad in (torch.int64, torch.bool, torch.complex64, torch.uint8):
        match = f"probs must be float16, bfloat16, float32 or float64, got {bad}"
        yield f"{bad} probs", TypeError, match, call(probs=PROBS.to(bad))
    yield "labels", TypeError, "see segkernels.probs_from_labels", call(probs=PROBS.long())
    for bad in ("i8", "u1", "?", "c8", "O", "S1", np.longdouble):
        match = f"logits must be float16, bfloat16, float32 or float64, got {np.dtype(bad)}"
        scores = np.zeros((2, 4, 5), bad)
        yield f"numpy {bad} logits", TypeError, match, call(probs=None, logits=scores)
    match = "unary must be a torch tensor or a numpy array, got list"
    yield "a list", TypeError, match, call(probs=None, unary=[[[0.5]]])

    for shape in ((), (2,), (1, 1, 2, 3, 4, 5)):
        match = r"probs must be \(C, H, W\), \(B, C, H, W\) or .*, got shape " + re.escape(
            str(shape)
        )
        yield f"probs {shape}", ValueError, match, call(probs=torch.zeros(shape))
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0), (0, 2, 4, 5), (1, 2, 0, 4, 5)):
        match = "probs must not be empty, got shape " + re.escape(str(shape))
        yield f"probs {shape}", ValueError, match, call(probs=torch.zeros(shape))
        yield f"numpy {shape}", ValueError, match, call(probs=np.zeros(shape))

    for shape in ((3, 5, 4), (4, 5), (4, 5, 3), (0, 4, 5), (2, 3, 4, 5), (3, 4, 6), (3,), ()):
        match = (
            r"img \(channels first\) must match the scores' batch and spatial sizes \(1, 4, 5\), "
            "got shape " + re.escape(str(shape))
        )
        yield f"torch image {shape}", ValueError, match, call(img=torch.zeros(shape))
    for shape in ((3, 4, 5), (5, 4), (4, 5, 0), (2, 4, 5, 3), (4, 6, 3), (5,), ()):
        match = (
            r"img \(channels last\) must match the scores' batch and spatial sizes \(1, 4, 5\), "
            "got shape " + re.escape(str(shape))
        )
        yield f"numpy image {shape}", ValueError, match, call(img=np.zeros(shape, np.uint8))
    small = Image.new("RGB", (4, 5))
    yield "PIL image", ValueError, r"img \(channels last\) must match", call(img=small)
    batch = torch.full((3, 2, 4, 5), 0.5)
    yield "batches", ValueError, r"sizes \(3, 4, 5\)", call(torch.zeros(2, 3, 4, 5), batch)
    yield "one image for three", ValueError, r"sizes \(3, 4, 5\)", call(probs=batch)
    volume = torch.full((1, 2, 3, 4, 5), 0.5)
    match = r"sizes \(1, 3, 4, 5\), got shape \(1, 3, 5, 4\)"
    yield "volume", ValueError, match, call(torch.zeros(1, 3, 5, 4), volume)
    match = "img must be given unless compat_bilateral is None, got None"
    yield "no image", ValueError, match, call(img=None)
    for bad in (torch.bool, torch.complex64):
        match = f"img must hold integers or floats, got {bad}"
        yield f"{bad} image", TypeError, match, call(img=IMG.to(bad))
    for bad in ("?", "c8", "U1", "O", np.longdouble):
        match = "img must be a torch tensor, a numpy array or a PIL image of integers or floats"
        yield f"numpy {bad} image", TypeError, match, call(img=np.zeros((4, 5, 3), bad))
    yield "text", TypeError, "img must be .* got str", call(img="image.png")
    yield "black and white", TypeError, "img must be .*bool", call(img=Image.new("1", (5, 4)))

    for name, count in (("sxy_gaussian", 2), ("sxy_bilateral", 2), ("srgb", 3)):
        for bad in (0, -1, 0.0, -3.5, float("nan"), float("inf")):
            match = f"{name} must be positive and finite, got {bad!r}"
            yield f"{name}={bad}", ValueError, match, call(**{name: bad})
        good = [3.0] * (count - 1)
        match = f"{name} must be positive and finite, got 0"
        yield f"{name} with a 0", ValueError, match, call(**{name: [*good, 0]})
        zero = torch.tensor([*good, 0.0])
        yield f"{name} tensor with a 0", ValueError, match, call(**{name: zero})
        match = f"{name} must be a number or {count} numbers, got "
        yield f"{name} too long", ValueError, match + "4", call(**{name: [1, 2, 3, 4]})
        yield f"{name} empty", ValueError, match + "0", call(**{name: ()})
        tensor = torch.ones(4)
        yield f"{name} tensor too long", ValueError, match, call(**{name: tensor})
        tensor = torch.ones(1, count)
        yield f"{name} matrix", ValueError, match, call(**{name: tensor})
    yield (
        "sxy of a plane for a volume",
        ValueError,
        "must be a number or 3 numbers, got 2",
        call(torch.zeros(1, 3, 3, 4, 5), volume, sxy_gaussian=(3, 3)),
    )

    for name in ("compat_gaussian", "compat_bilateral"):
        for shape in ((1,), (3,), (3, 3), (2, 3), (1, 1), (2, 2, 2)):
            match = (
                f"{name} must be a number, a vector of 2 or a matrix of 2 x 2, got shape "
                + re.escape(str(shape))
            )
            yield f"{name} {shape}", ValueError, match, call(**{name: torch.ones(shape)})
            yield f"numpy {name} {shape}", ValueError, match, call(**{name: np.ones(shape)})
        for bad in (float("nan"), float("inf")):
            match = f"{name} must be finite, got "
            yield f"{name}={bad}", ValueError, match, call(**{name: bad})
            yield f"{name} with {bad}", ValueError, match, call(**{name: [1.0, bad]})
            yield f"{name} tensor with {bad}", ValueError, match, call(**{name: torch.tensor(bad)})

    match = "at most 8 pairwise terms, got 9"
    yield "nine terms", ValueError, match, call(pairwise=[TERM] * 7)
    off = {"compat_gaussian": None, "compat_bilateral": None}
    yield "nine of them", ValueError, match, call(img=None, pairwise=[TERM] * 9, **off)
    match = "a term must have at most 16 features, got 17"
    yield "15 channels", ValueError, match, call(img=torch.zeros(15, 4, 5))
    term = PairwiseTerm(torch.zeros(17, 4, 5), 1.0)
    yield "17 features", ValueError, match, call(pairwise=[term])
    for shape in ((2, 4), (2, 5, 4), (0, 4, 5), (2, 2, 4, 5), (2, 4, 5, 1)):
        term = PairwiseTerm(torch.zeros(shape), 1.0)
        match = r"pairwise\[1\].features must be \(B, d, \*spatial\).*got shape " + re.escape(
            str(shape)
        )
        yield f"features {shape}", ValueError, match, call(pairwise=[TERM, term])
    for bad in (torch.zeros(2, 4, 5, dtype=torch.int64), np.zeros((2, 4, 5), int), None):
        match = r"pairwise\[0\].features must be a torch tensor or a numpy array of floats, got"
        term = PairwiseTerm(bad, 1.0)
        yield f"features {type(bad)}", TypeError, match, call(pairwise=[term])
    match = r"pairwise\[0\].compat must be a number, a vector of 2"
    yield (
        "a term's compat",
        ValueError,
        match,
        call(pairwise=[PairwiseTerm(TERM.features, [1.0, 2, 3])]),
    )
    match = "max_vertices must be a positive int, got "
    for bad in (0, -1):
        yield f"max_vertices={bad}", ValueError, match + str(bad), call(max_vertices=bad)


INVALID = list(invalid_calls())


@pytest.mark.parametrize(
    ("error", "match", "make"), [r[1:] for r in INVALID], ids=[r[0] for r in INVALID]
)
def test_invalid_arguments(error, match, make):
    with pytest.raises(error, match=f"^dense_crf: .*{match}"):
        make()


def test_unchanged_arguments_of_the_invalid_calls():
    assert bool(call()().isfinite().all())
    assert bool(call(pairwise=[TERM] * 6)().isfinite().all())
    assert bool(call(img=torch.zeros(14, 4, 5))().isfinite().all())


def test_image_on_another_device_raises():
    meta = torch.zeros(2, 4, 5, device="meta")
    with pytest.raises(ValueError, match="img must be on meta, as the scores are, got cpu"):
        dense_crf(torch.zeros(3, 4, 5), meta)


def different_devices() -> Iterator[tuple[str, str, dict[str, Any]]]:
    other, tells = {"device": "meta"}, "must be on cpu, as the scores are, got meta"
    yield (
        "img",
        rf"img {tells}",
        {"img": torch.zeros(3, 4, 5, **other)},
    )
    for name in ("sxy_gaussian", "sxy_bilateral"):
        yield (
            name,
            rf"{name} {tells}",
            {name: torch.ones(2, **other)},
        )
    yield (
        "srgb",
        f"srgb {tells}",
        {"srgb": torch.ones(3, **other)},
    )
    for name in ("compat_gaussian", "compat_bilateral"):
        yield (
            name,
            rf"{name} {tells}",
            {name: torch.ones(2, **other)},
        )
    term = PairwiseTerm(torch.zeros(2, 4, 5, **other), 1.0)
    yield "features", rf"pairwise\[0\].features {tells}", {"pairwise": [term]}


@pytest.mark.parametrize(
    ("match", "changes"),
    [e[1:] for e in different_devices()],
    ids=[e[0] for e in different_devices()],
)
def test_different_devices_raise(match, changes):
    with pytest.raises(ValueError, match=f"^dense_crf: {match}"):
        call(**changes)()


@pytest.mark.parametrize(
    "number", [np.float32(7), np.float64(7), np.int64(7), np.uint8(7), torch.tensor(7)]
)
def test_any_type_of_number(number):
    changes = dict.fromkeys(
        ("sxy_gaussian", "sxy_bilateral", "srgb", "compat_gaussian", "compat_bilateral"), number
    )
    img, probs = random_image(*SIZE, 3), probabilities(3, *SIZE)
    want = dense_crf(img, probs, **dict.fromkeys(changes, 7))
    assert np.array_equal(dense_crf(img, probs, **changes), want)


@pytest.mark.parametrize("spatial", [(7, 9), (3, 4, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, *_dtypes.FLOATING])
@pytest.mark.parametrize("computed", [torch.float32, torch.float64])
def test_features_equal_torchs(spatial, dtype, computed):
    # Native code computes them unless a gradient is wanted.
    last = len(spatial) + 1
    image = torch.randint(0, 256, (2, *spatial, 3)).to(dtype).movedim(last, 1)
    if dtype.is_floating_point:
        image = image / 7
    sxy = torch.rand(len(spatial), dtype=computed) + 0.5
    srgb = (torch.rand(1, dtype=computed) + 0.5).expand(3)
    for pixels in (image, image.contiguous()):
        for given in ((None, None), (pixels, srgb)):
            expected = inputs.grid_features(2, spatial, sxy.clone().requires_grad_(), *given)
            found = inputs.grid_features(2, spatial, sxy, *given)
            assert found.is_contiguous()
            assert torch.equal(found, expected)
