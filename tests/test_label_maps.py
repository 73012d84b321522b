"""Label maps: file formats and modes, unknown pixels, and writing."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from segkernels.cli.files import PictureError, write_files
from segkernels.cli.label_maps import distinct_colours, encode_labels, read_labels
from segkernels.cli.unknown import Meaning

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


def write_labels(path, positions, like):
    write_files({path: encode_labels(path, positions, like)})


def colour_map(path, rows, mode="RGB"):
    Image.fromarray(np.array(rows, np.uint8)).convert(mode).save(path)
    return path


def palette_map(path, rows, palette, **options):
    image = Image.fromarray(np.array(rows, np.uint8))
    image.putpalette(palette)
    image.save(path, **options)
    return path


def grey_map(path, rows, dtype=np.uint8):
    Image.fromarray(np.array(rows, dtype)).save(path)
    return path


def array_map(path, values, dtype=None):
    np.save(path, np.array(values, dtype))
    return path


def error(path, **meaning):
    with pytest.raises(PictureError) as caught:
        read_labels(path, Meaning(**meaning))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- colour images


def test_colours_are_classes_and_black_is_unknown(tmp_path):
    path = colour_map(tmp_path / "a.png", [[RED, GREEN, BLACK], [BLUE, RED, BLACK]])
    labels = read_labels(path)
    assert labels.kind == "colour"
    assert labels.keys == (BLUE, GREEN, RED)
    assert labels.positions.tolist() == [[2, 1, -1], [0, 2, -1]]
    assert labels.num_classes == 3
    assert labels.unknown == "black"
    assert labels.size == (3, 2)


def test_mask_of_two_colours_has_two_classes(tmp_path):
    path = colour_map(tmp_path / "a.png", [[WHITE, BLACK]])
    labels = read_labels(path)
    assert labels.keys == (BLACK, WHITE)
    assert labels.unknown == "none (black is one of just two values, so a class)"
    assert read_labels(path, Meaning(("none",))).keys == (BLACK, WHITE)
    assert read_labels(path, Meaning(("black",))).keys == (WHITE,)


@pytest.mark.parametrize(
    ("unknown", "keys", "words"),
    [
        (("none",), (BLACK, BLUE, RED), "none"),
        (("red",), (BLACK, BLUE), "#ff0000"),
        (("#0000ff",), (BLACK, RED), "#0000ff"),
        (("black", "blue"), (RED,), "black, #0000ff"),
        (("rgb(1,2,3)",), (BLACK, BLUE, RED), "none"),
    ],
)
def test_given_unknown_colours(tmp_path, unknown, keys, words):
    labels = read_labels(colour_map(tmp_path / "a.png", [[RED, BLUE, BLACK]]), Meaning(unknown))
    assert labels.keys == keys
    assert labels.unknown == words


def test_more_colours_than_classes(tmp_path):
    path = colour_map(tmp_path / "a.png", [[RED, GREEN, BLUE, BLACK]])
    assert read_labels(path, Meaning(num_classes=3)).num_classes == 3
    assert read_labels(path, Meaning(num_classes=5)).num_classes == 5
    text = "expected at most 2 colours for the 2 classes given, got 3"
    assert text in error(path, num_classes=2)
    assert "for the 3 classes given, got 4" in error(path, num_classes=3, unknown=("none",))
    assert "for the 1 classes given, got 3" in error(path, num_classes=1)


def test_jpeg_is_rejected(tmp_path):
    rows = np.zeros((32, 32, 3), np.uint8)
    rows[8:20, 5:25], rows[20:, :9] = RED, (40, 160, 90)
    Image.fromarray(rows).save(tmp_path / "a.jpg")
    assert "JPEG is lossy" in error(tmp_path / "a.jpg")
    assert "save the labels as PNG" in error(tmp_path / "a.jpg")
    assert "expected at most 2 colours" in error(tmp_path / "a.jpg", num_classes=2)


def test_jpeg_saved_as_png_is_rejected(tmp_path):
    rows = np.zeros((160, 160, 3), np.uint8)
    rows[50:120, 30:150] = RED
    Image.fromarray(rows).save(tmp_path / "a.jpg", quality=90)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    text = error(tmp_path / "a.png")
    assert "expected a few colours, one a class, got" in text
    assert "half of them on less than 1%" in text


def test_photograph_is_rejected(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    number = len(np.unique(noise.reshape(-1, 3), axis=0))
    assert f"got {number} colours: a photograph" in error(tmp_path / "a.png")
    assert f"got {number}" in error(tmp_path / "a.png", num_classes=8)


def test_many_classes_are_accepted(tmp_path):
    rows = np.repeat(distinct_colours(range(150))[None], 40, axis=0)
    labels = read_labels(colour_map(tmp_path / "a.png", rows))
    assert labels.num_classes == len(np.unique(rows[0], axis=0))


def test_more_than_256_colours_with_num_classes(tmp_path):
    rows = np.arange(300 * 3).reshape(1, 300, 3) // 3 % 256
    rows[0, :, 1] = np.arange(300) // 256
    path = colour_map(tmp_path / "a.png", rows)
    assert "got 300 colours" in error(path)
    labels = read_labels(path, Meaning(("none",), num_classes=300))
    write_labels(tmp_path / "b.png", labels.positions, labels)
    assert np.array_equal(np.array(Image.open(tmp_path / "b.png")), rows)


def test_transparent_pixels_are_unknown(tmp_path):
    rows = [[(*RED, 255), (*BLUE, 128), (*WHITE, 127), (0, 0, 0, 0)]]
    labels = read_labels(colour_map(tmp_path / "a.png", rows, "RGBA"))
    assert labels.keys == (BLUE, RED)
    assert labels.positions.tolist() == [[1, 0, -1, -1]]
    write_labels(tmp_path / "b.png", np.array([[1, 0, 0, 1]]), labels)
    written = Image.open(tmp_path / "b.png")
    assert written.mode == "RGBA"
    expected = [[(*RED, 255), (*BLUE, 255), (*BLUE, 255), (*RED, 255)]]
    assert np.array_equal(np.array(written), expected)
    empty = colour_map(tmp_path / "c.png", [[(9, 9, 9, 0)]], "RGBA")
    assert "got transparent ones only" in error(empty)


def test_invalid_unknown_of_colours(tmp_path):
    path = colour_map(tmp_path / "a.png", [[RED, BLUE, BLACK]])
    assert "--unknown takes a colour, such as black or #000000" in error(path, unknown=("0",))
    assert "or a colour (black, #000000), got 'blakc'" in error(path, unknown=("blakc",))


def test_only_unknown_pixels(tmp_path):
    path = colour_map(tmp_path / "a.png", [[BLACK, BLACK]])
    assert "expected labelled pixels, got unknown ones only (black)" in error(path)


# --- palette images


def test_palette_indices_are_classes(tmp_path):
    path = palette_map(tmp_path / "a.png", [[1, 3], [2, 1]], [9, 9, 9, *RED, *BLACK, *GREEN])
    labels = read_labels(path)
    assert labels.kind == "palette"
    assert labels.keys == (1, 3)
    assert labels.positions.tolist() == [[0, 1], [-1, 0]]
    assert labels.colours.tolist() == [list(RED), list(GREEN)]
    assert labels.unknown == "index 2 (black)"


def test_pascal_voc(tmp_path):
    palette = VOC + [0] * (255 * 3 - len(VOC)) + [224, 224, 192]
    plain = read_labels(palette_map(tmp_path / "a.png", [[0, 1, 3]], palette))
    assert plain.keys == (0, 1, 3)
    assert plain.unknown == "none"
    void = read_labels(palette_map(tmp_path / "b.png", [[0, 1, 255]], palette))
    assert void.keys == (0, 1)
    assert void.unknown == "index 255 (#e0e0c0)"


@pytest.mark.parametrize(
    ("unknown", "keys"),
    [
        (("none",), (0, 1, 2)),
        (("1",), (0, 2)),
        (("#008000",), (0, 1)),
        (("green",), (0, 1)),
        (("0", "2"), (1,)),
        (("77",), (0, 1, 2)),
    ],
)
def test_palette_unknown(tmp_path, unknown, keys):
    labels = read_labels(palette_map(tmp_path / "a.png", [[0, 1, 2]], VOC), Meaning(unknown))
    assert labels.keys == keys


def test_palette_num_classes(tmp_path):
    path = palette_map(tmp_path / "a.png", [[0, 2, 5]], [*VOC, 64, 0, 0, 192, 0, 0])
    labels = read_labels(path, Meaning(num_classes=6))
    assert labels.keys == (0, 1, 2, 3, 4, 5)
    assert labels.positions.tolist() == [[0, 2, 5]]
    assert "expected indices in [0, 5) for the 5 classes given, got 5" in error(path, num_classes=5)
    assert "got 2 and 1 more" in error(path, num_classes=2)
    without = read_labels(path, Meaning(("0",), num_classes=6))
    assert without.keys == (1, 2, 3, 4, 5)
    assert without.positions.tolist() == [[-1, 1, 4]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_palette_round_trip(tmp_path, suffix):
    rng = np.random.default_rng(1)
    palette = rng.integers(0, 255, 768).tolist()
    path = palette_map(tmp_path / f"a{suffix}", rng.integers(3, 200, (9, 11)), palette)
    labels = read_labels(path)
    assert labels.unknown == "none"
    write_labels(tmp_path / f"b{suffix}", labels.positions, labels)
    before, after = Image.open(path), Image.open(tmp_path / f"b{suffix}")
    assert after.mode == "P"
    assert np.array_equal(np.array(after), np.array(before))
    used = 3 * (int(np.array(before).max()) + 1)
    assert after.getpalette()[:used] == palette[:used]


def test_palette_transparency_is_kept(tmp_path):
    path = palette_map(tmp_path / "a.png", [[0, 1, 2]], VOC, transparency=0)
    labels = read_labels(path)
    assert labels.keys == (0, 1, 2)
    write_labels(tmp_path / "b.png", labels.positions, labels)
    assert Image.open(tmp_path / "b.png").info["transparency"] == 0


# --- greyscale images


def test_grey_values_are_classes(tmp_path):
    labels = read_labels(grey_map(tmp_path / "a.png", [[0, 7], [255, 11]]))
    assert labels.kind == "index"
    assert labels.keys == (0, 7, 11)
    assert labels.positions.tolist() == [[0, 1], [-1, 2]]
    assert labels.unknown == "index 255"


def test_grey_mask_has_two_classes(tmp_path):
    path = grey_map(tmp_path / "a.png", [[0, 255]])
    assert read_labels(path).keys == (0, 255)


def test_grey_unknown_is_an_index(tmp_path):
    path = grey_map(tmp_path / "a.png", [[0, 11, 3]])
    assert read_labels(path, Meaning(("11",))).keys == (0, 3)
    assert "--unknown takes an index for labels without colours" in error(path, unknown=("black",))


def test_grey_noise_is_rejected(tmp_path):
    values = np.zeros((100, 100), np.uint8)
    values[0, :80] = np.arange(80)
    text = error(grey_map(tmp_path / "a.png", values))
    assert "expected a few values, one a class, got 80 values, half of them on less than" in text
    assert read_labels(tmp_path / "a.png", Meaning(num_classes=80)).num_classes == 80


def test_sixteen_bit_round_trip(tmp_path):
    path = grey_map(tmp_path / "a.png", [[0, 1000], [65535, 40000]], np.uint16)
    labels = read_labels(path)
    assert labels.keys == (0, 1000, 40000)
    assert labels.unknown == "index 65535"
    write_labels(tmp_path / "b.png", np.array([[2, 1], [0, 2]]), labels)
    written = np.array(Image.open(tmp_path / "b.png"))
    assert written.dtype.itemsize > 1  # uint16, or int32 from older releases of Pillow
    assert written.tolist() == [[40000, 1000], [0, 40000]]


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_round_trip(tmp_path, mode):
    Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert(mode).save(tmp_path / "a.png")
    labels = read_labels(tmp_path / "a.png")
    write_labels(tmp_path / "b.png", labels.positions, labels)
    before, after = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert after.mode == mode
    assert np.array_equal(np.array(after), np.array(before))


def test_grey_alpha_is_unknown(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putalpha(Image.fromarray(np.array([[255, 0, 200]], np.uint8)))
    image.save(tmp_path / "a.png")
    labels = read_labels(tmp_path / "a.png")
    assert labels.positions.tolist() == [[0, -1, 1]]
    assert labels.keys == (0, 2)  # 1 is no class


# --- arrays


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint32])
def test_integer_arrays(tmp_path, dtype):
    labels = read_labels(array_map(tmp_path / "a.npy", [[0, 3], [100, 0]], dtype))
    assert labels.kind == "index"
    assert labels.keys == (0, 3, 100)
    assert labels.mode == "L"
    write_labels(tmp_path / "b.png", labels.positions, labels)
    assert np.array(Image.open(tmp_path / "b.png")).tolist() == [[0, 3], [100, 0]]


def test_array_unknowns(tmp_path):
    labels = read_labels(array_map(tmp_path / "a.npy", [[0, -1, 255, 1]]))
    assert labels.positions.tolist() == [[0, -1, -1, 1]]
    assert labels.unknown == "index -1, index 255"
    path = array_map(tmp_path / "b.npy", [[0, -100, 1]])
    assert "expected indices from 0, got -100" in error(path)
    assert "pass --unknown -100" in error(path)
    assert read_labels(path, Meaning(("-100",))).keys == (0, 1)


def test_large_indices_in_arrays(tmp_path):
    labels = read_labels(array_map(tmp_path / "a.npy", [[0, 300]]))
    write_labels(tmp_path / "b.png", labels.positions, labels)
    assert np.array(Image.open(tmp_path / "b.png")).tolist() == [[0, 300]]
    path = array_map(tmp_path / "c.npy", [[0, 70000]])
    assert "expected indices from 0 to 65535, got values from 0 to 70000" in error(path)


def test_boolean_arrays_are_masks(tmp_path):
    assert read_labels(array_map(tmp_path / "a.npy", [[True, False]])).keys == (0, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_probabilities(tmp_path, dtype):
    probs = np.array([[[0.75, 0.25]], [[0.25, 0.75]]], dtype)
    labels = read_labels(array_map(tmp_path / "a.npy", probs))
    assert labels.kind == "probabilities"
    assert labels.probs is not None
    assert labels.probs.dtype == np.float32
    assert np.array_equal(labels.probs, probs)
    assert labels.positions.tolist() == [[0, 1]]
    write_labels(tmp_path / "b.png", labels.positions, labels)
    assert np.array(Image.open(tmp_path / "b.png")).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("values", "meaning", "message"),
    [
        ([[[0.5, np.nan]]], {}, "expected finite probabilities, got NaN or infinity"),
        ([[[0.5, np.inf]]], {}, "expected finite probabilities"),
        ([[[0.5, -0.1]]], {}, "between 0 and 1, got values from -0.1 to 0.5 (logits need"),
        ([[[0.5, 3.0]]], {}, "between 0 and 1, got values from 0.5 to 3"),
        ([0.5, 0.5], {}, "(H, W), or integer labels (H, W), got float64 (2,)"),
        (
            [[0.5, 3.0]],
            {},
            "got values from 0.5 to 3 (logits need a sigmoid first; labels need int",
        ),
        (np.zeros((0, 2, 2)), {}, "got float64 (0, 2, 2)"),
        (np.zeros((1, 1, 2, 2), int), {}, "got int64 (1, 1, 2, 2)"),
        ([[1 + 2j]], {}, "got complex128 (1, 1)"),
        (np.full((2, 1, 1), 0.5), {"num_classes": 3}, "of 3 classes (C, H, W), got shape (2, 1, 1"),
        (np.full((2, 1, 1), 0.5), {"unknown": ("0",)}, "--unknown cannot name pixels in an array"),
    ],
)
def test_invalid_arrays(tmp_path, values, meaning, message):
    assert message in error(array_map(tmp_path / "a.npy", values), **meaning)


def test_invalid_files(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    assert f"LABELS {tmp_path / 'a.png'}: not a picture" in error(tmp_path / "a.png")
    Image.new("CMYK", (2, 2)).save(tmp_path / "b.tif")
    assert "got Pillow's mode CMYK" in error(tmp_path / "b.tif")


@given(st.data())
def test_colour_map_round_trip(tmp_path_factory, data):
    colours = data.draw(
        st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=3, max_size=40, unique=True)
    )
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    picks = data.draw(
        st.lists(st.integers(0, len(colours) - 1), min_size=height * width, max_size=height * width)
    )
    rows = np.array(colours, np.uint8)[np.array(picks).reshape(height, width)]
    folder = tmp_path_factory.mktemp("maps")
    labels = read_labels(colour_map(folder / "a.png", rows), Meaning(("none",)))
    write_labels(folder / "b.png", labels.positions, labels)
    assert np.array_equal(np.array(Image.open(folder / "b.png")), rows)


def test_distinct_colours_are_distinct():
    colours = distinct_colours(range(64)).astype(int)
    steps = np.abs(colours[:, None] - colours).sum(axis=2)
    assert steps[~np.eye(64, dtype=bool)].min() > 5
    assert np.array_equal(distinct_colours([3]), distinct_colours(range(4))[3:])


def test_error_names_the_file(tmp_path):
    path = tmp_path / "some labels [1].png"
    path.write_text("x")
    assert re.match(rf"LABELS {re.escape(str(path))}: ", error(path))


def deep_png(path, values):
    """A PNG of 16 bits a channel."""
    path.write_bytes(imagecodecs.png_encode(np.array(values, np.uint16)))
    return path


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_png_is_rejected(tmp_path, channels):
    """Pillow keeps the upper 8 bits, so that classes merge."""
    path = deep_png(tmp_path / "a.png", np.full((4, 5, channels), 300))
    assert "a PNG of 16 bits a channel, of which Pillow keeps the upper 8" in error(path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_transparent_value(tmp_path, mode):
    """A PNG of greys or colours may name one that is transparent."""
    rows = np.array([[0, 1, 2, 3]], np.uint8)
    transparent: int | tuple[int, int, int] = 3
    if mode == "RGB":
        rows, transparent = np.array([RED, GREEN, BLUE, WHITE], np.uint8)[rows], WHITE
    Image.fromarray(rows).save(tmp_path / "a.png", transparency=transparent)
    labels = read_labels(tmp_path / "a.png")
    assert (labels.positions < 0).tolist() == [[False, False, False, True]]
    write_labels(tmp_path / "b.png", np.array([[0, 1, 2, 2]]), labels)
    written = Image.open(tmp_path / "b.png")
    assert written.mode == {"L": "L", "RGB": "RGBA"}[mode]
    assert np.array(written.convert("RGBA"))[..., 3].tolist() == [[255] * 4]


def test_index_beyond_the_palette_is_a_class(tmp_path):
    path = palette_map(tmp_path / "a.png", [[0, 1, 2, 3]], [*RED, *GREEN, *BLUE])
    assert len(Image.open(path).getpalette()) == 9
    labels = read_labels(path)
    assert labels.keys == (0, 1, 2, 3)
    assert labels.unknown == "none"


def test_one_bit_values_are_classes(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    labels = read_labels(tmp_path / "a.png")
    assert labels.keys == (0, 1)
    assert labels.unknown == "none"


def test_float_tiff_is_probabilities(tmp_path):
    foreground = np.array([[0.25, 0.75]], np.float32)
    for dtype in (np.float16, np.float32, np.float64):
        tifffile.imwrite(tmp_path / "a.tif", foreground.astype(dtype))
        labels = read_labels(tmp_path / "a.tif")
        assert labels.foreground_shape == (1, 2)
        assert labels.positions.tolist() == [[0, 1]]
    probs = np.random.default_rng(0).dirichlet(np.ones(5), (6, 7)).astype(np.float32)
    for bands, layout in ((np.moveaxis(probs, -1, 0), "separate"), (probs, "contig")):
        tifffile.imwrite(tmp_path / "a.tif", bands, photometric="minisblack", planarconfig=layout)
        labels = read_labels(tmp_path / "a.tif")
        assert np.array_equal(labels.probs, np.moveaxis(probs, -1, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparent_pixels_of_tiff(tmp_path, dtype):
    rows = np.dstack([[[0, 1, 2]], [[255, 255, 0]]]).astype(dtype)
    tifffile.imwrite(
        tmp_path / "a.tif",
        rows,
        photometric="minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"],
    )
    assert read_labels(tmp_path / "a.tif").positions.tolist() == [[0, 1, -1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
@pytest.mark.parametrize("orientation", [1, 2, 6])
def test_orientation_of_tiff(tmp_path, dtype, orientation):
    """As the photograph's, which has the same tag."""
    rows = np.array([[0, 1, 0], [1, 1, 0]], dtype)
    tifffile.imwrite(tmp_path / "a.tif", rows, extratags=[(274, "H", 1, orientation, True)])
    labels = read_labels(tmp_path / "a.tif")
    assert labels.orientation == orientation
    turned = {1: rows, 2: rows[:, ::-1], 6: np.rot90(rows, -1)}[orientation]
    assert np.array_equal(labels.positions, turned)


