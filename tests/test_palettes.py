"""Palettes: those of known data sets, and the formats of files."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from test_refine import run

from segkernels.cli.files import OptionError
from segkernels.cli.palettes import known_palettes, read_palette


def voc_colour(index):
    """A colour of PASCAL VOC: its bits are those of the index, three at a time."""
    colour = [0, 0, 0]
    for bit in range(7, -1, -1):
        for channel in range(3):
            colour[channel] |= (index & 1) << bit
            index >>= 1
    return tuple(colour)


def test_pascal_voc():
    palette = read_palette("voc")
    assert palette.indices == {voc_colour(i): i for i in range(21)} | {(224, 224, 192): 21}
    assert voc_colour(255) == (224, 224, 192)
    assert palette.ignored == {(224, 224, 192)}


def test_known_palettes():
    assert known_palettes() == ["ade20k", "cityscapes", "voc"]
    city, ade = read_palette("cityscapes"), read_palette("ade20k")
    train = [colour for colour, index in city.indices.items() if index < 19]
    assert len(train) == 19
    assert city.indices[128, 64, 128] == 0  # road
    assert city.indices[119, 11, 32] == 18  # bicycle
    assert city.indices[0, 0, 0] == 19  # unlabeled
    assert len(ade.indices) == 150  # with black, and two classes of one colour
    assert ade.indices[0, 0, 0] == 0
    assert ade.indices[120, 120, 120] == 1  # wall
    assert ade.indices[140, 140, 140] == 7  # road; the skyscraper, 49, has its colour
    assert ade.indices[92, 0, 255] == 150  # flag
    assert (city.names[0], city.names[18], len(city.names)) == ("road", "bicycle", 29)
    assert (ade.names[0], ade.names[7], ade.names[49]) == ("other", "road", "skyscraper")
    assert len(ade.names) == 151
    assert not city.ignored
    assert not ade.ignored


@pytest.mark.parametrize(
    "text",
    [
        "0 0 0 background\n128 0 0 road\n7 8 9 ignore\n",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,0,0::\nignore:7,8,9::\n",
        "name,r,g,b\nbackground,0,0,0\nroad,128,0,0\nignore,7,8,9\n",
        "name,r,g,b\r\n0,background,0, 0, 0\r\n1,road 2,128, 0, 0\r\n2,ignore,7, 8, 9\r\n",
        "GIMP Palette\nName: mine\nColumns: 4\n#\n  0   0   0 sky\n128   0   0 a\n7 8 9\tIgnore\n",
        "\ufeff0,0,0,background\n128,0,0,road\n7,8,9,ignore\n",
        "#000000 background\n\n# and\n#800000\nignore #070809\n",
    ],
)
def test_text_files(tmp_path, text):
    path = tmp_path / "colours.txt"
    path.write_bytes(text.encode())
    palette = read_palette(str(path))
    assert palette.indices == {(0, 0, 0): 0, (128, 0, 0): 1, (7, 8, 9): 2}
    assert palette.ignored == {(7, 8, 9)}
    assert palette.names[2].lower() == "ignore"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("128 0 0 traffic  light", "traffic light"),
        ("128 0 0 class 1", "class 1"),
        ("route 66 b 128 0 0", "route 66 b"),
        ("128\t0\t0\tsky", "sky"),
        ("4,traffic light 2,128,0,0", "traffic light 2"),
        ("person:128,0,0:head,hand:walk", "person"),
        ('"traffic light": [128, 0, 0],', "traffic light"),
        ("#800000 'road'", "road"),
        ("a b #800000", "a b"),
        ("#800000", None),
        ("128 0 0", None),
        ("128,0,0,,", None),
    ],
)
def test_names(tmp_path, line, name):
    path = tmp_path / "colours.txt"
    path.write_text(f"1 2 3 first\n{line}\n")
    palette = read_palette(str(path))
    assert palette.indices == {(1, 2, 3): 0, (128, 0, 0): 1}
    assert palette.names == {0: "first"} | ({} if name is None else {1: name})


def test_first_of_two_classes_with_one_colour(tmp_path):
    path = tmp_path / "colours.txt"
    path.write_text("1 2 3 a\n1 2 3 b\n4 5 6 c\n")
    assert read_palette(str(path)).indices == {(1, 2, 3): 0, (4, 5, 6): 2}


def test_pictures(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8))
    picture.putpalette([0, 0, 0, 128, 0, 0, 1, 2, 3])
    picture.save(tmp_path / "a.png")
    indices = read_palette(str(tmp_path / "a.png")).indices
    assert [indices[c] for c in ((0, 0, 0), (128, 0, 0), (1, 2, 3))] == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the colours of classes, found none"),
        (b"road\nsky\n", "found none"),
        (b"1 2 3 a\nroad\n", "line 2: expected one colour, as 128 0 0 or #800000, got 'road'"),
        (b"1 2 300 a\n", "line 1: expected one colour"),
        (b"[[0, 0, 0], [128, 0, 0]]", "line 1: expected one colour"),
        (b"0 128 64 128 road\n", "line 1: expected one colour"),
        (b"1 2 " + b"3" * 5000, "line 1: expected one colour"),
        (b"\0\0\0\0", "cannot be read"),
        (b"#00000 a\n#800000 b\n", "line 1: expected one colour"),
        (b"0, 0, 0 a\n1 2 3 b\n", "line 1: expected one colour"),
        (b"1 2 3 a\n" * (1 << 18), "expected at most 1048576 bytes"),
    ],
)
def test_invalid_files(tmp_path, content, message):
    path = tmp_path / "colours.txt"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=re.escape(message)) as caught:
        read_palette(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_unknown_name():
    with pytest.raises(OptionError, match="expected ade20k, cityscapes, voc or a file, got coco"):
        read_palette("coco")


def test_command(tmp_path):
    """A VOC mask in colours keeps its background, as a picture and as probabilities."""
    rows = np.zeros((24, 36, 3), np.uint8)
    rows[6:18, 9:15], rows[6:18, 22:27] = voc_colour(3), voc_colour(15)
    Image.fromarray(rows).save(tmp_path / "labels.png")
    Image.fromarray(rows + 20).save(tmp_path / "image.png")
    files = (tmp_path / "image.png", tmp_path / "labels.png")
    assert "--palette" in run("refine", *files, "-o", tmp_path / "out.png", code=2)
    run("refine", *files, "-o", tmp_path / "out.png", "--palette", "voc")
    assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), rows)
    run("refine", *files, "-o", tmp_path / "out.npy", "--palette", "voc")
    probs = np.load(tmp_path / "out.npy")
    assert probs.shape == (16, 24, 36)
    assert [int(i) for i in np.unique(probs.argmax(axis=0))] == [0, 3, 15]
    printed = run("refine", *files, "-o", tmp_path / "x.png", "--palette", "cityscapes", code=1)
    assert "expected colours of --palette cityscapes, got #" in printed
    assert (
        run("refine", *files, "-o", tmp_path / "x.png", "--palette", "x", code=2).count("\n") == 1
    )


def test_colours_of_probabilities(tmp_path):
    """The colours in a .npz of refine have indices in a palette, as those of a picture."""
    probs = np.full((2, 4, 6), 0.5, np.float32)
    Image.new("RGB", (6, 4)).save(tmp_path / "image.png")
    np.savez(tmp_path / "a.npz", probs=probs, colours=np.array([voc_colour(3), voc_colour(1)]))
    files = (tmp_path / "image.png", tmp_path / "a.npz", "-o", tmp_path / "out.npy")
    assert "pass --palette" in run("refine", *files, code=1)
    run("refine", *files, "--palette", "voc")
    assert np.load(tmp_path / "out.npy").shape == (4, 4, 6)
    printed = run("refine", *files, "--palette", "cityscapes", code=1)
    assert "expected colours of --palette cityscapes, got #" in printed


def test_palette_file_is_not_overwritten(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8))
    picture.putpalette([0, 0, 0, 128, 0, 0])
    picture.save(tmp_path / "palette.png")
    Image.new("RGB", (2, 1)).save(tmp_path / "image.png")
    files = (tmp_path / "image.png", tmp_path / "palette.png")
    Image.open(files[1]).save(tmp_path / "labels.png")
    files = (tmp_path / "image.png", tmp_path / "labels.png", "-o", tmp_path / "palette.png")
    assert "is an input" in run("refine", *files, "--palette", tmp_path / "palette.png", code=2)


def test_empty_name():
    with pytest.raises(OptionError, match="expected ade20k"):
        read_palette("")
