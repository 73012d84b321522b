"""`segkernels refine`: what is written, EXIF orientation, foreground maps, and tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from test_refine import run

import segkernels
from segkernels.cli import inference, label_maps

HEIGHT, WIDTH = 40, 60
COLOURS = np.array([(60, 90, 150), (180, 150, 70), (90, 200, 90)])


def photograph(truth, seed=0):
    noise = np.random.default_rng(seed).normal(0, 4, (*truth.shape, 3))
    return np.clip(COLOURS[truth] + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def truth(tmp_path):
    """Two halves, whose photograph is image.png."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, 33:] = 1
    Image.fromarray(photograph(labels)).save(tmp_path / "image.png")
    return labels


def refine_to(tmp_path, labels, out, *options, code=0):
    files = (tmp_path / "image.png", tmp_path / labels, "-o", tmp_path / out)
    return run("refine", *files, *options, code=code)


# --- labels are written as they were read


@pytest.mark.parametrize(
    ("mode", "most", "written"),
    [("1", 3, "L"), ("1", 300, "I;16"), ("L", 256, "L"), ("L", 257, "I;16"), ("LA", 9, "LA")],
)
def test_classes_that_the_format_cannot_hold(tmp_path, truth, mode, most, written):
    """Each class of --num-classes has its own value in the output."""
    picture = Image.fromarray(truth == 1) if mode == "1" else Image.fromarray(truth).convert(mode)
    picture.save(tmp_path / "labels.png")
    before = inference.read_stored(tmp_path / "labels.png", inference.Reading()).label_map(
        inference.Meaning(num_classes=most)
    )
    assert before.keys == tuple(range(most))
    positions = (np.arange(HEIGHT * WIDTH) % most).reshape(HEIGHT, WIDTH)
    (tmp_path / "out.png").write_bytes(
        label_maps.encode_labels(tmp_path / "out.png", positions, before)
    )
    after = Image.open(tmp_path / "out.png")
    assert after.mode == written
    assert np.array_equal(np.array(after).reshape(HEIGHT, WIDTH, -1)[..., 0], positions)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_too_many_classes(tmp_path, truth, dtype):
    Image.fromarray(truth.astype(dtype)).save(tmp_path / "labels.png")
    printed = refine_to(tmp_path, "labels.png", "out.png", "--num-classes", 65537, code=2)
    assert "--num-classes" in printed
    assert not (tmp_path / "out.png").exists()