def test_pixels_without_data_in_probabilities(tmp_path):
    """As `segkernels refine -o out.npz` writes them; in other arrays NaN is an error."""
    probs = np.array([[[0.75, 0.25, np.nan]], [[0.25, 0.75, np.nan]]], np.float32)
    np.savez(tmp_path / "a.npz", probs=probs, indices=np.array([3, 9]))
    labels = read_labels(tmp_path / "a.npz")
    assert labels.keys == (3, 9)
    assert labels.positions.tolist() == [[0, 1, -1]]
    assert labels.probs[:, 0, 2].tolist() == [0.5, 0.5]
    assert labels.unknown == "1 pixels without data"
    assert "expected finite" in error(array_map(tmp_path / "a.npy", probs))
    probs[0, 0, 2] = 0.5
    np.savez(tmp_path / "a.npz", probs=probs, indices=np.array([3, 9]))
    assert "expected finite" in error(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "arrays",
    [
        {"probs": np.full((2, 1, 1), 0.5), "indices": np.array([0])},
        {"probs": np.full((2, 1, 1), 0.5), "indices": np.array([4, 4])},
        {"probs": np.full((2, 1, 1), 0.5), "indices": np.array([0, 65536])},
        {"probs": np.full((2, 1, 1), 0.5), "indices": np.array([0.0, 1.0])},
        {"probs": np.full((2, 1, 1), 0.5), "colours": np.full((2, 3), 7)},
        {"probs": np.full((2, 1, 1), 0.5), "names": np.array([0, 1])},
    ],
)
def test_invalid_keys_of_probabilities(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    assert "expected" in error(tmp_path / "a.npz")


def test_archive_without_arrays(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "not a readable numpy array (a.txt is no array)" in error(tmp_path / "a.npz")


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits(tmp_path, bits):
    """The indices are those in the file; Pillow scales them to 255."""
    rows = (np.arange(48).reshape(6, 8) % (1 << bits)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", rows, bitspersample=bits)
    path = tmp_path / "a.png"
    packed = np.zeros((6, 8 * bits // 8), np.uint8)
    for i in range(8 // bits):
        packed |= rows[:, i :: 8 // bits] << (8 - bits * (i + 1))
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", 8, 6, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )
    for name in ("a.png", "a.tif"):
        labels = read_labels(tmp_path / name)
        assert labels.keys == tuple(range(1 << bits)), name
        assert np.array_equal(labels.positions, rows), name


@pytest.mark.parametrize(("mode", "value"), [("1", 0), ("I;16", 300)])
def test_transparent_value_of_other_depths(tmp_path, mode, value):
    rows = np.array([[300, 1, 2]], np.uint16) if mode != "1" else np.array([[False, True, True]])
    Image.fromarray(rows).save(tmp_path / "a.png", transparency=value)
    assert (read_labels(tmp_path / "a.png").positions < 0).tolist() == [[True, False, False]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_nodata_of_labels_warns(tmp_path, dtype):
    """A class may be the nodata value, as 0 is in many rasterised maps."""
    tag = {"extratags": [(42113, "s", 0, "0", True)]}
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, 1, 2]], dtype), **tag)
    labels = read_labels(tmp_path / "a.tif")
    assert labels.keys == (0, 1, 2)
    assert "nodata value, 0, is read as a class; pass --unknown 0" in labels.doubt
    assert read_labels(tmp_path / "a.tif", Meaning(("0",))).doubt == ""
    tifffile.imwrite(tmp_path / "a.tif", np.array([[3, 1, 2]], dtype), **tag)
    assert read_labels(tmp_path / "a.tif").doubt == ""


def test_void_is_the_unknown_value(tmp_path):
    """Pixels without data get the value that is unknown, whether this map uses it or not."""
    path = grey_map(tmp_path / "a.png", [[3, 4]])
    assert read_labels(path, Meaning(("0",))).void == 0
    assert read_labels(path, Meaning(("300",))).void == 255
    assert read_labels(path).void == 255
    assert read_labels(grey_map(path, [[3, 255]])).void == 254
