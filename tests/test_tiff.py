"""Scenes of many bands, bit depths and pixels without data."""

from __future__ import annotations

import contextlib
import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from test_refine import run

import segkernels
from segkernels.cli import images
from segkernels.cli.files import PictureError, Reading
from segkernels.cli.images import read_image
from segkernels.cli.label_maps import read_labels

HEIGHT, WIDTH = 40, 60
RGB = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
BANDS = np.random.default_rng(1).integers(0, 255, (HEIGHT, WIDTH, 7), np.uint8)
NODATA = 42113


def nodata(value):
    return {"extratags": [(NODATA, "s", 0, str(value), True)]}


@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("count", [2, 4, 5, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_all_bands(tmp_path, layout, count, dtype):
    bands = BANDS[..., :count].astype(dtype) * (257 if dtype == np.uint16 else 1)
    stored = bands if layout == "contig" else np.moveaxis(bands, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=layout)
    photograph = read_image(tmp_path / "a.tif")
    assert photograph.values.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    assert np.array_equal(photograph.values, BANDS[..., :count])
    assert photograph.missing is None


@pytest.mark.parametrize(("extra", "bands"), [("unspecified", 4), ("unassalpha", 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_fourth_band_is_dropped_only_if_it_is_alpha(tmp_path, extra, bands, dtype):
    stored = np.maximum(BANDS[..., :4], 1).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=[extra])
    photograph = read_image(tmp_path / "a.tif", Reading(bits=8))
    assert np.array_equal(photograph.values, stored[..., :bands])
    assert photograph.missing is None
    grey = stored[..., :2]
    tifffile.imwrite(
        tmp_path / "b.tif",
        grey,
        photometric="minisblack",
        extrasamples=[extra],
        planarconfig="contig",
    )
    photograph = read_image(tmp_path / "b.tif", Reading(bits=8))
    assert np.array_equal(photograph.values, grey[..., : bands - 2])


def test_four_samples_without_extrasamples_are_bands(tmp_path):
    """Pillow takes the fourth for alpha."""
    tifffile.imwrite(tmp_path / "a.tif", BANDS[..., :4], photometric="rgb", extrasamples=[0])
    content = bytearray((tmp_path / "a.tif").read_bytes())
    tag = content.index((338).to_bytes(2, "little"))
    content[tag : tag + 2] = (40000).to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes(content)
    assert Image.open(tmp_path / "a.tif").mode == "RGBA"
    assert np.array_equal(read_image(tmp_path / "a.tif").values, BANDS[..., :4])


def test_deep_colours_keep_all_bits(tmp_path):
    deep = RGB.astype(np.uint16) * 200 + 77
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    values = read_image(tmp_path / "a.tif").values
    np.testing.assert_allclose(values, deep / 257, rtol=1e-6)


@pytest.mark.parametrize("compression", ["lzw", "zlib", "zstd"])
def test_compressed(tmp_path, compression):
    tifffile.imwrite(
        tmp_path / "a.tif",
        BANDS,
        photometric="minisblack",
        planarconfig="contig",
        compression=compression,
        tile=(16, 16),
    )
    assert np.array_equal(read_image(tmp_path / "a.tif").values, BANDS)


def test_big_tiff(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", bigtiff=True)
    assert np.array_equal(read_image(tmp_path / "a.tif").values, RGB)


def test_signed_values_keep_their_scale(tmp_path):
    signed = BANDS[..., 0].astype(np.int16) * 20 - 2000
    tifffile.imwrite(tmp_path / "a.tif", signed)
    assert np.array_equal(read_image(tmp_path / "a.tif").values[..., 0], signed)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_bands(tmp_path, orientation):
    """As Pillow turns an RGB picture."""
    for name, bands in (("a.tif", BANDS[..., :4]), ("b.tif", BANDS[..., :3])):
        tifffile.imwrite(
            tmp_path / name,
            bands,
            photometric="rgb",
            extratags=[(274, "H", 1, orientation, True)],
            **({"extrasamples": [0]} if bands.shape[2] == 4 else {}),
        )
    bands, colours = (read_image(tmp_path / name) for name in ("a.tif", "b.tif"))
    assert bands.orientation == colours.orientation == orientation
    assert np.array_equal(bands.values[..., :3], colours.values)
    plain = read_image(tmp_path / "a.tif", Reading(ignore_exif=True))
    assert plain.orientation == 1
    assert np.array_equal(plain.values, BANDS[..., :4])


# --- bit depth


@pytest.mark.parametrize("suffix", ["tif", "png"])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_bits(tmp_path, suffix, bits):
    most = (1 << bits) - 1
    grey = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % (most + 1)).astype(np.uint16)
    grey[0, 5] = most
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).save(path)
    plain = read_image(path)
    assert plain.doubt == (
        f"IMAGE {path} has 16-bit values from 0 to {most}, read as 0 to 65535, so all of it is "
        f"dark; pass --bits {bits} if that is its depth"
    )
    np.testing.assert_allclose(plain.values[..., 0], grey / 257, rtol=1e-6)
    scaled = read_image(path, Reading(bits=bits))
    assert scaled.doubt == ""
    np.testing.assert_allclose(scaled.values[..., 0], grey * (255 / most), rtol=1e-6)
    with pytest.raises(PictureError, match=f"--bits {bits - 1}, got values from 0 to {most}"):
        read_image(path, Reading(bits=bits - 1))
    np.save(tmp_path / "a.npy", grey)
    assert np.array_equal(read_image(tmp_path / "a.npy").values[..., 0], grey)
    assert np.array_equal(read_image(tmp_path / "a.npy", Reading(bits=bits)).values, scaled.values)


def test_bits_do_not_change_eight_bit_pictures(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", Reading(bits=12)).values, RGB)


def save_deep_png(path, values):
    """A PNG of 16-bit colours, which Pillow cannot write."""
    path.write_bytes(imagecodecs.png_encode(values))


def test_png_of_deep_colours(tmp_path):
    """Pillow reads the upper 8 bits, of which 12-bit values use 4."""
    save_deep_png(tmp_path / "a.png", RGB.astype(np.uint16) * 257)
    assert np.array_equal(read_image(tmp_path / "a.png").values, RGB)
    assert np.array_equal(read_image(tmp_path / "a.png", Reading(bits=16)).values, RGB)
    save_deep_png(tmp_path / "a.png", RGB.astype(np.uint16) * 16)
    message = "a PNG of 16-bit colours with values below 4096, of which Pillow keeps the upper 8"
    with pytest.raises(PictureError, match=message):
        read_image(tmp_path / "a.png")


# --- pixels without data


def check_missing(path, expected, bands):
    photograph = read_image(path)
    assert np.array_equal(photograph.missing, expected)
    assert np.array_equal(photograph.values[~expected], bands[~expected])
    assert np.isfinite(photograph.values).all()


LEFT = np.zeros((HEIGHT, WIDTH), bool)
LEFT[:, :9] = True


def test_nodata_value(tmp_path):
    scene = BANDS.astype(np.float32)
    scene[LEFT] = -9999
    scene[0, 20, 3] = -9999  # one band is enough
    missing = LEFT.copy()
    missing[0, 20] = True
    path = tmp_path / "a.tif"
    for value in ("-9999", "-9.999e+03 ", -9999.0):
        tifffile.imwrite(
            path, scene, photometric="minisblack", planarconfig="contig", **nodata(value)
        )
        check_missing(path, missing, scene)
    tifffile.imwrite(path, scene[..., 0], **nodata(-9999))
    check_missing(path, LEFT, scene[..., :1])
    tifffile.imwrite(path, scene, photometric="minisblack", planarconfig="contig", **nodata("x"))
    assert read_image(path).missing is None


def test_nodata_value_of_colours(tmp_path):
    scene = np.maximum(RGB, 1)
    scene[LEFT] = 0
    scene[0, 20] = (0, 5, 9)  # a colour
    tifffile.imwrite(tmp_path / "a.tif", scene, photometric="rgb", **nodata(0))
    check_missing(tmp_path / "a.tif", LEFT, scene)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("value", [0, 3, 15])
def test_nodata_value_is_the_stored_one(tmp_path, bits, photometric, value):
    """Pillow scales 4 bits to 8 and inverts pictures where white is 0."""
    grey = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 16).astype(np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", grey, photometric=photometric, bitspersample=bits, **nodata(value)
    )
    assert np.array_equal(read_image(tmp_path / "a.tif").missing, grey == value)


def test_nodata_value_of_a_palette(tmp_path):
    indices = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 4).astype(np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette([255, 255, 255, 9, 9, 9, 0, 0, 0, 8, 8, 8])
    picture.save(tmp_path / "a.tif", tiffinfo={NODATA: "0"})
    assert np.array_equal(read_image(tmp_path / "a.tif").missing, indices == 0)


def test_bits_of_signed_values(tmp_path):
    signed = RGB[..., 0].astype(np.int16) * 16
    tifffile.imwrite(tmp_path / "a.tif", signed)
    np.save(tmp_path / "a.npy", signed)
    for name in ("a.tif", "a.npy"):
        values = read_image(tmp_path / name, Reading(bits=12)).values[..., 0]
        np.testing.assert_allclose(values, signed * (255 / 4095), rtol=1e-6)
        assert np.array_equal(read_image(tmp_path / name).values[..., 0], signed)


def test_nan_is_no_data(tmp_path):
    scene = BANDS.astype(np.float32)
    scene[LEFT] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", scene, photometric="minisblack", planarconfig="contig")
    check_missing(tmp_path / "a.tif", LEFT, scene)
    np.save(tmp_path / "a.npy", scene)
    check_missing(tmp_path / "a.npy", LEFT, scene)
    scene[0, 30] = np.inf
    np.save(tmp_path / "a.npy", scene)
    with pytest.raises(PictureError, match="expected finite values, got infinity"):
        read_image(tmp_path / "a.npy")


def test_mask_page_and_overview(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
        tiff.write(~LEFT, photometric=4, subfiletype=4)
        tiff.write(~LEFT[::2, ::2], photometric=4, subfiletype=5)
    check_missing(tmp_path / "a.tif", LEFT, RGB)
    with tifffile.TiffWriter(tmp_path / "b.tif") as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(read_image(tmp_path / "b.tif").values, RGB)
    with tifffile.TiffWriter(tmp_path / "c.tif") as tiff:
        tiff.write(RGB, photometric="rgb")
        tiff.write(RGB, photometric="rgb")
    with pytest.raises(PictureError, match="expected one picture, got 2 frames"):
        read_image(tmp_path / "c.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparent_pixels_of_tiff(tmp_path, dtype):
    alpha = np.where(LEFT, 0, 255)
    scene = np.dstack([RGB, alpha]).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", scene, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(read_image(tmp_path / "a.tif", Reading(bits=8)).missing, LEFT)


def test_no_data_at_all(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 4), np.nan))
    with pytest.raises(PictureError, match="expected pixels with data, got nodata or NaN only"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("bits", [None, 12])
def test_nodata_is_no_value_of_the_scene(tmp_path, bits):
    """12-bit data whose nodata value is 65535."""
    scene = np.random.default_rng(2).integers(0, 4096, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    scene[LEFT] = 65535
    scene[0, 20] = 4095
    tifffile.imwrite(tmp_path / "a.tif", scene, photometric="rgb", **nodata(65535))
    photograph = read_image(tmp_path / "a.tif", Reading(bits=bits))
    assert np.array_equal(photograph.missing, LEFT)
    wanted = scene * (255 / 4095) if bits else scene / 257
    np.testing.assert_allclose(photograph.values[~LEFT], wanted[~LEFT], rtol=1e-6)
    assert ("to 4095, read as 0 to 65535" in photograph.doubt) == (bits is None)
    tifffile.imwrite(tmp_path / "b.tif", scene[..., 0], **nodata(65535))
    assert np.array_equal(read_image(tmp_path / "b.tif", Reading(bits=bits)).missing, LEFT)


# --- errors


def test_without_tifffile(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    tifffile.imwrite(tmp_path / "a.tif", BANDS, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "b.tif", RGB, photometric="rgb")
    tifffile.imwrite(tmp_path / "c.tif", RGB[..., 0].astype(np.int16))
    monkeypatch.setattr(images.importlib, "import_module", missing)
    with pytest.raises(PictureError) as caught:
        read_image(tmp_path / "a.tif")
    assert "a TIFF of 7 bands of uint8 needs tifffile" in str(caught.value)
    assert 'pip install "segkernels[tiff]"; or save it as .npy (H, W, n)' in str(caught.value)
    with pytest.raises(PictureError, match="a TIFF of 1 band of int16 needs tifffile"):
        read_image(tmp_path / "c.tif")
    assert np.array_equal(read_image(tmp_path / "b.tif").values, RGB)


@pytest.mark.parametrize("size", [0, 8, 100, 300, 4000])
def test_truncated(tmp_path, size):
    tifffile.imwrite(tmp_path / "a.tif", BANDS, photometric="minisblack", planarconfig="contig")
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:size])
    with pytest.raises(PictureError) as caught:
        read_image(tmp_path / "a.tif")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", [258, 262, 277, 338])
@pytest.mark.parametrize("kind", [2, 7, 12])
def test_tags_of_odd_types(tmp_path, tag, kind):
    tifffile.imwrite(tmp_path / "a.tif", BANDS[..., :4], photometric="rgb", extrasamples=[0])
    content = bytearray((tmp_path / "a.tif").read_bytes())
    place = content.index(struct.pack("<HH", tag, 3))
    content[place + 2] = kind
    (tmp_path / "a.tif").write_bytes(content)
    for read in (read_image, read_labels):
        with contextlib.suppress(PictureError):
            read(tmp_path / "a.tif")


def test_complex_values(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB[..., 0].astype(np.complex64))
    with pytest.raises(PictureError, match="expected integers or floats, got complex64"):
        read_image(tmp_path / "a.tif")


def test_max_pixels(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", BANDS, photometric="minisblack", planarconfig="contig")
    Image.fromarray(RGB).save(tmp_path / "b.png")
    for name in ("a.tif", "b.png"):
        with pytest.raises(PictureError, match="60x40 is 2400 pixels, more than --max-pixels 2399"):
            read_image(tmp_path / name, Reading(max_pixels=2399))
        assert read_image(tmp_path / name, Reading(max_pixels=2400)).values.shape[1] == WIDTH


# --- the command


@pytest.fixture
def scene(tmp_path):
    """A scene whose fourth band alone shows the two halves, and rough labels; the right labels."""
    random = np.random.default_rng(5)
    truth = np.zeros((HEIGHT, WIDTH), np.uint8)
    truth[:, 33:] = 1
    bands = random.integers(95, 105, (HEIGHT, WIDTH, 4)).astype(np.uint8)
    bands[..., 3] += truth * 90
    rough = truth.copy()
    rough[:, 20:46] = 255
    Image.fromarray(rough).save(tmp_path / "labels.png")
    tifffile.imwrite(tmp_path / "a.tif", bands, photometric="rgb", extrasamples=[0])
    np.save(tmp_path / "a.npy", bands)
    return bands, rough, truth


def test_command_uses_all_bands(tmp_path, scene):
    _, _, truth = scene
    for name in ("a.tif", "a.npy"):
        run("refine", tmp_path / name, tmp_path / "labels.png", "-o", tmp_path / "out.png")
        assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), truth), name


def test_command_leaves_out_missing_pixels(tmp_path, scene):
    """Elsewhere the result is that of the CRF on the other pixels alone."""
    bands, rough, truth = scene
    missing = np.zeros(truth.shape, bool)
    missing[:, 28:33] = missing[3:5] = True
    floats = bands.astype(np.float32)
    floats[missing] = np.nan
    np.save(tmp_path / "a.npy", floats)
    files = (tmp_path / "a.npy", tmp_path / "labels.png")
    run("refine", *files, "-o", tmp_path / "out.npy")
    written = np.load(tmp_path / "out.npy")
    assert np.isnan(written[:, missing]).all()

    y, x = np.indices(truth.shape).astype(np.float32)
    probs = segkernels.probs_from_labels(rough, 2, 0.7, ignore_index=255)
    colours = np.moveaxis(bands.astype(np.float32), -1, 0)
    terms = [
        segkernels.PairwiseTerm(features[:, ~missing].T.copy(), compat)
        for features, compat in (
            (np.stack([x, y]) / 3, 3.0),
            (np.concatenate([np.stack([x, y]) / 80, colours / 13]), 10.0),
        )
    ]
    points = torch.from_numpy(probs[:, ~missing].T.copy())
    wanted = segkernels.dense_crf(
        None, points, pairwise=terms, compat_gaussian=None, compat_bilateral=None
    )
    np.testing.assert_allclose(written[:, ~missing].T, wanted.numpy(), atol=1e-5)

    printed = run("refine", *files, "-o", tmp_path / "out.png", "--overlay", tmp_path / "o.png")
    number = int(missing.sum())
    assert (
        f"no data in {number} pixels ({number / truth.size:.2%}), written as index 255" in printed
    )
    after = np.array(Image.open(tmp_path / "out.png"))
    assert np.array_equal(after == 255, missing)
    assert np.array_equal(after[~missing], truth[~missing])


@pytest.mark.parametrize(
    ("kind", "mark"),
    [("mask", 254), ("bits", 255), ("palette", 255), ("colour", (0, 0, 0)), ("all", None)],
)
def test_mark_of_missing_pixels(tmp_path, scene, kind, mark):
    """The mark is a value that no class has; a colour picture without one becomes transparent."""
    bands, _, truth = scene
    floats = bands.astype(np.float32)
    floats[:, :9] = np.nan
    np.save(tmp_path / "a.npy", floats)
    picture = Image.fromarray(truth * np.uint8(255))
    if kind == "bits":
        picture = Image.fromarray(truth == 1)
    elif kind == "palette":
        picture = Image.fromarray(truth)
        picture.putpalette([200, 0, 0, 0, 200, 0])
    elif kind in ("colour", "all"):
        low = 9 if kind == "colour" else 0
        picture = Image.fromarray(np.array([(low, low, low), (200, 0, 0)], np.uint8)[truth])
    picture.save(tmp_path / "labels.png")
    run("refine", tmp_path / "a.npy", tmp_path / "labels.png", "-o", tmp_path / "out.png")
    written = Image.open(tmp_path / "out.png")
    after = np.array(written)
    if mark is None:
        assert written.mode == "RGBA"
        assert np.array_equal(after[..., 3] == 0, LEFT)
        after = after[..., :3]
    else:
        assert np.array_equal((after.reshape(HEIGHT, WIDTH, -1) == mark).all(axis=2), LEFT)
    before = np.array(picture)
    if kind == "bits":
        before = before.astype(np.uint8)
    assert np.array_equal(after[~LEFT], before[~LEFT])


def test_labels_in_tiff_of_other_types(tmp_path, scene):
    _, rough, truth = scene
    for dtype in (np.int16, np.uint32, np.int64):
        tifffile.imwrite(tmp_path / "labels.tif", rough.astype(dtype))
        files = (tmp_path / "a.tif", tmp_path / "labels.tif", "-o", tmp_path / "out.png")
        run("refine", *files)
        assert np.array_equal(np.array(Image.open(tmp_path / "out.png")), truth), dtype
