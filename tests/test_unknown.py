"""Which values of label maps mark unknown pixels, and when the user must say it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from test_refine import run

from segkernels.cli.files import OptionError
from segkernels.cli.label_maps import read_labels
from segkernels.cli.palettes import read_palette
from segkernels.cli.unknown import Meaning

RED, GREEN, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)
VOC_RED, VOC_GREEN, VOC_BORDER = (128, 0, 0), (0, 128, 0), (224, 224, 192)
COLOURS = np.random.default_rng(3).integers(0, 256, (256, 3), np.uint8)
GREYS = [level for level in range(256) for _ in range(3)]


def save(path, values, mode):
    """Save values as a picture or an array: "L", "P", "I;16", "npy", "RGB" (of grey levels)."""
    values = np.array([values])
    if mode == "npy":
        path = path.with_suffix(".npy")
        np.save(path, values)
    elif mode == "P":
        picture = Image.fromarray(values.astype(np.uint8))
        picture.putpalette(np.random.default_rng(0).integers(1, 255, 768).tolist())
        picture.save(path)
    else:
        Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8)).save(path)
    return path


def error(path, **meaning):
    with pytest.raises(OptionError) as caught:
        read_labels(path, Meaning(**meaning))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["L", "P", "npy"])
@pytest.mark.parametrize("values", [(0, 255), (7, 255), (200, 255), (0, 255, 255)])
def test_two_values_are_classes(tmp_path, mode, values):
    labels = read_labels(save(tmp_path / "a.png", values, mode))
    assert labels.keys == tuple(sorted(set(values)))
    assert "255" in labels.unknown
    assert "is one of just two values, so a class" in labels.unknown


@pytest.mark.parametrize("mode", ["L", "P", "npy"])
@pytest.mark.parametrize("values", [(0, 1, 255), (0, 11, 3, 255), (5, 150, 255), (0, 126, 255)])
def test_255_is_unknown_beside_classes(tmp_path, mode, values):
    labels = read_labels(save(tmp_path / "a.png", values, mode))
    assert labels.keys == tuple(sorted(set(values) - {255}))
    assert labels.positions[0, -1] == -1
    assert labels.unknown.startswith("index 255")


@pytest.mark.parametrize("mode", ["L", "P", "npy"])
@pytest.mark.parametrize(
    "values",
    [(0, 151, 255), (0, 254, 255), (0, 64, 128, 191, 255), (0, 127, 255), (0, 128, 255)],
)
def test_255_of_masks_with_grey_levels_must_be_said(tmp_path, mode, values):
    path = save(tmp_path / "a.png", values, mode)
    middle = 127 if 127 in values else 128
    assert f"pass --unknown none|255|{middle}" in error(path)
    assert read_labels(path, Meaning(("none",))).keys == values
    assert read_labels(path, Meaning(("255",))).keys == values[:-1]
    # 255 is no class of 255 classes.
    assert read_labels(path, Meaning(num_classes=255)).unknown.startswith("index 255")
    assert f"--unknown none|255|{middle}" in error(path, num_classes=256)


def test_smoothed_mask_stops_the_command(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    small = Image.fromarray(mask).resize((31, 21), Image.Resampling.BILINEAR)
    small.resize((60, 40), Image.Resampling.BILINEAR).save(tmp_path / "mask.png")
    Image.fromarray(mask).convert("RGB").save(tmp_path / "image.png")
    files = (tmp_path / "image.png", tmp_path / "mask.png", "-o", tmp_path / "out.png")
    printed = run("refine", *files, code=2)
    assert "--unknown none|255|128" in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_stray_pixel_warns(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    mask[0, 0] = 3
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask).convert("RGB").save(tmp_path / "image.png")
    files = (tmp_path / "image.png", tmp_path / "mask.png", "-o", tmp_path / "out.png")
    printed = run("refine", *files)
    assert "index 255 is on 17% of the pixels and read as unknown" in printed
    assert "unknown: index 255" in printed
    assert "Warning" not in run("refine", *files, "--unknown", "none")
    assert np.array_equal(np.array(Image.open(tmp_path / "out.png")) == 255, mask == 255)


@pytest.mark.parametrize("middle", [32639, 32767, 32768, 32896])
def test_trimaps_of_sixteen_bits(tmp_path, middle):
    path = save(tmp_path / "a.png", (0, middle, 65535), "I;16")
    assert f"pass --unknown none|65535|{middle}" in error(path)
    assert read_labels(path, Meaning((str(middle),))).keys == (0, 65535)
    assert read_labels(save(path, (0, 65535), "I;16")).keys == (0, 65535)
    plain = read_labels(save(path, (0, 9, 65535), "I;16"))
    assert plain.keys == (0, 9)


def test_minus_one_and_255_in_arrays(tmp_path):
    labels = read_labels(save(tmp_path / "a", (-1, 0, 255), "npy"))
    assert labels.keys == (0, 255)
    assert labels.positions.tolist() == [[-1, 0, 1]]
    labels = read_labels(save(tmp_path / "a", (-1, 0, 0), "npy"))
    assert labels.keys == (0,)
    assert "none|255|128" in error(save(tmp_path / "a", (-1, 0, 128, 255), "npy"))
    assert "none|255|128" in error(save(tmp_path / "a", (0, 255, 300), "npy"))


# --- black


def colours(path, rows):
    Image.fromarray(np.array(rows, np.uint8)).save(path)
    return path


def test_black_of_a_background_must_be_said(tmp_path):
    path = colours(tmp_path / "a.png", [[BLACK, BLACK, BLACK, RED, GREEN]])
    text = error(path)
    assert "black is on 60% of the pixels" in text
    assert "--palette ade20k|cityscapes|voc|FILE" in text
    assert "--unknown none" in text
    assert "--unknown black" in text
    assert read_labels(path, Meaning(("none",))).keys == (BLACK, GREEN, RED)
    assert read_labels(path, Meaning(("black",))).keys == (GREEN, RED)
    half = colours(tmp_path / "b.png", [[BLACK, BLACK, RED, GREEN]])
    assert read_labels(half).keys == (GREEN, RED)


def test_black_in_palettes_must_be_said(tmp_path):
    picture = Image.fromarray(np.array([[2, 2, 2, 1, 0]], np.uint8))
    picture.putpalette([*RED, *GREEN, *BLACK])
    picture.save(tmp_path / "a.png")
    assert "black is on 60% of the pixels" in error(tmp_path / "a.png")
    assert read_labels(tmp_path / "a.png", Meaning(("black",))).keys == (0, 1)
    assert read_labels(tmp_path / "a.png", Meaning(palette=read_palette("voc"))).keys == (0, 1, 2)


def test_transparent_pixels_do_not_count(tmp_path):
    opaque = [(*RED, 255), (*GREEN, 255), (*BLACK, 255)]
    rows = [[*opaque, (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)]]
    labels = read_labels(colours(tmp_path / "a.png", rows))
    assert labels.keys == (GREEN, RED)
    assert labels.positions.tolist() == [[1, 0, -1, -1, -1, -1]]


def test_palette_makes_black_a_class(tmp_path):
    path = colours(tmp_path / "a.png", [[BLACK, BLACK, VOC_RED, VOC_GREEN, VOC_BORDER]])
    labels = read_labels(path, Meaning(palette=read_palette("voc")))
    assert labels.keys == (BLACK, VOC_GREEN, VOC_RED)
    assert labels.indices == (0, 2, 1)
    assert labels.positions.tolist() == [[0, 0, 2, 1, -1]]
    assert labels.unknown == "#e0e0c0"
    black = read_labels(path, Meaning(("black",), palette=read_palette("voc")))
    assert black.keys == (VOC_GREEN, VOC_RED)


def test_colours_of_voc_warn(tmp_path):
    path = colours(tmp_path / "a.png", [[BLACK, VOC_RED, VOC_GREEN, VOC_GREEN]])
    labels = read_labels(path)
    assert labels.unknown == "black"
    assert "these are PASCAL VOC's colours, and black is read as unknown" in labels.doubt
    assert read_labels(colours(path, [[BLACK, RED, GREEN, GREEN]])).doubt == ""


def test_grey_levels_in_colour_pictures(tmp_path):
    path = colours(tmp_path / "a.png", [[BLACK, WHITE, WHITE, (128, 128, 128)]])
    assert "pass --unknown none|black|white" in error(path)
    assert read_labels(path, Meaning(("none",))).num_classes == 3
    assert read_labels(colours(path, [[BLACK, WHITE, WHITE]])).keys == (BLACK, WHITE)


def test_palette_of_grey_levels_is_greyscale(tmp_path):
    for values, keys in (((0, 1, 2), (0, 1, 2)), ((0, 1, 255), (0, 1)), ((0, 255), (0, 255))):
        picture = Image.fromarray(np.array([values], np.uint8))
        picture.putpalette(GREYS)
        picture.save(tmp_path / "a.png")
        assert read_labels(tmp_path / "a.png").keys == keys


# --- folders


@pytest.fixture
def folders(tmp_path):
    """Folders of photographs and labels, and a function that saves a pair."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()

    def save_pair(name, values):
        values = np.array(values, np.uint8)
        # Each value has its own colour, so that the CRF changes nothing.
        photograph = values if values.ndim == 3 else COLOURS[values]
        Image.fromarray(photograph).save(images / f"{name}.png")
        Image.fromarray(values).save(labels / f"{name}.png")

    return images, labels, tmp_path / "out", save_pair


