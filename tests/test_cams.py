"""Class activation maps as labels: named arrays in .npz, class indices, and a background."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest
from PIL import Image

import segkernels
from segkernels.cli.files import PictureError, Reading
from segkernels.cli.images import read_image
from segkernels.cli.inference import Options, load, refine_labels
from segkernels.cli.label_maps import read_labels
from segkernels.cli.unknown import Meaning

HEIGHT, WIDTH = 24, 30
RANDOM = np.random.default_rng(3)
CAMS = RANDOM.random((2, HEIGHT, WIDTH)).astype(np.float32)
CAMS[:, :5] = 0
IRN = Reading(scores_key="high_res", indices_key="keys", background=0.3)


@pytest.fixture
def irn(tmp_path):
    """The arrays of IRN's make_cam.py, for the classes 4 and 14 after the background."""
    small = np.ascontiguousarray(CAMS[:, ::4, ::4])
    np.savez(tmp_path / "cam.npz", keys=np.array([3, 13]), cam=small, high_res=CAMS)
    return tmp_path / "cam.npz"


def error(path, reading, meaning=None):
    with pytest.raises(PictureError) as caught:
        read_labels(path, meaning, reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_background_and_indices(irn):
    labels = read_labels(irn, reading=IRN)
    assert labels.indices == labels.keys == (0, 4, 14)
    wanted = np.pad(CAMS, ((1, 0), (0, 0), (0, 0)), constant_values=np.float32(0.3))
    assert np.array_equal(labels.probs, wanted)
    assert np.array_equal(labels.positions, wanted.argmax(axis=0))
    assert (labels.positions[:5] == 0).all()
    assert labels.num_classes == 3


def test_without_indices_or_background(irn):
    labels = read_labels(irn, reading=Reading(scores_key="high_res", background=0.3))
    assert labels.keys == (0, 1, 2)
    labels = read_labels(irn, reading=Reading(scores_key="high_res"))
    assert labels.keys == (0, 1)
    assert np.array_equal(labels.probs, CAMS)
    labels = read_labels(irn, reading=Reading(scores_key="high_res", indices_key="keys"))
    assert labels.keys == (3, 13)
    # Where all scores are 0 nothing is known.
    assert (labels.positions[:5] == -1).all()
    assert np.array_equal(labels.positions[5:], CAMS[:, 5:].argmax(axis=0))
    assert labels.unknown == f"{5 * WIDTH} pixels without a score"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_refined_as_dense_crf_does(tmp_path, dtype):
    """Scores are passed on as they are, zeros as 1e-5."""
    image = RANDOM.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    np.savez(tmp_path / "cam.npz", scores=CAMS.astype(dtype), classes=np.array([3, 13]))
    reading = Reading(scores_key="scores", indices_key="classes", background=0.3)
    options = Options(reading=reading, keep_probs=True)
    done = refine_labels(*load(tmp_path / "image.png", tmp_path / "cam.npz", options), options)
    scores = CAMS.astype(dtype).astype(np.float32)
    whole = np.pad(scores, ((1, 0), (0, 0), (0, 0)), constant_values=0.3).clip(1e-5)
    np.testing.assert_allclose(done.probs, segkernels.dense_crf(image, whole), atol=1e-6)
    energies = segkernels.dense_crf(image, unary=-np.log(whole))
    np.testing.assert_allclose(done.probs, energies, atol=1e-5)


def test_a_score_of_zero_can_win(tmp_path):
    """A class is possible where its activation is 0, if the pixels around have it."""
    np.save(tmp_path / "image.npy", np.full((HEIGHT, WIDTH, 1), 90, np.float32))
    scores = np.stack([np.full((HEIGHT, WIDTH), 0.9), np.zeros((HEIGHT, WIDTH))])
    scores[:, 9, 9] = 0, 1e-3
    np.savez(tmp_path / "cam.npz", x=scores, y=1)
    options = Options(reading=Reading(scores_key="x"), crf={"compat_bilateral": 30.0})
    done = refine_labels(*load(tmp_path / "image.npy", tmp_path / "cam.npz", options), options)
    assert done.before.positions[9, 9] == 1
    assert done.after[9, 9] == 0


def test_one_class_and_its_background(tmp_path):
    """Without a background a single channel is the foreground's probability."""
    np.save(tmp_path / "a.npy", CAMS[:1])
    labels = read_labels(tmp_path / "a.npy", reading=Reading(background=0.25))
    assert labels.keys == (0, 1)
    assert labels.foreground_shape is None
    assert np.array_equal(labels.positions, CAMS[0] > 0.25)
    assert read_labels(tmp_path / "a.npy").foreground_shape == (1, HEIGHT, WIDTH)
    assert read_labels(tmp_path / "a.npy", reading=Reading(background=0)).keys == (0, 1)


def test_other_arrays_are_not_read(tmp_path):
    """A .npz may hold what cannot be read, or is large."""
    np.savez(tmp_path / "a.npz", cam=CAMS, other=np.array([{}, 1]))
    assert read_labels(tmp_path / "a.npz", reading=Reading(scores_key="cam")).num_classes == 2


def test_missing_names(irn):
    held = (
        f"got ['keys', 'cam', 'high_res']: keys int64 (2,), cam float32 (2, 6, 8), "
        f"high_res float32 (2, {HEIGHT}, {WIDTH})"
    )
    assert f"expected one array (or --scores-key with the name of one), {held}" in error(irn, None)
    text = error(irn, Reading(scores_key="cams", indices_key="keys"))
    assert f"expected arrays named cams and keys, {held}" in text
    assert held in error(irn, Reading(scores_key="high_res", indices_key="classes"))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_the_header(tmp_path, version):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in "xy":
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, CAMS, version)
    assert "y float32 (2, 24, 30)" in error(tmp_path / "a.npz", None)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3, 3], "expected different indices from 0 to 65535"),
        ([-1, 3], "expected different indices from 0 to 65535"),
        ([3, 65535], "expected different indices from 0 to 65535"),
        ([3.0, 13.0], "expected one integer index for each of 2 scores, got float64 (2,)"),
        ([3], "expected one integer index for each of 2 scores, got int64 (1,)"),
        ([[1, 2, 3], [4, 5, 6]], "for each of 2 scores, got int64 (2, 3)"),
        ([True, False], "for each of 2 scores, got bool (2,)"),
    ],
)
def test_wrong_indices(tmp_path, indices, message):
    np.savez(tmp_path / "a.npz", x=CAMS, y=np.array(indices))
    assert message in error(tmp_path / "a.npz", Reading(None, None, 10**6, "x", "y", 0.3))


