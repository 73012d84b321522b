"""`--resize`: labels of another size than their photograph."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import segkernels
from segkernels.cli import label_maps
from segkernels.cli.files import PictureError
from segkernels.cli.inference import Options, doubts, load, refine_labels
from segkernels.cli.label_maps import encode_labels, read_labels

RANDOM = np.random.default_rng(7)
RESIZE = Options(resize=True)


def photograph(path, height, width):
    Image.fromarray(RANDOM.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def saved(path, values):
    np.save(path, values)
    return path


def nearest_exact(labels, shape):
    resized = F.interpolate(
        torch.from_numpy(labels)[None, None].double(), shape, mode="nearest-exact"
    )
    return resized[0, 0].numpy()


def softmax(*shape):
    return torch.softmax(torch.from_numpy(RANDOM.normal(0, 2, shape)).float(), 0).numpy()


@pytest.mark.parametrize("shape", [(40, 60), (13, 17), (7, 90), (27, 33), (1, 1)])
def test_labels_take_the_nearest_pixel(tmp_path, shape):
    labels = RANDOM.integers(0, 5, (20, 30)).astype(np.uint8)
    labels[RANDOM.random((20, 30)) < 0.2] = 255
    before = read_labels(saved(tmp_path / "a.npy", labels))
    resized = before.resized(shape)
    wanted = nearest_exact(before.positions, shape)
    assert resized.positions.dtype == np.int32
    assert np.array_equal(resized.positions, wanted)
    assert resized.size == shape[::-1]
    assert resized.keys == before.keys


@pytest.mark.parametrize(
    ("shape", "antialias"), [((40, 75), False), ((13, 17), True), ((7, 90), True)]
)
def test_probabilities_are_interpolated(tmp_path, shape, antialias):
    probs = softmax(4, 20, 30)
    resized = read_labels(saved(tmp_path / "a.npy", probs)).resized(shape)
    wanted = F.interpolate(
        torch.from_numpy(probs)[None], shape, mode="bilinear", antialias=antialias
    )[0].numpy()
    np.testing.assert_allclose(resized.probs, wanted, atol=1e-6)
    assert np.array_equal(resized.positions, wanted.argmax(axis=0))
    other = F.interpolate(
        torch.from_numpy(probs)[None], shape, mode="bilinear", antialias=not antialias
    )[0].numpy()
    assert antialias == bool(np.abs(wanted - other).max() > 1e-3)


@pytest.mark.parametrize("shape", [(9, 8, 11), (3, 5, 4), (9, 3, 7)])
def test_probabilities_of_volumes(shape):
    probs = softmax(3, 6, 5, 7)
    resized = label_maps._interpolate(probs, shape)
    if min(np.array(shape) - (6, 5, 7)) >= 0:
        wanted = F.interpolate(torch.from_numpy(probs)[None], shape, mode="trilinear")[0].numpy()
        np.testing.assert_allclose(resized, wanted, atol=1e-6)
    # Linear interpolation is separable: one matrix an axis.
    wanted = probs.astype(np.float64)
    for axis, (old, new) in enumerate(zip((6, 5, 7), shape, strict=True), start=1):
        units = torch.eye(old, dtype=torch.float64)[None, None]
        matrix = F.interpolate(units, (old, new), mode="bilinear", antialias=True)[0, 0]
        wanted = np.moveaxis(np.moveaxis(wanted, axis, -1) @ matrix.numpy(), -1, axis)
    np.testing.assert_allclose(resized, wanted, atol=1e-5)


def test_an_output_of_width_1():
    """torch's antialiasing repeats the first pixel there."""
    resized = label_maps._interpolate(softmax(2, 6, 5), (3, 1))
    assert np.abs(np.diff(resized, axis=1)).min() > 1e-4


@pytest.mark.parametrize("channels", [(), (1,)])
def test_foreground(tmp_path, channels):
    """The shape that -o out.npy writes is that of the photograph."""
    given = RANDOM.random((*channels, 10, 14)).astype(np.float32)
    resized = read_labels(saved(tmp_path / "a.npy", given)).resized((25, 35))
    assert resized.foreground_shape == (*channels, 25, 35)
    wanted = F.interpolate(torch.from_numpy(given.reshape(1, 1, 10, 14)), (25, 35), mode="bilinear")
    np.testing.assert_allclose(resized.probs[0], wanted[0, 0], atol=1e-6)
    assert np.array_equal(resized.positions, wanted[0, 0] > 0.5)


def test_pixels_without_data_stay_unknown(tmp_path):
    probs = softmax(2, 10, 10)
    probs[:, :4] = np.nan
    np.savez(tmp_path / "a.npz", probs=probs, indices=np.array([3, 9]))
    resized = read_labels(tmp_path / "a.npz").resized((25, 30))
    assert np.array_equal(resized.positions < 0, np.arange(25)[:, None] < 10 + np.zeros(30))
    assert np.isfinite(resized.probs).all()


def test_refined_at_the_size_of_the_photograph(tmp_path):
    image = photograph(tmp_path / "image.png", 30, 44)
    labels = np.zeros((15, 22), np.uint8)
    labels[:, 9:] = 7
    Image.fromarray(labels).save(tmp_path / "labels.png")
    shot, before = load(image, tmp_path / "labels.png", RESIZE)
    assert "resize" not in doubts(image, shot, before, RESIZE)
    done = refine_labels(shot, before, Options(keep_probs=True))
    large = np.repeat(np.repeat(labels == 7, 2, axis=0), 2, axis=1).astype(np.int32)
    wanted = segkernels.dense_crf(shot.values, segkernels.probs_from_labels(large, 2))
    assert np.array_equal(done.probs, wanted)
    (tmp_path / "out.png").write_bytes(encode_labels(tmp_path / "out.png", done.after, before))
    assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), 7 * wanted.argmax(axis=0))


def test_without_the_option(tmp_path):
    image = photograph(tmp_path / "image.png", 30, 44)
    labels = saved(tmp_path / "labels.npy", np.eye(15, 22, dtype=np.uint8))
    with pytest.raises(PictureError, match=r"44x30, .* is 22x15; pass --resize to stretch LABELS"):
        load(image, labels, Options())
    labels = saved(tmp_path / "labels.npy", softmax(30, 44, 3))
    text = "is 3x44; the array is (30, 44, 3), read as (C, H, W); pass --resize"
    with pytest.raises(PictureError, match=re.escape(text)):
        load(image, labels, Options())


def test_turned_labels_are_refused(tmp_path):
    image = photograph(tmp_path / "image.png", 30, 44)
    labels = saved(tmp_path / "labels.npy", np.eye(44, 30, dtype=np.uint8))
    with pytest.raises(PictureError, match="turned by 90 degrees") as caught:
        load(image, labels, RESIZE)
    assert "--resize" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "warned"), [((321, 321), True), ((375, 470), True), ((75, 98), False)]
)
def test_another_ratio_of_the_sides(tmp_path, size, warned):
    image = photograph(tmp_path / "image.png", 375, 500)
    labels = saved(tmp_path / "labels.npy", np.eye(*size, dtype=np.uint8))
    shot, before = load(image, labels, RESIZE)
    found = doubts(image, shot, before, RESIZE)
    assert ("resize" in found) == warned
    if warned:
        assert f"is {size[1]}x{size[0]}, stretched to 500x375" in found["resize"]


def test_the_same_size_is_left_alone(tmp_path):
    image = photograph(tmp_path / "image.png", 20, 20)
    probs = softmax(3, 20, 20)
    _, before = load(image, saved(tmp_path / "labels.npy", probs), RESIZE)
    assert np.array_equal(before.probs, probs)