def block(*values):
    """(8, 8 n): a square of each value."""
    return np.repeat(np.repeat(np.array([values]), 8, axis=0), 8, axis=1)


def test_folder_of_masks(folders):
    images, labels, out, save_pair = folders
    for name, values in {"both": (0, 255), "empty": (0, 0), "full": (255, 255)}.items():
        save_pair(name, block(*values))
    run("refine", images, labels, "-o", out)
    for name in ("both", "empty", "full"):
        before, after = (Image.open(folder / f"{name}.png") for folder in (labels, out))
        assert np.array_equal(np.array(before), np.array(after)), name


def test_folder_is_judged_as_a_whole(folders):
    images, labels, out, save_pair = folders
    save_pair("two", block(0, 255))
    save_pair("three", block(0, 255, 4))
    run("refine", images, labels, "-o", out)
    # 255 is unknown in the folder, so also in the map of two values.
    assert np.array(Image.open(out / "two.png")).max() == 0
    assert set(np.unique(np.array(Image.open(out / "three.png")))) == {0, 4}


@pytest.mark.parametrize("odd", [128, 200])
def test_one_odd_mask_stops_a_folder_before_the_first_file(folders, odd):
    images, labels, out, save_pair = folders
    save_pair("a", block(0, 255))
    save_pair("b", block(0, odd, 255))
    printed = run("refine", images, labels, "-o", out, code=2)
    assert f"LABELS {labels}: 255 may be a class" in printed
    assert "--unknown none|255|128" in printed
    assert not out.exists()
    run("refine", images, labels, "-o", out, "--unknown", "none")
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]