def test_indices_of_8_bits_do_not_wrap(tmp_path):
    np.savez(tmp_path / "a.npz", x=CAMS, y=np.array([0, 255], np.uint8))
    labels = read_labels(tmp_path / "a.npz", reading=Reading(None, None, 10**6, "x", "y", 0.3))
    assert labels.keys == (0, 1, 256)


def test_pickled_dictionaries(tmp_path):
    """IRN and PSA save one; the message says how to convert it."""
    path = tmp_path / "a.npy"
    np.save(path, {"keys": np.array([3, 13]), "high_res": CAMS})
    text = error(path, None)
    assert "pickled objects" in text
    command = "np.savez(path, **np.load(path, allow_pickle=True).item())"
    assert command in text
    exec(command, {"np": np, "path": path})
    assert read_labels(tmp_path / "a.npy.npz", reading=IRN).keys == (0, 4, 14)
    np.save(path, {3: CAMS[0], 13: CAMS[1]})
    commands = re.search(r"d = np.*indices=np.array\(list\(d\)\)\)", error(path, None))
    exec(commands[0], {"np": np, "path": path})
    reading = Reading(scores_key="scores", indices_key="indices", background=0.3)
    labels = read_labels(tmp_path / "a.npy.npz", reading=reading)
    assert labels.keys == (0, 4, 14)
    assert np.array_equal(labels.probs[1:], CAMS)
    np.savez(tmp_path / "b.npz", cam=np.array({"x": 1}, object))
    assert "pickled objects" in error(tmp_path / "b.npz", Reading(scores_key="cam"))


def test_nan_is_an_error(tmp_path):
    """An activation map that was divided by its largest value, 0."""
    for name in ("x", "probs"):
        scores = CAMS.copy()
        scores[:, 3, 4] = np.nan
        np.savez(tmp_path / "a.npz", **{name: scores}, indices=np.array([3, 13]))
        reading = Reading(scores_key=name, indices_key="indices")
        text = error(tmp_path / "a.npz", reading)
        assert text.endswith("expected finite probabilities, got NaN or infinity")


def test_scores_that_do_not_fit(tmp_path, irn):
    np.savez(tmp_path / "a.npz", x=CAMS * 0, y=CAMS * 3)
    assert "expected scores above 0, got 0 only" in error(
        tmp_path / "a.npz", Reading(scores_key="x")
    )
    text = error(tmp_path / "a.npz", Reading(scores_key="y"))
    assert "activation maps a division by their largest" in text
    np.save(tmp_path / "a.npy", np.eye(5, dtype=np.uint8))
    Image.fromarray(np.eye(5, dtype=np.uint8)).save(tmp_path / "a.png")
    for name in ("a.npy", "a.png"):
        assert "--background adds a class to scores, and these are labels" in error(
            tmp_path / name, Reading(background=0.3)
        )
        assert "--scores-key names an array in a .npz file" in error(
            tmp_path / name, Reading(scores_key="x")
        )
    assert "--indices-key: expected --scores-key with it" in error(irn, Reading(indices_key="keys"))
    for background in (-0.1, 1.5, float("nan")):
        assert "--background: expected a score from 0 to 1" in error(
            irn, Reading(scores_key="cam", background=background)
        )


def test_number_of_classes(irn):
    assert read_labels(irn, Meaning(num_classes=3), IRN).num_classes == 3
    assert "expected probabilities of 2 classes" in error(irn, IRN, Meaning(num_classes=2))


def test_the_result_of_refine_is_read_as_before(tmp_path):
    probs = CAMS.copy()
    probs[:, 5:7] = np.nan
    np.savez(tmp_path / "a.npz", probs=probs, indices=np.array([3, 13]))
    labels = read_labels(tmp_path / "a.npz")
    assert labels.keys == (3, 13)
    assert (labels.positions[5:7] == -1).all()
    assert (labels.positions[:5] == 0).all()


def test_images_have_one_array(tmp_path, irn):
    with pytest.raises(PictureError, match=r"IMAGE .* expected one array, got \['keys', 'cam'"):
        read_image(irn)