def test_npz_has_the_classes_that_exist(tmp_path, truth):
    sparse = np.where(truth == 1, 60000, 7).astype(np.uint16)
    Image.fromarray(sparse).save(tmp_path / "labels.png")
    refine_to(tmp_path, "labels.png", "out.npz")
    with np.load(tmp_path / "out.npz") as written:
        assert written["indices"].tolist() == [7, 60000]
        assert written["probs"].shape == (2, HEIGHT, WIDTH)
        probs = segkernels.probs_from_labels(truth, 2)
        image = np.array(Image.open(tmp_path / "image.png"))
        wanted = segkernels.dense_crf(image, probs)
        np.testing.assert_allclose(written["probs"], wanted, atol=1e-6)
    # The result can be refined again.
    refine_to(tmp_path, "out.npz", "again.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "again.png")), sparse)


def test_npz_of_colours(tmp_path, truth):
    rows = np.array([(9, 8, 7), (200, 10, 20)], np.uint8)[truth]
    Image.fromarray(rows).save(tmp_path / "labels.png")
    refine_to(tmp_path, "labels.png", "out.npz")
    with np.load(tmp_path / "out.npz") as written:
        assert written["colours"].tolist() == [[9, 8, 7], [200, 10, 20]]
        assert np.array_equal(written["probs"].argmax(axis=0), truth)
    refine_to(tmp_path, "out.npz", "again.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "again.png")), rows)


def test_npy_refuses_above_a_gigabyte(tmp_path):
    square = np.zeros((80, 80), np.uint16)
    Image.fromarray(square.astype(np.uint8)).save(tmp_path / "image.png")
    square[:, 40:] = 60000
    Image.fromarray(square).save(tmp_path / "labels.png")
    printed = refine_to(tmp_path, "labels.png", "out.npy", code=1)
    assert "60001 channels of 80x80 are 1.54 GB, more than 1 GB; write .npz, which holds" in printed
    assert "the 2 classes that exist and their indices" in printed
    assert not (tmp_path / "out.npy").exists()


def test_one_class_is_everywhere(tmp_path, truth):
    labels = np.full_like(truth, 9)
    labels[:, 20:] = 255
    labels[0, 0] = 9
    Image.fromarray(labels).save(tmp_path / "labels.png")
    refine_to(tmp_path, "labels.png", "out.png", "--unknown", 255)
    assert (np.array(Image.open(tmp_path / "out.png")) == 9).all()


def test_one_class_and_missing_pixels(tmp_path):
    """The class is everywhere but where there are no data, and arrays can be read again."""
    image = np.full((HEIGHT, WIDTH, 3), 90, np.float32)
    image[:7] = np.nan
    np.save(tmp_path / "image.npy", image)
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(tmp_path / "labels.png")
    files = (tmp_path / "image.npy", tmp_path / "labels.png")
    run("refine", *files, "-o", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as written:
        assert np.isnan(written["probs"][:, :7]).all()
        assert (written["probs"][:, 7:] == 1).all()
    run("refine", tmp_path / "image.npy", tmp_path / "out.npz", "-o", tmp_path / "out.png")
    assert (np.array(Image.open(tmp_path / "out.png"))[7:] == 0).all()
    # One channel alone would be read as the foreground.
    run("refine", *files, "-o", tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy").shape == (2, HEIGHT, WIDTH)


def test_huge_sigmas(tmp_path, truth):
    Image.fromarray(truth).save(tmp_path / "labels.png")
    for options in (("--sxy-gaussian", 1e30), ("--sxy-bilateral", 1e30, "--tile", 20)):
        refine_to(tmp_path, "labels.png", "out.png", *options)
    assert inference.Options(crf={"sxy_bilateral": 1e308}).reach() >= 1 << 31


# --- foreground probabilities


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (1, HEIGHT, WIDTH)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_foreground(tmp_path, truth, shape, dtype):
    """One channel is the foreground's probability, as in segkernels.dense_crf."""
    probs = np.where(truth == 1, 0.75, 0.25).astype(dtype)
    probs[5:9, 5:9] = 0.75  # wrong
    np.save(tmp_path / "labels.npy", probs.reshape(shape))
    refine_to(tmp_path, "labels.npy", "out.png", "--overlay", tmp_path / "overlay.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), truth)
    refine_to(tmp_path, "labels.npy", "out.npy")
    written = np.load(tmp_path / "out.npy")
    assert written.shape == shape
    image = np.array(Image.open(tmp_path / "image.png"))
    wanted = segkernels.dense_crf(image, probs.astype(np.float32).reshape(shape))
    np.testing.assert_allclose(written, wanted, atol=1e-6)
    refine_to(tmp_path, "labels.npy", "out.npz")
    with np.load(tmp_path / "out.npz") as both:
        assert both["indices"].tolist() == [0, 1]
        np.testing.assert_allclose(both["probs"][1], wanted.reshape(HEIGHT, WIDTH), atol=1e-6)


def test_floats_that_are_no_probabilities(tmp_path, truth):
    np.save(tmp_path / "labels.npy", truth * 2.0)
    printed = refine_to(tmp_path, "labels.npy", "out.png", code=1)
    assert "between 0 and 1, got values from 0 to 2 (logits need a sigmoid first" in printed


# --- EXIF orientation


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_orientation_that_keeps_the_size(tmp_path, truth, orientation):
    """The photograph is turned and its labels are not: a warning names the option."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(photograph(truth)).save(tmp_path / "image.png", exif=exif)
    rough = truth.copy()
    rough[:, 26:42] = 255
    rough[:, 26] = 0
    Image.fromarray(rough).save(tmp_path / "labels.png")
    printed = refine_to(tmp_path, "labels.png", "out.png")
    assert f"has EXIF orientation {orientation}, LABELS labels.png has 1" in printed
    assert "pass --ignore-exif" in printed
    printed = refine_to(tmp_path, "labels.png", "out.png", "--ignore-exif")
    assert "Warning" not in printed
    assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), truth)
    # Labels with the same orientation are turned, too.
    Image.fromarray(rough).save(tmp_path / "labels.png", exif=exif)
    assert "Warning" not in refine_to(tmp_path, "labels.png", "out.png")


def test_orientation_of_a_square(tmp_path):
    square = np.zeros((30, 30), np.uint8)
    square[:, 12:] = 1
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(square)).save(tmp_path / "image.png", exif=exif)
    Image.fromarray(square).save(tmp_path / "labels.png")
    assert "EXIF orientation 6" in refine_to(tmp_path, "labels.png", "out.png")
    refine_to(tmp_path, "labels.png", "out.png", "--ignore-exif")
    assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), square)


def test_orientation_that_changes_the_size(tmp_path, truth):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph(truth)).save(tmp_path / "image.png", exif=exif)
    Image.fromarray(truth).save(tmp_path / "labels.png")
    printed = refine_to(tmp_path, "labels.png", "out.png", code=1)
    assert "IMAGE was, by its EXIF orientation 6; pass --ignore-exif" in printed
    refine_to(tmp_path, "labels.png", "out.png", "--ignore-exif")


def test_folder_warns_once_and_counts(tmp_path, truth):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(3):
        Image.fromarray(photograph(truth)).save(
            images / f"{i}.png", **({"exif": exif} if i else {})
        )
        Image.fromarray(truth).save(labels / f"{i}.png")
    printed = run("refine", images, labels, "-o", tmp_path / "out")
    assert printed.count("Warning: ") == 1
    assert "2 pairs: photographs turned by their EXIF orientation" in " ".join(printed.split())


# --- tiles


@pytest.fixture(scope="module")
def blobs():
    """A photograph of smooth blobs (240, 320), its labels, and rough ones."""
    random = np.random.default_rng(4)
    coarse = torch.from_numpy(random.random((1, 3, 6, 8)))
    truth = torch.nn.functional.interpolate(coarse, (240, 320), mode="bicubic")[0].argmax(0).numpy()
    rough = np.where(random.random(truth.shape) < 0.3, 255, truth)
    wrong = random.random(truth.shape) < 0.05
    rough[wrong] = random.integers(0, 3, truth.shape)[wrong]
    return photograph(truth), truth, rough.astype(np.uint8)


def save_blobs(tmp_path, blobs):
    image, truth, rough = blobs
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(rough).save(tmp_path / "labels.png")
    return truth


TILED = ("--sxy-bilateral", 20, "--tile", 160)


def test_tiles_equal_the_whole(tmp_path, blobs):
    """Four tiles, with the default overlap of three times the largest sigma."""
    truth = save_blobs(tmp_path, blobs)
    refine_to(tmp_path, "labels.png", "whole.png", "--sxy-bilateral", 20)
    refine_to(tmp_path, "labels.png", "tiled.png", *TILED)
    whole, tiled = (np.array(Image.open(tmp_path / f"{n}.png")) for n in ("whole", "tiled"))
    assert (whole == tiled).mean() >= 0.999
    assert (whole == truth).mean() > 0.99
    refine_to(tmp_path, "labels.png", "whole.npy", "--sxy-bilateral", 20)
    refine_to(tmp_path, "labels.png", "tiled.npy", *TILED)
    whole, tiled = (np.load(tmp_path / f"{n}.npy") for n in ("whole", "tiled"))
    assert np.abs(whole - tiled).mean() < 1e-3
    np.testing.assert_allclose(tiled.sum(axis=0), 1, atol=1e-5)


def test_terms_of_tiles_are_those_of_dense_crf(blobs):
    """With the coordinates of the whole scene the features, and so all results, are the same."""
    image, _, rough = blobs
    crf = {"srgb": (9.0, 10.0, 11.0), "sxy_gaussian": (2.0, 4.0), "sxy_bilateral": 30.0}
    options = inference.Options(crf=crf, tile=1000)
    (window,) = inference._windows(rough.shape, options)
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    probs = torch.from_numpy(segkernels.probs_from_labels(rough, 3, ignore_index=255))
    terms = inference._terms(pixels, window, options)
    tiled = segkernels.dense_crf(
        None, probs, pairwise=terms, compat_gaussian=None, compat_bilateral=None
    )
    assert torch.equal(tiled, segkernels.dense_crf(pixels, probs, **crf))


def test_tiles_with_their_surroundings_are_the_whole(tmp_path, blobs):
    """With an overlap that covers the scene each tile computes the whole: the same bits."""
    save_blobs(tmp_path, blobs)
    refine_to(tmp_path, "labels.png", "whole.npy")
    refine_to(tmp_path, "labels.png", "tiled.npy", "--tile", 100, "--overlap", 320)
    assert (tmp_path / "whole.npy").read_bytes() == (tmp_path / "tiled.npy").read_bytes()
    # Without an overlap the seams differ.
    refine_to(tmp_path, "labels.png", "cut.npy", "--tile", 100, "--overlap", 0)
    whole, cut = np.load(tmp_path / "whole.npy"), np.load(tmp_path / "cut.npy")
    assert np.abs(whole - cut).max() > 0.01


def test_tiles_of_other_labels(tmp_path, blobs):
    """Probabilities, a foreground, and pixels without data, in tiles that cover the scene."""
    image, truth, _ = blobs
    floats = image.astype(np.float32)
    floats[:90, :130] = np.nan  # the first tile has no data
    floats[100:120, 200:230] = np.nan
    missing = np.isnan(floats[..., 0])
    np.save(tmp_path / "image.npy", floats)
    one_hot = np.stack([truth == i for i in range(3)]).astype(np.float32)
    np.save(tmp_path / "probs.npy", 0.2 + 0.4 * one_hot)
    np.save(tmp_path / "foreground.npy", 0.3 + 0.4 * one_hot[1])
    for labels in ("probs.npy", "foreground.npy"):
        files = (tmp_path / "image.npy", tmp_path / labels)
        run("refine", *files, "-o", tmp_path / "whole.npy")
        run("refine", *files, "-o", tmp_path / "t.npy", "--tile", 80, "--overlap", 320)
        whole, tiled = np.load(tmp_path / "whole.npy"), np.load(tmp_path / "t.npy")
        assert np.array_equal(np.isnan(whole), np.broadcast_to(missing, whole.shape))
        np.testing.assert_array_equal(whole, tiled)


def test_large_scenes_need_tiles(tmp_path, blobs, monkeypatch):
    truth = save_blobs(tmp_path, blobs)
    monkeypatch.setattr(inference, "_MAX_ENTRIES", truth.size * 6 - 1)
    printed = refine_to(tmp_path, "labels.png", "out.png", code=1)
    assert "320x240 pixels of 3 bands are more than one call takes" in printed
    assert "pass --tile" in printed
    refine_to(tmp_path, "labels.png", "out.png", "--tile", 128)
    assert (np.array(Image.open(tmp_path / "out.png")) == truth).mean() > 0.99


def test_max_pixels(tmp_path, blobs):
    truth = save_blobs(tmp_path, blobs)
    number = truth.size
    printed = refine_to(tmp_path, "labels.png", "out.png", "--max-pixels", number - 1, code=1)
    assert f"320x240 is {number} pixels, more than --max-pixels {number - 1}" in printed
    assert "--tile" in printed
    refine_to(tmp_path, "labels.png", "out.png", "--max-pixels", number)


def test_pictures_above_the_limit_of_pillow(tmp_path, blobs, monkeypatch):
    """--max-pixels raises Pillow's own limit, too, for the time of the command."""
    truth = save_blobs(tmp_path, blobs)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", truth.size // 3)
    refine_to(tmp_path, "labels.png", "out.png", "--max-pixels", truth.size)
    assert truth.size // 3 == Image.MAX_IMAGE_PIXELS


def test_sigmas_of_tiles(tmp_path, blobs):
    save_blobs(tmp_path, blobs)
    message = "--srgb: expected a number or 3 numbers, got 2"
    printed = refine_to(tmp_path, "labels.png", "o.png", "--tile", 100, "--srgb", "9,9", code=2)
    assert message in printed


def test_reach():
    reach = inference.Options().reach()
    assert reach == 240
    crf = {"sxy_gaussian": 3.0, "sxy_bilateral": (20.0, 40.5)}
    assert inference.Options(crf=crf).reach() == 122
    assert inference.Options(crf=crf, overlap=7).reach() == 7