def test_black_of_a_folder(folders):
    images, labels, out, save_pair = folders
    rows = np.zeros((8, 40, 3), np.uint8)
    rows[:, :12], rows[:, 12:18] = VOC_RED, VOC_GREEN
    save_pair("a", rows)
    rows[:, :24] = VOC_RED  # here black is on less than half
    save_pair("b", rows)
    printed = run("refine", images, labels, "-o", out, "--unknown", "auto")
    assert "Warning: LABELS" in printed
    rows[:] = BLACK
    rows[:, :2] = VOC_RED
    save_pair("c", rows)
    assert "--palette" in run("refine", images, labels, "-o", out, code=2)
    run("refine", images, labels, "-o", out, "--palette", "voc")
    for name in "abc":
        before, after = (np.array(Image.open(f / f"{name}.png")) for f in (labels, out))
        assert np.array_equal(before, after), name


def test_folder_of_masks_of_one_and_eight_bits(folders):
    """A picture of one bit cannot hold 255, so it says nothing about it."""
    images, labels, out, save_pair = folders
    save_pair("a", block(0, 255))
    save_pair("b", block(0, 255))
    Image.open(labels / "b.png").convert("1").save(labels / "b.png")
    printed = run("refine", images, labels, "-o", out, code=1)
    assert "a.png: just one class beside index 255, which marks unknown pixels" in printed
    run("refine", images, labels, "-o", out, "--unknown", "none")
    assert np.array_equal(np.array(Image.open(out / "a.png")), block(0, 255))
    assert np.array_equal(np.array(Image.open(out / "b.png")), block(0, 255) > 0)


def test_masks_among_maps_of_more_values_warn(folders):
    images, labels, out, save_pair = folders
    save_pair("a", block(0, 255))
    save_pair("b", block(0, 1))
    printed = run("refine", images, labels, "-o", out)
    assert "1 maps (a.png) have just one class beside index 255" in printed
    assert "pass --unknown none if it is a class" in printed


def test_ignored_colour_of_a_palette_picture(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 5]], np.uint8))
    picture.putpalette([*BLACK, *VOC_RED, 1, 1, 1, 2, 2, 2, 3, 3, 3, *VOC_BORDER])
    picture.save(tmp_path / "a.png")
    labels = read_labels(tmp_path / "a.png", Meaning(palette=read_palette("voc")))
    assert labels.keys == (0, 1)
    assert labels.unknown == "index 5 (#e0e0c0)"


def test_palettes_of_a_folder_that_disagree_on_black(folders):
    images, labels, out, save_pair = folders
    for name, palette in {"a": [*BLACK, *VOC_RED, *VOC_GREEN], "b": [*BLACK, *RED, *GREEN]}.items():
        save_pair(name, block(0, 1, 2, 2, 1))
        picture = Image.open(labels / f"{name}.png")
        picture.putpalette(palette)
        picture.save(labels / f"{name}.png")
    printed = run("refine", images, labels, "-o", out)
    assert "the palettes differ: black is a class in some maps" in printed
    printed = run("refine", images, labels, "-o", out, "--unknown", "none")
    assert "Warning" not in printed


def test_minus_one_does_not_warn(tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    for name, values in {"a": (-1, 2), "b": (-1, 0, 2)}.items():
        np.save(labels / f"{name}.npy", block(*values))
        Image.fromarray(COLOURS[block(*values)]).save(images / f"{name}.png")
    assert "Warning" not in run("refine", images, labels, "-o", tmp_path / "out")
