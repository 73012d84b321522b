"""`segkernels refine` and `segkernels demo`: options, output files, folders, errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import segkernels
from segkernels.cli import app, inference
from segkernels.cli.demo import CLASSES, UNKNOWN, accuracy, mean_iou
from segkernels.cli.demo import scene as demo_scene
from segkernels.cli.options import find_device

RED, GREEN, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 0)


def run(*arguments, code=0):
    """Run a command, check its exit code and return its output."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    if result.exception is not None:
        assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.output


def words(text):
    """The text of a boxed usage error, without the box and its line breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.fixture
def scene(tmp_path):
    """Save an image of two noisy halves and labels with a gap; return the ground truth."""
    random = np.random.default_rng(0)
    truth = np.zeros((40, 60), np.uint8)
    truth[:, 33:] = 1
    colours = np.array([(60, 90, 150), (180, 150, 70)])
    photograph = np.clip(colours[truth] + random.normal(0, 4, (40, 60, 3)), 0, 255)
    Image.fromarray(photograph.astype(np.uint8)).save(tmp_path / "image.png")
    rough = truth + 1
    rough[:, 26:42] = 0
    palette = [*BLACK, *RED, *GREEN]
    image = Image.fromarray(rough)
    image.putpalette(palette)
    image.save(tmp_path / "palette.png")
    Image.fromarray(np.array([BLACK, RED, GREEN], np.uint8)[rough]).save(tmp_path / "colour.png")
    Image.fromarray(np.where(rough == 0, 255, rough - 1).astype(np.uint8)).save(
        tmp_path / "grey.png"
    )
    return truth


def test_palette_labels(tmp_path, scene):
    out = tmp_path / "out.png"
    printed = run("refine", tmp_path / "image.png", tmp_path / "palette.png", "-o", out)
    written = Image.open(out)
    assert written.mode == "P"
    assert written.getpalette()[:9] == [*BLACK, *RED, *GREEN]
    assert np.array_equal(np.array(written), scene + 1)
    assert "image.png: 60x40, 2 classes, unknown: index 0 (black)" in printed
    assert "filled 640 unknown pixels, changed 0 labelled ones" in printed
    assert f"wrote {out}" in printed


def test_colour_labels(tmp_path, scene):
    out = tmp_path / "out.png"
    run("refine", tmp_path / "image.png", tmp_path / "colour.png", "-o", out)
    written = Image.open(out)
    assert written.mode == "RGB"
    assert np.array_equal(np.array(written), np.array([RED, GREEN])[scene])


def test_grey_labels_as_tiff(tmp_path, scene):
    out = tmp_path / "out.tif"
    run("refine", tmp_path / "image.png", tmp_path / "grey.png", "-o", out)
    written = Image.open(out)
    assert (written.format, written.mode) == ("TIFF", "L")
    assert np.array_equal(np.array(written), scene)


def test_wrong_labels_are_corrected(tmp_path, scene):
    rough = scene.copy()
    rough[10:14, 8:12] = 1
    Image.fromarray(rough).save(tmp_path / "wrong.png")
    out = tmp_path / "out.png"
    printed = run("refine", tmp_path / "image.png", tmp_path / "wrong.png", "-o", out)
    assert np.array_equal(np.array(Image.open(out)), scene)
    assert "changed 16 labelled ones (0.67%)" in printed
    assert "unknown: none" in printed


def expected_probs(tmp_path, **parameters):
    photograph = np.array(Image.open(tmp_path / "image.png"))
    rough = np.array(Image.open(tmp_path / "grey.png"))
    probs = segkernels.probs_from_labels(
        torch.from_numpy(rough), 2, parameters.pop("gt_prob", 0.7), ignore_index=255
    )
    image = torch.from_numpy(photograph).float().permute(2, 0, 1)
    return segkernels.dense_crf(image, probs, **parameters).numpy()


def test_equals_dense_crf(tmp_path, scene):
    np.save(tmp_path / "labels.npy", np.array(Image.open(tmp_path / "grey.png")))
    out = tmp_path / "out.npy"
    run("refine", tmp_path / "image.png", tmp_path / "labels.npy", "-o", out)
    written = np.load(out)
    assert written.dtype == np.float32
    np.testing.assert_allclose(written, expected_probs(tmp_path), atol=1e-6)


def test_every_option_is_passed(tmp_path, scene):
    out = tmp_path / "out.npy"
    options = {
        "--iterations": (2, {"iterations": 2}),
        "--sxy-gaussian": ("2,4", {"sxy_gaussian": (2, 4)}),
        "--compat-gaussian": (1.5, {"compat_gaussian": 1.5}),
        "--sxy-bilateral": ("30,50", {"sxy_bilateral": (30, 50)}),
        "--srgb": ("9,20,31", {"srgb": (9, 20, 31)}),
        "--compat-bilateral": (4, {"compat_bilateral": 4}),
        "--normalization": ("after", {"normalization": "after"}),
        "--gt-prob": (0.9, {"gt_prob": 0.9}),
    }
    files = (tmp_path / "image.png", tmp_path / "grey.png", "-o", out)
    plain = expected_probs(tmp_path, iterations=1)
    for option, (value, parameters) in options.items():
        # After one iteration the result has not converged, so every parameter has an effect.
        once = {"iterations": 1, **parameters}
        run("refine", *files, "--iterations", 1, option, value)
        wanted = expected_probs(tmp_path, **once)
        np.testing.assert_allclose(np.load(out), wanted, atol=1e-6, err_msg=option)
        assert np.abs(wanted - plain).max() > 1e-4, option


def test_probabilities(tmp_path, scene):
    rough = np.array(Image.open(tmp_path / "grey.png"))
    probs = segkernels.probs_from_labels(rough, 2, ignore_index=255)
    np.savez(tmp_path / "probs.npz", probs=probs.astype(np.float64))
    files = (tmp_path / "image.png", tmp_path / "probs.npz")
    run("refine", *files, "-o", tmp_path / "out.png", "--overlay", tmp_path / "overlay.jpg")
    assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), scene)
    run("refine", *files, "-o", tmp_path / "out.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected_probs(tmp_path), atol=1e-6)


def test_array_output_has_a_channel_for_each_index(tmp_path, scene):
    rough = np.array(Image.open(tmp_path / "grey.png"))
    rough[rough == 1] = 3
    Image.fromarray(rough).save(tmp_path / "sparse.png")
    files = (tmp_path / "image.png", tmp_path / "sparse.png", "-o", tmp_path / "out.npy")
    run("refine", *files)
    written, dense = np.load(tmp_path / "out.npy"), expected_probs(tmp_path)
    assert written.shape == (4, 40, 60)
    np.testing.assert_allclose(written[[0, 3]], dense, atol=1e-6)
    assert not written[[1, 2]].any()
    run("refine", *files, "--num-classes", 6)
    assert np.load(tmp_path / "out.npy").shape == (6, 40, 60)


def test_grey_and_sixteen_bit_images(tmp_path, scene):
    grey = Image.open(tmp_path / "image.png").convert("L")
    deep = np.array(grey).astype(np.uint16) * 257
    grey.save(tmp_path / "eight.png")
    Image.fromarray(deep).save(tmp_path / "sixteen.png")
    results = []
    for name in ("eight.png", "sixteen.png"):
        run("refine", tmp_path / name, tmp_path / "grey.png", "-o", tmp_path / "out.npy")
        results.append(np.load(tmp_path / "out.npy"))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0].argmax(axis=0), scene)


def test_overlay(tmp_path, scene):
    files = (tmp_path / "image.png", tmp_path / "colour.png", "-o", tmp_path / "out.png")
    printed = run("refine", *files, "--overlay", tmp_path / "overlay.png")
    assert "overlay.png" in printed
    overlay = np.array(Image.open(tmp_path / "overlay.png").convert("RGB")).astype(int)
    height, width = overlay.shape[:2]
    assert width > 3 * 460
    assert width > 3 * height * 0.9
    # The first panel shows the image, the others the tints of the classes.
    panel = (width - 2 * 24 - 2 * 14) // 3
    middle = 24 + 34 + (height - 2 * 24 - 34) // 2
    spots = [overlay[middle, 24 + i * (panel + 14) + panel // 10] for i in range(3)]
    assert np.abs(spots[0] - (60, 90, 150)).max() < 20
    assert spots[1][0] > spots[1][2] + 40
    assert np.abs(spots[1] - spots[2]).max() < 12


def test_overlay_replaces_similar_colours(tmp_path, scene):
    rough = np.array([(0, 60, 0), (0, 80, 0)], np.uint8)[scene]
    Image.fromarray(rough).save(tmp_path / "greens.png")
    files = (tmp_path / "image.png", tmp_path / "greens.png", "-o", tmp_path / "out.png")
    run("refine", *files, "--unknown", "none", "--overlay", tmp_path / "overlay.png")
    overlay = np.array(Image.open(tmp_path / "overlay.png")).astype(int)
    panel = (overlay.shape[1] - 2 * 24 - 2 * 14) // 3
    row, left = overlay[overlay.shape[0] // 2], 24 + panel + 14
    apart = row[left + panel // 10] - row[left + 9 * panel // 10]
    assert np.abs(apart).max() > 40


def test_output_is_overwritten_without_leftovers(tmp_path, scene):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "labels.png"
    out.write_bytes(b"old")
    run("refine", tmp_path / "image.png", tmp_path / "grey.png", "-o", out)
    assert os.listdir(tmp_path / "out") == ["labels.png"]
    assert np.array_equal(np.array(Image.open(out)), scene)


def test_deterministic(tmp_path, scene):
    files = (tmp_path / "image.png", tmp_path / "grey.png")
    for name in ("a.npy", "b.npy"):
        run("refine", *files, "-o", tmp_path / name)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_float_image_in_unit_range_warns(tmp_path, scene):
    photograph = np.array(Image.open(tmp_path / "image.png")) / np.float32(255)
    np.save(tmp_path / "unit.npy", photograph)
    files = (tmp_path / "unit.npy", tmp_path / "grey.png", "-o", tmp_path / "out.npy")
    printed = run("refine", *files)
    assert "Warning: IMAGE" in printed
    assert "a picture in [0, 1] wants --srgb 0.05 (13/255)" in printed
    printed = run("refine", *files, "--srgb", 13 / 255)
    assert "Warning" not in printed
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected_probs(tmp_path), atol=1e-3)


# --- errors


def refine_error(tmp_path, image, labels, *rest, code=1):
    out = tmp_path / "result.png"
    extra = rest if "-o" in rest else ("-o", out, *rest)
    before = sorted(os.listdir(tmp_path))
    printed = run("refine", tmp_path / image, tmp_path / labels, *extra, code=code)
    assert sorted(os.listdir(tmp_path)) == before
    if code == 1:
        assert printed.startswith("Error: ")
        assert printed.count("\n") == 1
    return words(printed) if code == 2 else printed


def test_sizes_differ(tmp_path, scene):
    Image.new("L", (60, 39), 1).save(tmp_path / "small.png")
    printed = refine_error(tmp_path, "image.png", "small.png")
    assert "sizes differ (width x height): IMAGE" in printed
    assert "is 60x40, LABELS" in printed
    assert "is 60x39" in printed
    Image.new("L", (40, 60), 1).save(tmp_path / "turned.png")
    assert "turned by 90 degrees" in refine_error(tmp_path, "image.png", "turned.png")
    np.save(tmp_path / "last.npy", np.full((40, 60, 2), 0.5))
    printed = refine_error(tmp_path, "image.png", "last.npy")
    assert "the array is (40, 60, 2), read as (C, H, W)" in printed


def test_unreadable_files(tmp_path, scene):
    (tmp_path / "broken.png").write_text("no picture")
    assert "not a picture that can be read" in refine_error(tmp_path, "broken.png", "grey.png")
    assert "LABELS" in refine_error(tmp_path, "image.png", "broken.png")
    printed = refine_error(tmp_path, "none.png", "grey.png", code=2)
    assert "does not exist" in printed


def test_too_many_colours(tmp_path, scene):
    printed = refine_error(tmp_path, "image.png", "colour.png", "--num-classes", 1)
    assert "expected at most 1 colours for the 1 classes given, got 2" in printed
    assert "got" in refine_error(tmp_path, "image.png", "image.png")


def test_unwritable_outputs_fail_before_the_crf_runs(tmp_path, scene, monkeypatch):
    def compute(*arguments, **parameters):
        raise AssertionError("the CRF ran")

    monkeypatch.setattr(segkernels, "dense_crf", compute)
    missing = tmp_path / "missing" / "out.png"
    assert "there is no folder" in refine_error(tmp_path, "image.png", "grey.png", "-o", missing)
    printed = refine_error(tmp_path, "image.png", "grey.png", "--overlay", missing)
    assert "--overlay" in printed
    assert "there is no folder" in printed
    (tmp_path / "folder.png").mkdir()
    printed = refine_error(tmp_path, "image.png", "grey.png", "-o", tmp_path / "folder.png")
    assert "expected a file, got a folder" in printed


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["-o", "out.jpg"], "formats that keep labels exactly"),
        (["-o", "out"], "expected a file that ends in .png"),
        (["--overlay", "overlay.xyz"], "expected a picture such as overlay.png"),
        (["--sxy-gaussian", "0"], "expected a number above 0"),
        (["--sxy-bilateral", "-3"], "expected a number above 0"),
        (["--srgb", "thirteen"], "got 'thirteen'"),
        (["--srgb", "13,nan,13"], "expected a number above 0"),
        (["--compat-bilateral", "inf"], "expected a finite number, got inf"),
        (["--compat-gaussian", "nan"], "expected a finite number, got nan"),
        (["--gt-prob", "1"], "strictly between 0 and 1, got 1.0"),
        (["--iterations", "-1"], "--iterations"),
        (["--num-classes", "0"], "--num-classes"),
        (["--normalization", "sideways"], "--normalization"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_usage_errors(tmp_path, scene, rest, message):
    assert message in refine_error(tmp_path, "image.png", "grey.png", *rest, code=2)


def test_inputs_are_not_overwritten(tmp_path, scene):
    for name in ("grey.png", "image.png"):
        rest = ("-o", tmp_path / name)
        printed = refine_error(tmp_path, "image.png", "grey.png", *rest, code=2)
        assert "is an input and would be lost" in printed
    rest = ("-o", tmp_path / "x.png", "--overlay", tmp_path / "x.png")
    assert "another file" in refine_error(tmp_path, "image.png", "grey.png", *rest, code=2)


def test_probabilities_of_colour_labels_raise(tmp_path, scene):
    rest = ("-o", tmp_path / "out.npy")
    printed = refine_error(tmp_path, "image.png", "colour.png", *rest)
    assert "probabilities need an order of classes, which colours do not have" in printed


def test_errors_of_the_crf_are_one_line(tmp_path, scene):
    rest = ("--compat-bilateral", "1e39")
    assert "compat_bilateral" in refine_error(tmp_path, "image.png", "grey.png", *rest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without CUDA")
def test_cuda_device_without_cuda(tmp_path, scene):
    printed = refine_error(tmp_path, "image.png", "grey.png", "--device", "cuda")
    assert "--device cuda: torch sees no CUDA device here" in printed
    assert find_device("auto") == "cpu"


@pytest.mark.gpu
def test_on_cuda(tmp_path, scene):
    out = tmp_path / "out.npy"
    files = (tmp_path / "image.png", tmp_path / "grey.png", "-o", out)
    assert "on cuda" in run("refine", *files, "--device", "cuda")
    np.testing.assert_allclose(np.load(out), expected_probs(tmp_path), atol=1e-4)
    assert find_device("auto") == "cuda"


# --- folders


@pytest.fixture
def folders(tmp_path, scene):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    photograph, rough = Image.open(tmp_path / "image.png"), Image.open(tmp_path / "palette.png")
    for i in range(3):
        photograph.save(images / f"{i}.{'png' if i else 'tif'}")
        rough.save(labels / f"{i}.png")
    return images, labels


def test_folders(tmp_path, scene, folders):
    images, labels = folders
    (images / "notes.txt").write_text("passed over")
    (images / ".hidden.png").write_text("passed over")
    Image.open(images / "1.png").save(images / "alone.png")
    out, overlay = tmp_path / "new" / "out", tmp_path / "overlays"
    printed = words(run("refine", images, labels, "-o", out, "--overlay", overlay))
    assert sorted(os.listdir(out)) == ["0.png", "1.png", "2.png"]
    assert sorted(os.listdir(overlay)) == ["0.jpg", "1.jpg", "2.jpg"]
    for i in range(3):
        written = Image.open(out / f"{i}.png")
        assert written.mode == "P"
        assert np.array_equal(np.array(written), scene + 1)
    assert "refined 3" in printed
    assert "no labels 1 photographs: alone.png" in printed
    assert "filled 26.67% of the pixels" in printed
    assert "failed" not in printed


def test_invalid_file_does_not_stop_the_others(tmp_path, scene, folders):
    images, labels = folders
    (labels / "1.png").write_text("broken")
    Image.new("L", (5, 5)).save(labels / "orphan.png")
    Image.open(labels / "2.png").save(labels / "2.tif")
    printed = run("refine", images, labels, "-o", tmp_path / "out", code=1)
    assert os.listdir(tmp_path / "out") == ["0.png"]
    assert f"Error: LABELS {labels / '1.png'}: not a picture" in printed
    assert f"Error: LABELS {labels / 'orphan.png'}: no photograph of that name" in printed
    assert f"{labels}: several files named 2: 2.png, 2.tif" in printed
    assert "refined 1 failed 3: 1.png, 2, orphan.png" in words(printed)


def test_unexpected_error_does_not_stop_the_others(tmp_path, scene, folders, monkeypatch):
    images, labels = folders
    real, calls = segkernels.dense_crf, []

    def sometimes(*arguments, **parameters):
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("odd")
        return real(*arguments, **parameters)

    monkeypatch.setattr(inference, "dense_crf", sometimes)
    printed = run("refine", images, labels, "-o", tmp_path / "out", code=1)
    assert "KeyError: 'odd'" in printed
    assert len(os.listdir(tmp_path / "out")) == 2


def test_masks_in_folders_need_the_unknown_option(tmp_path, scene, folders):
    images, labels = folders
    Image.fromarray(scene * np.uint8(255)).save(labels / "1.png")
    printed = run("refine", images, labels, "-o", tmp_path / "out", code=1)
    assert "just one class beside index 255" in printed
    printed = run("refine", images, labels, "-o", tmp_path / "out", "--unknown", "none")
    assert "refined" in printed


def test_folder_errors(tmp_path, scene, folders):
    images, labels = folders
    out = tmp_path / "out"
    printed = words(run("refine", images, tmp_path / "grey.png", "-o", out, code=2))
    assert "expected two files or two folders, got one of each" in printed
    assert "the same files" in words(run("refine", images, images, "-o", out, code=2))
    assert "holds the inputs" in words(run("refine", images, labels, "-o", labels, code=2))
    twice = run("refine", images, labels, "-o", out, "--overlay", out, code=2)
    assert "expected another folder than -o's" in words(twice)
    (tmp_path / "empty").mkdir()
    nothing = run("refine", images, tmp_path / "empty", "-o", out, code=1)
    assert "Error: no photograph in" in nothing
    blocked = run("refine", images, labels, "-o", tmp_path / "grey.png" / "out", code=1)
    assert "cannot be made" in blocked


# --- the demonstration


def test_demo(tmp_path):
    printed = run("demo", "-o", tmp_path / "demo")
    files = ["image.png", "labels.png", "overlay.png", "refined.png", "truth.png"]
    assert sorted(os.listdir(tmp_path / "demo")) == files
    assert str(tmp_path / "demo" / "overlay.png") in printed
    rough, refined, truth = (
        np.array(Image.open(tmp_path / "demo" / f"{name}.png"))
        for name in ("labels", "refined", "truth")
    )
    before, after = accuracy(rough, truth), accuracy(refined, truth)
    assert f"{before:.2%}" in printed
    assert f"{after:.2%}" in printed
    assert f"{mean_iou(refined, truth, len(CLASSES)):.2%}" in printed
    assert before < 0.9
    assert after > 0.97
    painted = rough != UNKNOWN
    assert accuracy(refined[painted], truth[painted]) > accuracy(rough[painted], truth[painted])


def test_demo_equals_the_refine_command(tmp_path):
    folder = tmp_path / "demo"
    run("demo", "-o", folder)
    run("refine", folder / "image.png", folder / "labels.png", "-o", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (folder / "refined.png").read_bytes()


def test_demo_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    printed = run("demo", "-o", tmp_path / "file", code=1)
    assert "Error: -o" in printed
    assert "cannot be made" in printed


def test_scene():
    image, rough, truth = (demo_scene(name) for name in ("image", "labels", "truth"))
    assert image.shape == (360, 480, 3)
    assert truth.shape == rough.shape == (360, 480)
    assert set(np.unique(truth)) == set(range(len(CLASSES)))
    assert set(np.unique(rough)) == set(range(len(CLASSES) + 1))


def test_scores():
    truth = np.array([[0, 0, 1, 1]])
    labels = np.array([[0, 1, 1, 7]])
    assert accuracy(labels, truth) == 0.5
    assert mean_iou(labels, truth, 3) == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_help_lists_the_commands():
    printed = run("--help")
    assert "refine" in printed
    assert "demo" in printed
    assert "--srgb" in run("refine", "--help")


@pytest.mark.slow
def test_in_a_subprocess(tmp_path, scene):
    command = [sys.executable, "-c", "from segkernels.cli import main; main()", "refine"]
    files = [str(tmp_path / "image.png"), str(tmp_path / "grey.png"), "-o", str(tmp_path / "o.png")]
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert np.array_equal(np.array(Image.open(tmp_path / "o.png")), scene)
    files[0] = str(tmp_path / "nothing.npy")
    (tmp_path / "nothing.npy").write_text("")
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: IMAGE ")
    assert done.stderr.count("\n") == 1
