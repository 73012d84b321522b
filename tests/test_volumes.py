"""NIfTI volumes: reading, millimetres, headers that are kept, and hostile files."""

from __future__ import annotations

import gzip
import importlib
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import segkernels
from segkernels.cli import inference
from segkernels.cli.files import PictureError, Reading, ending, picture_suffixes
from segkernels.cli.images import read_image, read_images
from segkernels.cli.inference import Options, doubts, load, middle_slice, refine_labels
from segkernels.cli.label_maps import encode_labels, read_labels
from segkernels.cli.overlay import side_by_side
from segkernels.cli.unknown import Meaning

SHAPE = (9, 12, 7)
SPACING = (0.5, 1.25, 3.0)
AFFINE = np.array([[-0.5, 0, 0, 40], [0, 1.25, 0, -12.5], [0, 0, 3, 7], [0, 0, 0, 1]], np.float64)
RANDOM = np.random.default_rng(5)
TRUTH = np.zeros(SHAPE, np.uint8)
TRUTH[4:, 3:] = 1
TRUTH[:, :, 5:] = 2
VALUES = (np.array([40, 110, 200])[TRUTH] + RANDOM.normal(0, 6, SHAPE)).astype(np.int16)
ROUGH = np.where(RANDOM.random(SHAPE) < 0.15, RANDOM.integers(0, 3, SHAPE), TRUTH).astype(np.uint8)


def save(
    path, values, affine=AFFINE, *, kind=nibabel.Nifti1Image, units="mm", dtype=None, edit=None
):
    volume = kind(values, affine, dtype=dtype or values.dtype)
    volume.header.set_xyzt_units(units)
    if edit is not None:
        edit(volume.header)
    path.write_bytes(
        gzip.compress(volume.to_bytes()) if path.suffix == ".gz" else volume.to_bytes()
    )
    return path


def patched(path, offset, layout, *values):
    """Change a field of a header in a .nii, as no program would write it."""
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, *values)
    path.write_bytes(content)
    return path


DIM, TYPE, PIXDIM, OFFSET, SLOPE = 40, 70, 76, 108, 112  # offsets in a header


@pytest.fixture
def image(tmp_path):
    return save(tmp_path / "image.nii.gz", VALUES)


@pytest.fixture
def labels(tmp_path):
    return save(tmp_path / "labels.nii.gz", ROUGH)


def image_error(path, reading=None):
    with pytest.raises(PictureError) as caught:
        read_image(path, reading)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"IMAGE {path}: ")
    return str(caught.value)


def load_error(image, labels, options=None):
    with pytest.raises(PictureError) as caught:
        load(image, labels, options or Options())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path, positions, like):
    path.write_bytes(encode_labels(path, positions, like))
    return nibabel.load(path)


# --- images


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, ">i2"])
def test_values(tmp_path, name, kind, dtype):
    content = kind(VALUES.astype(dtype), AFFINE, dtype=dtype).to_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    found = read_image(path)
    assert found.values.dtype == np.float32
    assert np.array_equal(found.values, VALUES[..., None])
    assert found.spacing == SPACING
    assert np.array_equal(found.affine, AFFINE)
    assert found.shape == found.size == SHAPE
    assert found.missing is None
    assert found.cautions == {}


def test_slope(tmp_path):
    """Values are on the scale that the header gives."""
    path = save(tmp_path / "a.nii", VALUES)
    patched(path, SLOPE, "<ff", 0.5, -100)
    assert np.array_equal(read_image(path).values[..., 0], VALUES * 0.5 - 100)


@pytest.mark.parametrize(("shape", "channels"), [((4,), 4), ((1, 4), 4), ((1,), 1), ((3, 1, 1), 3)])
def test_channels(tmp_path, shape, channels):
    values = RANDOM.normal(0, 1, (*SHAPE, *shape)).astype(np.float32)
    found = read_image(save(tmp_path / "a.nii", values))
    assert np.array_equal(found.values, values.reshape(*SHAPE, channels))


def test_rgb(tmp_path):
    colours = RANDOM.integers(0, 255, (*SHAPE, 3), dtype=np.uint8)
    stored = colours.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    found = read_image(save(tmp_path / "a.nii", stored))
    assert found.values.dtype == np.float32
    assert np.array_equal(found.values, colours)


@pytest.mark.parametrize("shape", [(9, 12), (9, 12, 1)])
def test_one_slice(tmp_path, shape):
    """A volume of one slice is refined as a picture is."""
    values, rough = VALUES[:, :, 0].reshape(shape), ROUGH[:, :, 0].reshape(shape)
    affine = np.diag([2.0, 2, 2, 1])
    image = save(tmp_path / "a.nii", values, affine)
    labels = save(tmp_path / "b.nii", rough, affine)
    options = Options(crf={"srgb": 20.0, "sxy_bilateral": 30.0})
    photograph, before = load(image, labels, options)
    assert photograph.shape == before.size == (9, 12, 1)
    done = refine_labels(photograph, before, options)
    probs = segkernels.probs_from_labels(rough.reshape(9, 12), 3, 0.7)
    wanted = segkernels.dense_crf(
        values.reshape(9, 12, 1), probs, srgb=20.0, sxy_bilateral=15.0, sxy_gaussian=1.5
    )
    assert np.array_equal(done.after[..., 0], wanted.argmax(axis=0))
    assert written(tmp_path / "out.nii", done.after, before).shape == (9, 12, 1)


@pytest.mark.parametrize(
    ("units", "factor"), [("mm", 1), ("unknown", 1), ("meter", 1e3), ("micron", 1e-3)]
)
def test_units(tmp_path, units, factor):
    found = read_image(save(tmp_path / "a.nii", VALUES, units=units))
    np.testing.assert_allclose(found.spacing, np.multiply(SPACING, factor))
    np.testing.assert_allclose(found.affine[:3], AFFINE[:3] * factor)


def test_two_spacings(tmp_path):
    """The affine may have another spacing than pixdim, on which sigmas depend."""
    path = patched(save(tmp_path / "a.nii", VALUES), PIXDIM + 4, "<f", 2.0)
    found = read_image(path)
    assert found.spacing == (2.0, 1.25, 3.0)
    assert found.cautions["affine"].endswith(
        "has voxels of 2 x 1.25 x 3 mm by pixdim, which counts, and 0.5 x 1.25 x 3 by its affine"
    )


def test_max_voxels(image):
    number = VALUES.size
    assert read_image(image, Reading(max_pixels=number)).shape == SHAPE
    text = image_error(image, Reading(max_pixels=number - 1))
    assert f"9x12x7 is {number} voxels, more than --max-pixels {number - 1}" in text
    assert "--tile" not in text


def test_nan_is_missing(tmp_path):
    values = VALUES.astype(np.float32)
    values[2:4, :, 1] = np.nan
    found = read_image(save(tmp_path / "a.nii", values))
    assert np.array_equal(found.missing, np.isnan(values))
    assert np.isfinite(found.values).all()
    assert "got nodata or NaN only" in image_error(save(tmp_path / "b.nii", values * np.nan))
    values[0, 0, 0] = np.inf
    assert "expected finite values" in image_error(save(tmp_path / "c.nii", values))


def test_bits_are_of_pictures(image):
    assert "--bits is for pictures" in image_error(image, Reading(bits=12))


# --- several images


def test_channels_of_several_volumes(tmp_path, image):
    other = VALUES.astype(np.float32) * 0.1
    other[0, 0] = np.nan
    second = save(tmp_path / "b.nii", other)
    joined = read_images((image, second))
    assert joined.values.dtype == np.float32
    assert np.array_equal(joined.values[..., 0], VALUES)
    assert np.array_equal(joined.values[1:, ..., 1], other[1:])
    assert np.array_equal(joined.missing, np.isnan(other))
    assert joined.spacing == SPACING
    alone, same = read_images([image]), read_image(image)
    assert np.array_equal(alone.values, same.values)


def test_channels_of_several_pictures(tmp_path):
    colours = RANDOM.integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    Image.fromarray(colours[..., 0]).save(tmp_path / "b.png")
    np.save(tmp_path / "c.npy", np.full((6, 8), 0.5))
    np.save(tmp_path / "d.npy", np.full((8, 6), 0.5))
    pictures = read_images([tmp_path / "a.png", tmp_path / "b.png"])
    assert pictures.values.dtype == np.uint8
    assert np.array_equal(pictures.values, np.dstack([colours, colours[..., 0]]))
    mixed = read_images([tmp_path / "a.png", tmp_path / "c.npy"])
    assert mixed.values.dtype == np.float32
    assert np.array_equal(mixed.values, np.dstack([colours, np.full((6, 8), 0.5)]))
    with pytest.raises(PictureError, match=r"a\.png is 8x6, IMAGE .*d\.npy is 6x8"):
        read_images([tmp_path / "a.png", tmp_path / "d.npy"])


def test_missing_pixels_of_several(tmp_path):
    values = np.ones((2, 4, 4), np.float32)
    values[0, :2], values[1, 1:3] = np.nan, np.nan
    for name, array in zip("ab", values, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    joined = read_images([tmp_path / "a.npy", tmp_path / "b.npy"])
    assert np.array_equal(joined.missing, np.isnan(values).any(axis=0))
    values[1, 2:] = np.nan
    np.save(tmp_path / "b.npy", values[1])
    with pytest.raises(PictureError, match=r"a\.npy, .*b\.npy: expected pixels with data in all"):
        read_images([tmp_path / "a.npy", tmp_path / "b.npy"])


def test_several_in_other_places(tmp_path, image):
    moved = AFFINE.copy()
    moved[0, 3] += 3
    second = save(tmp_path / "b.nii", VALUES, moved)
    with pytest.raises(PictureError, match="differ by up to 6 voxels; resample one") as caught:
        read_images((image, second))
    assert str(image) in str(caught.value)
    assert str(second) in str(caught.value)
    assert read_images((image, second), Reading(ignore_affine=True)).values.shape == (*SHAPE, 2)


def test_several_orientations(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("L", (6, 6), 3).save(tmp_path / "a.png")
    Image.new("L", (6, 6), 90).save(tmp_path / "b.png", exif=exif)
    np.save(tmp_path / "labels.npy", np.eye(6, dtype=int))
    paths = (tmp_path / "a.png", tmp_path / "b.png")
    found = doubts(paths, *load(paths, tmp_path / "labels.npy", Options()), Options())
    assert "a.png has EXIF orientation 1, IMAGE " in found["exif"]
    assert "b.png has 3" in found["exif"]


def test_units_of_several_channels(tmp_path):
    """A sigma a channel is compared with the values of its channel."""
    np.save(tmp_path / "labels.npy", np.eye(8, dtype=int))
    np.save(tmp_path / "a.npy", np.linspace(0, 255, 64).reshape(8, 8))
    np.save(tmp_path / "b.npy", np.linspace(0, 1, 64).reshape(8, 8))
    paths = (tmp_path / "a.npy", tmp_path / "b.npy")
    for srgb, doubt in [
        ((13.0, 0.05), ""),
        ((13.0, 13.0), ""),
        ((0.05, 0.05), "values from 0 to 255, and --srgb 0.05"),
        ((13.0, 0.001), "values from 0 to 1, and --srgb 0.001"),
        ((200.0, 2.0), "so all of it looks alike"),
    ]:
        options = Options(crf={"srgb": srgb})
        found = doubts(paths, *load(paths, tmp_path / "labels.npy", options), options)
        assert doubt in found.get("srgb", "")
        assert bool(doubt) == ("srgb" in found)


# --- labels


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_labels(tmp_path, dtype):
    """Floats without a fraction are labels, too."""
    sparse = np.array([0, 3, 7])[ROUGH].astype(dtype)
    before = read_labels(save(tmp_path / "a.nii.gz", sparse))
    assert before.keys == before.indices == (0, 3, 7)
    assert np.array_equal(before.positions, ROUGH)
    assert before.positions.flags.c_contiguous
    assert before.probs is None
    assert before.size == SHAPE


def test_unknown_labels(tmp_path):
    labels = ROUGH.astype(np.int16)
    labels[0] = -1
    labels[1] = 255
    before = read_labels(save(tmp_path / "a.nii", labels))
    assert np.array_equal(before.positions[:2], np.full((2, *SHAPE[1:]), -1))
    before = read_labels(tmp_path / "a.nii", Meaning(unknown=("-1", "2")))
    assert before.keys == (0, 1, 255)
    mask = read_labels(save(tmp_path / "b.nii", (ROUGH > 0).astype(np.float32)))
    assert mask.keys == (0, 1)
    assert mask.probs is None


def test_atlases_have_many_small_classes(tmp_path):
    labels = np.zeros((40, 40, 40), np.int16)
    labels[0, 0, :] = np.arange(40) * 50
    labels[0, 1, :] = np.arange(40) * 50 + 7
    assert len(read_labels(save(tmp_path / "a.nii", labels)).keys) == 80
    noise = save(tmp_path / "b.nii", RANDOM.integers(300, 4000, SHAPE).astype(np.int16))
    with pytest.raises(PictureError, match="expected a few values, one a class, got"):
        read_labels(noise)


def test_probabilities(tmp_path):
    probs = RANDOM.dirichlet([1, 1, 1], SHAPE).astype(np.float32)  # (X, Y, Z, C)
    before = read_labels(save(tmp_path / "a.nii.gz", probs))
    assert np.array_equal(before.probs, np.moveaxis(probs, -1, 0))
    assert np.array_equal(before.positions, probs.argmax(axis=-1))
    assert before.keys == (0, 1, 2)
    foreground = read_labels(save(tmp_path / "b.nii.gz", probs[..., 1]))
    assert foreground.foreground_shape == (1, *SHAPE)
    assert np.array_equal(foreground.probs[0], probs[..., 1])
    one_hot = read_labels(save(tmp_path / "c.nii", (probs > 0.4).astype(np.float32)))
    assert one_hot.num_classes == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full(SHAPE, 0.5, np.float32) * 7, "expected probabilities between 0 and 1"),
        (np.full(SHAPE, np.nan, np.float32), "expected finite probabilities"),
        (np.where(TRUTH == 1, np.inf, 1.0), "expected finite probabilities"),
        (np.full(SHAPE, 70000.0), "expected indices from 0 to 65535"),
        (np.full(SHAPE, 1e30), "expected probabilities between 0 and 1"),
        (np.full(SHAPE, 70000, np.int32), "expected indices from 0 to 65535"),
        (np.full((*SHAPE, 2), 1, np.int16), "integer labels (H, W), got int16 (2, 9, 12, 7)"),
        (np.ones(SHAPE, np.complex64), "expected integers, floats or RGB, got complex64"),
    ],
)
def test_wrong_labels(tmp_path, values, message):
    path = save(tmp_path / "a.nii", values)
    with pytest.raises(PictureError) as caught:
        read_labels(path)
    assert message in str(caught.value)


def test_arrays_of_labels(tmp_path, image):
    """Integers (X, Y, Z), or floats (C, X, Y, Z); the header is the image's."""
    np.save(tmp_path / "a.npy", ROUGH)
    _, before = load(image, tmp_path / "a.npy", Options())
    assert np.array_equal(before.positions, ROUGH)
    out = written(tmp_path / "out.nii.gz", before.positions, before)
    assert np.array_equal(out.affine, AFFINE)
    assert out.header["sform_code"] == nibabel.load(image).header["sform_code"]
    assert out.get_data_dtype() == np.uint8
    probs = segkernels.probs_from_labels(ROUGH[None], 3)[0]
    np.savez(tmp_path / "b.npz", probs=probs, indices=np.array([1, 4, 300]))
    _, before = load(image, tmp_path / "b.npz", Options())
    assert np.array_equal(before.probs, probs)
    out = written(tmp_path / "out.nii.gz", before.positions, before)
    assert out.get_data_dtype() == np.uint16
    assert np.array_equal(out.dataobj, np.array([1, 4, 300])[ROUGH])


@pytest.mark.parametrize("floats", [False, True])
def test_axes_of_arrays(tmp_path, image, floats):
    array = np.moveaxis(ROUGH, (0, 1, 2), (2, 1, 0))
    if floats:
        array = segkernels.probs_from_labels(np.ascontiguousarray(array)[None], 3)[0]
    np.save(tmp_path / "a.npy", array)
    for resize in (False, True):
        text = load_error(image, tmp_path / "a.npy", Options(resize=resize))
        assert "IMAGE" in text
        assert "is 9x12x7, LABELS" in text
        assert "the axes of LABELS are (Z, Y, X), as of nnU-Net's arrays; transpose them" in text


def test_pictures_and_volumes_do_not_mix(tmp_path, image, labels):
    Image.fromarray(ROUGH[:, :, 0]).save(tmp_path / "a.png")
    text = load_error(image, tmp_path / "a.png")
    assert "is a volume of 9x12x7, LABELS" in text
    assert "is a picture of 12x9" in text
    text = load_error(tmp_path / "a.png", labels)
    assert "is a picture of 12x9, LABELS" in text
    assert "is a volume of 9x12x7" in text
    np.save(tmp_path / "a.npy", ROUGH[None, :, :, 0])
    text = load_error(tmp_path / "a.png", tmp_path / "a.npy")
    assert "or integer labels (H, W), got integers (1, 9, 12)" in text
    np.save(tmp_path / "a.npy", np.full((3, 9, 12), 1 / 3, np.float32))
    assert "is a picture of 12x9, an array (3, 9, 12); the labels of a volume" in load_error(
        image, tmp_path / "a.npy"
    )


def test_sizes_that_differ(tmp_path, image):
    labels = save(tmp_path / "a.nii", ROUGH[1:])
    text = load_error(image, labels)
    assert "sizes differ (X x Y x Z)" in text
    assert "is 8x12x7; pass --resize" in text


# --- where the voxels are


@pytest.mark.parametrize(("shift", "agrees"), [(0.04, True), (0.06, False)])
def test_affines_are_compared(tmp_path, image, shift, agrees):
    """The shortest edge is 0.5 mm, and a tenth of it 0.05."""
    moved = AFFINE.copy()
    moved[2, 3] += shift
    labels = save(tmp_path / "a.nii", ROUGH, moved)
    if agrees:
        photograph, before = load(image, labels, Options())
        assert "affine" not in doubts(image, photograph, before, Options())
    else:
        assert "resample one to the grid of the other, or pass --ignore-affine" in load_error(
            image, labels
        )
    loose = Options(reading=Reading(ignore_affine=True))
    photograph, before = load(image, labels, loose)
    assert "affine" not in doubts(image, photograph, before, loose)
    assert np.array_equal(written(tmp_path / "o.nii", ROUGH, before).affine, moved.astype("f4"))


def test_a_turned_affine(tmp_path, image):
    """The first corner is the same, the others are not."""
    turned = AFFINE.copy()
    turned[:3, 0] *= -1
    assert "differ by up to" in load_error(image, save(tmp_path / "a.nii", ROUGH, turned))


@pytest.mark.parametrize("which", ["image", "labels", "both"])
def test_a_header_without_a_place(tmp_path, which):
    image, labels = save(tmp_path / "i.nii", VALUES), save(tmp_path / "l.nii", ROUGH)
    for path in {"image": [image], "labels": [labels], "both": [image, labels]}[which]:
        patched(path, 252, "<hh", 0, 0)  # qform_code, sform_code
    photograph, before = load(image, labels, Options())
    found = doubts(image, photograph, before, Options())
    if which == "both":  # nothing contradicts that they are the same
        assert "affine" not in found
    else:
        name = image if which == "image" else labels
        assert f"{name} has neither qform nor sform" in found["affine"]


def test_a_code_that_does_not_exist(tmp_path, image, capfd):
    """nibabel reads it as 0, which is none, and prints that."""
    labels = patched(save(tmp_path / "l.nii", ROUGH), 252, "<hh", 77, 0)
    found = doubts(image, *load(image, labels, Options()), Options())
    assert f"{labels} has neither qform nor sform" in found["affine"]
    assert capfd.readouterr().err == ""


def test_resized_labels(tmp_path, image):
    """Labels of half the resolution in the same place, and the image's header in the output."""
    coarse = AFFINE @ np.diag([3.0, 2, 1, 1])
    coarse[:3, 3] += AFFINE[:3, :3] @ [1, 0.5, 0]
    labels = save(tmp_path / "a.nii", ROUGH[1::3, ::2].astype(np.int16), coarse)
    photograph, before = load(image, labels, Options(resize=True))
    assert doubts(image, photograph, before, Options()) == {}
    wanted = ROUGH[1::3, ::2].repeat(3, axis=0).repeat(2, axis=1)
    assert np.array_equal(before.positions, wanted)
    out = written(tmp_path / "out.nii", before.positions, before)
    assert np.array_equal(out.affine, AFFINE)
    assert out.get_data_dtype() == np.int16
    loose = Options(resize=True, reading=Reading(ignore_affine=True))
    assert "stretched to" in doubts(image, *load(image, labels, loose), loose)["resize"]
    coarse[0, 3] += 1
    save(labels, ROUGH[1::3, ::2], coarse)
    assert "the affines of IMAGE" in load_error(image, labels, Options(resize=True))


def test_resized_arrays_are_stretched(tmp_path, image):
    np.save(tmp_path / "a.npy", ROUGH[:3])
    found = load(image, tmp_path / "a.npy", Options(resize=True))
    assert "is 3x12x7, stretched to 9x12x7" in doubts(image, *found, Options())["resize"]


# --- the CRF


def direct(image, probs, crf=None, **sigmas):
    """dense_crf on (X, Y, Z) as (D, H, W), so that its x is the file's z."""
    tensor = torch.from_numpy(image.astype(np.float32)).movedim(-1, 0)[None]
    return segkernels.dense_crf(tensor, torch.from_numpy(probs)[None], **sigmas, **(crf or {}))[
        0
    ].numpy()


def test_sigmas_are_millimetres(image, labels):
    rest = {"srgb": 20.0, "iterations": 5, "compat_gaussian": 0.5, "compat_bilateral": 1.5}
    crf = {"sxy_gaussian": 2.0, "sxy_bilateral": (6.0, 4.0, 9.0), **rest}
    options = Options(crf=crf, keep_probs=True)
    done = refine_labels(*load(image, labels, options), options)
    probs = segkernels.probs_from_labels(ROUGH[None], 3)[0]
    sigmas = {
        "sxy_gaussian": (2 / 3, 2 / 1.25, 2 / 0.5),
        "sxy_bilateral": (9 / 3, 4 / 1.25, 6 / 0.5),
    }
    assert np.array_equal(done.probs, direct(VALUES[..., None], probs, rest, **sigmas))
    assert np.array_equal(done.after, done.probs.argmax(axis=0))
    turned = {name: value[::-1] for name, value in sigmas.items()}
    assert np.abs(done.probs - direct(VALUES[..., None], probs, rest, **turned)).max() > 0.01


def test_default_sigmas_are_millimetres(image, labels):
    options = Options(keep_probs=True)
    done = refine_labels(*load(image, labels, options), options)
    probs = segkernels.probs_from_labels(ROUGH[None], 3)[0]
    sigmas = {"sxy_gaussian": (1, 2.4, 6), "sxy_bilateral": (80 / 3, 64, 160)}
    assert np.array_equal(done.probs, direct(VALUES[..., None], probs, **sigmas))
    assert (done.after == TRUTH).mean() > (ROUGH == TRUTH).mean()


def test_a_volume_of_cubes_is_not_turned(tmp_path):
    """With equal edges the sigmas of the axes still are in the file's order."""
    affine = np.eye(4)
    image = save(tmp_path / "i.nii", VALUES, affine)
    labels = save(tmp_path / "l.nii", ROUGH, affine)
    options = Options(
        crf={"sxy_gaussian": (1.0, 2.0, 3.0), "compat_bilateral": 0.0, "method": "exact"},
        keep_probs=True,
    )
    done = refine_labels(*load(image, labels, options), options)
    flipped = segkernels.dense_crf(
        np.ascontiguousarray(VALUES.T)[None, ..., None],
        segkernels.probs_from_labels(np.ascontiguousarray(ROUGH.T)[None], 3),
        sxy_gaussian=(1.0, 2.0, 3.0),  # x is the last axis of (Z, Y, X)
        compat_bilateral=0.0,
        method="exact",
    )[0]
    np.testing.assert_allclose(done.probs, flipped.transpose(0, 3, 2, 1), atol=1e-5)


def test_probabilities_and_foreground_are_refined(tmp_path, image):
    probs = segkernels.probs_from_labels(ROUGH[None], 3)[0]
    sigmas = {"sxy_gaussian": (1, 2.4, 6), "sxy_bilateral": (80 / 3, 64, 160)}
    options = Options(keep_probs=True)
    labels = save(tmp_path / "p.nii.gz", np.moveaxis(probs, 0, -1))
    done = refine_labels(*load(image, labels, options), options)
    assert np.array_equal(done.probs, direct(VALUES[..., None], probs, **sigmas))
    foreground = save(tmp_path / "f.nii.gz", probs[1])
    done = refine_labels(*load(image, foreground, options), options)
    assert done.probs.shape == (2, *SHAPE)
    assert np.array_equal(done.probs[1], direct(VALUES[..., None], probs[1:2], **sigmas)[0])
    assert written(tmp_path / "o.nii", done.after, done.before).get_data_dtype() == np.uint8


def test_missing_voxels_are_no_neighbours(tmp_path, labels):
    """What is beyond missing voxels is as if they were cut off."""
    values = VALUES.astype(np.float32)
    values[6:] = np.nan
    image = save(tmp_path / "i.nii", values)
    options = Options(keep_probs=True)
    photograph, before = load(image, labels, options)
    done = refine_labels(photograph, before, options)
    assert (done.after[6:] == -1).all()
    assert np.isnan(done.probs[:, 6:]).all()
    assert done.missing == values[6:].size
    probs = np.ascontiguousarray(segkernels.probs_from_labels(ROUGH[None], 3)[0][:, :6])
    sigmas = {"sxy_gaussian": (1, 2.4, 6), "sxy_bilateral": (80 / 3, 64, 160)}
    wanted = direct(VALUES[:6, ..., None], probs, **sigmas)
    np.testing.assert_allclose(done.probs[:, :6], wanted, atol=1e-4)
    out = written(tmp_path / "o.nii.gz", done.after, before)
    assert (np.asarray(out.dataobj)[6:] == 255).all()


def test_limits(image, labels, monkeypatch):
    assert "--tile is for pictures" in load_error(image, labels, Options(tile=64))
    monkeypatch.setattr(inference, "_MAX_ENTRIES", VALUES.size * 5)
    load(image, labels, Options())
    monkeypatch.setattr(inference, "_MAX_ENTRIES", VALUES.size * 5 - 1)
    text = load_error(image, labels)
    assert "9x12x7 voxels of 1 channels are more than one call takes" in text
    assert "--tile" not in text


def test_number_of_sigmas(image, labels):
    options = Options(crf={"sxy_gaussian": (1.0, 2.0)})
    with pytest.raises(PictureError, match="--sxy-gaussian: expected a number or 3 numbers, got 2"):
        refine_labels(*load(image, labels, options), options)


def test_doubtful_srgb(tmp_path, labels):
    image = save(tmp_path / "i.nii", VALUES.astype(np.float32) / 1000)
    found = doubts(image, *load(image, labels, Options()), Options())
    assert "so all of it looks alike; a picture in [0, 1] wants --srgb 0.05" in found["srgb"]


# --- writing


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "OUT.NII.GZ"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, ">u2", np.int64])
def test_the_header_is_kept(tmp_path, name, kind, dtype):
    def edit(header):
        header.set_qform(AFFINE, 1)
        header.set_sform(AFFINE @ np.diag([1, 1, 1.001, 1]), 4)
        header["descrip"] = b"from a test"
        header["cal_max"] = 9
        header.set_xyzt_units("mm", "sec")

    path = save(tmp_path / "l.nii", ROUGH.astype(dtype), kind=kind, dtype=dtype, edit=edit)
    patched(path, SLOPE, "<ff", np.nan, np.nan) if kind is nibabel.Nifti1Image else None
    before = read_labels(path)
    stored = nibabel.load(path)
    flipped = before.positions[::-1]
    out = written(tmp_path / name, flipped, before)
    assert type(out) is kind
    assert np.array_equal(np.asarray(out.dataobj), ROUGH[::-1])
    assert out.get_data_dtype() == stored.get_data_dtype()
    for field in stored.header:
        if field not in ("scl_slope", "scl_inter"):
            assert np.array_equal(out.header[field], stored.header[field]), field
    assert out.dataobj.slope == 1
    assert out.dataobj.inter == 0


@pytest.mark.parametrize("own", [False, True])
def test_headers_of_other_values(tmp_path, own):
    """What describes an image, or probabilities, does not describe labels."""

    def edit(header):
        header.set_qform(AFFINE, 1)
        header.set_intent("vector")
        header["cal_min"], header["cal_max"] = 1, 9
        header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"an image"))

    image = save(tmp_path / "i.nii", VALUES, edit=edit)
    probs = segkernels.probs_from_labels(ROUGH[None], 3)[0]
    if own:
        labels = save(tmp_path / "l.nii", np.moveaxis(probs, 0, -1), edit=edit)
    else:
        labels = tmp_path / "l.npy"
        np.save(labels, probs)
    _, before = load(image, labels, Options())
    out = written(tmp_path / "out.nii.gz", before.positions, before)
    assert out.header["qform_code"] == 1
    assert np.array_equal(out.affine, AFFINE)
    assert out.header.get_intent()[0] == "none"
    assert out.header["cal_min"] == out.header["cal_max"] == 0
    assert list(out.header.extensions) == []
    assert out.get_data_dtype() == np.uint8
    # The image's own header is as it was.
    assert nibabel.load(image).header["cal_max"] == 9


def test_slopes_are_reset(tmp_path):
    """Stored 0, 2, 4 with slope 0.5 are the labels 0, 1, 2."""
    path = patched(save(tmp_path / "l.nii", ROUGH * 2), SLOPE, "<ff", 0.5, 0)
    before = read_labels(path)
    assert np.array_equal(before.positions, ROUGH)
    out = written(tmp_path / "out.nii", before.positions, before)
    assert np.array_equal(np.asarray(out.dataobj), ROUGH)
    assert (out.dataobj.slope, out.get_data_dtype()) == (1, np.uint8)


@pytest.mark.parametrize(
    ("dtype", "classes", "wanted"),
    [(np.uint8, 300, np.uint16), (np.int8, 200, np.uint8), (np.int16, 300, np.int16)],
)
def test_dtypes_that_cannot_hold_the_classes(tmp_path, dtype, classes, wanted):
    before = read_labels(
        save(tmp_path / "l.nii", ROUGH.astype(dtype)), Meaning(num_classes=classes)
    )
    positions = (np.arange(ROUGH.size) % classes).reshape(SHAPE)
    out = written(tmp_path / "out.nii", positions, before)
    assert out.get_data_dtype() == wanted
    assert np.array_equal(np.asarray(out.dataobj), positions)


def test_the_same_bytes_each_time(tmp_path, labels, monkeypatch):
    before = read_labels(labels)
    first = encode_labels(tmp_path / "a.nii.gz", before.positions, before)
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert encode_labels(tmp_path / "b.nii.gz", before.positions, before) == first
    assert first[3] == 0  # no name
    assert first[4:8] == bytes(4)  # no time


def test_endings(tmp_path, labels):
    assert ending(Path("x.y/A.Nii.GZ")) == ".nii.gz"
    assert ending(Path("a.nii")) == ".nii"
    assert ending(Path("a.b.PNG")) == ".png"
    assert ending(Path("a.gz")) == ".gz"
    assert picture_suffixes() >= {".nii", ".nii.gz", ".npy", ".png"}
    volume = read_labels(labels)
    assert volume.outputs == (".nii.gz", ".nii")
    Image.fromarray(ROUGH[0]).save(tmp_path / "a.png")
    picture = read_labels(tmp_path / "a.png")
    assert picture.outputs == (".png", ".tif", ".tiff")
    with pytest.raises(PictureError, match=r"a volume of labels is written as \.nii\.gz or \.nii"):
        encode_labels(tmp_path / "o.png", volume.positions, volume)
    with pytest.raises(PictureError, match=r"written as \.png or \.tif or \.tiff, got \.nii\.gz"):
        encode_labels(tmp_path / "o.nii.gz", picture.positions, picture)
    np.save(tmp_path / "a.npy", ROUGH)
    array = read_labels(tmp_path / "a.npy")
    with pytest.raises(PictureError, match="the header of a volume is needed"):
        encode_labels(tmp_path / "o.nii", array.positions, array)


# --- the overlay


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (1, -1, 1)])
def test_the_slice_is_upright(tmp_path, order, signs):
    """Whatever the order of the axes in the file, the front is above and the left is left."""
    shape = (6, 5, 4)  # right, front, up
    values = np.arange(120, dtype=np.float32).reshape(shape)
    labels = np.zeros(shape, np.uint8)
    labels[0, 1:3, 2] = 1
    labels[0, 0, 1] = 1
    flips = tuple(slice(None, None, sign) for sign in signs)
    stored = [np.ascontiguousarray(a[flips].transpose(order)) for a in (values, labels)]
    turned = np.zeros((4, 4))
    turned[3, 3] = 1
    for own, axis in enumerate(order):
        turned[axis, own] = signs[axis]
    image = save(tmp_path / "i.nii", stored[0], turned)
    label_file = save(tmp_path / "l.nii", stored[1], turned)
    options = Options(crf={"iterations": 0})
    done = refine_labels(*load(image, label_file, options), options)
    part, _, note = middle_slice(done)
    assert note == f"slice {2 if signs[2] > 0 else 1} of 4"
    assert np.array_equal(part.photograph.values[..., 0], values[:, ::-1, 2].T)
    assert np.array_equal(part.before.positions, labels[:, ::-1, 2].T)
    assert np.array_equal(part.after, part.before.positions)
    page = side_by_side(part.photograph, part.before, part.after)
    assert page.width > 3 * 400


def test_missing_voxels_are_not_what_a_slice_shows(tmp_path, labels):
    values = VALUES.astype(np.float32)
    values[:, :, 6] = np.nan
    image = save(tmp_path / "i.nii", values)
    rough = np.zeros(SHAPE, np.uint8)
    rough[3, 4, 2] = 1
    options = Options(crf={"iterations": 0})
    done = refine_labels(*load(image, save(labels, rough), options), options)
    assert middle_slice(done)[2] == "slice 2 of 7"


def test_the_slice_with_most_changes(image, labels):
    photograph, before = load(image, labels, Options())
    after = before.positions.copy()
    after[2:5, 3:9, 4] = (after[2:5, 3:9, 4] + 1) % 3
    after[0, 0, 6] = (after[0, 0, 6] + 1) % 3
    part, _, note = middle_slice(inference.Refined(photograph, before, after, None, 0.0))
    assert note == "slice 4 of 7"
    # Voxels of 0.5 x 1.25 mm are drawn twice as high.
    assert part.after.shape == (2 * SHAPE[1], SHAPE[0])
    assert part.changed == 2 * 18


# --- hostile files


def test_truncated(tmp_path, image):
    content = image.read_bytes()
    for length in (0, 1, 9, 40, len(content) // 2, len(content) - 1):
        image.write_bytes(content[:length])
        image_error(image)
    plain = save(tmp_path / "a.nii", VALUES)
    content = plain.read_bytes()
    for length in (0, 100, 348, 352, len(content) - 1):
        plain.write_bytes(content[:length])
        image_error(plain)


def test_a_wrong_checksum(image):
    content = bytearray(image.read_bytes())
    content[-6] ^= 1
    image.write_bytes(content)
    assert "CRC" in image_error(image)


def test_other_formats(tmp_path):
    text = "expected NIfTI in one file, got another format"
    (tmp_path / "a.nii").write_bytes(b"\x89PNG" * 1000)
    assert text in image_error(tmp_path / "a.nii")
    patched(save(tmp_path / "b.nii", VALUES), 344, "4s", b"ni1\0")
    assert text in image_error(tmp_path / "b.nii")
    (tmp_path / "c.nii").write_bytes(gzip.compress(bytes(1000)))
    assert text in image_error(tmp_path / "c.nii")
    save(tmp_path / "d.nii", VALUES).rename(tmp_path / "d.nii.gz")
    assert "cannot be read (Not a gzipped file" in image_error(tmp_path / "d.nii.gz")
    assert "cannot be read (No such file" in image_error(tmp_path / "e.nii")
    (tmp_path / "f.nii").mkdir()
    with pytest.raises(PictureError, match="expected a file, got a folder"):
        read_image(tmp_path / "f.nii")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((3, 32767, 32767, 32767), "voxels, more than --max-pixels"),
        ((4, 9, 12, 7, 32767), "cannot be read"),
        ((7, 9, 12, 7, 9, 9, 1, 1), "expected a volume (X, Y, Z) or (X, Y, Z, n)"),
        ((3, 9, -12, 7), "expected sizes of 1 or more"),
        ((3, 0, 12, 7), "expected sizes of 1 or more"),
        ((1, 756), "expected a volume (X, Y, Z) or (X, Y, Z, n)"),
        ((0, 9), "expected sizes of 1 or more"),
        ((99, 9), "expected a volume (X, Y, Z) or (X, Y, Z, n)"),
    ],
)
def test_dims(tmp_path, name, dims, message):
    plain = patched(save(tmp_path / "a.nii", VALUES), DIM, f"<{len(dims)}h", *dims)
    content = plain.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert message in image_error(tmp_path / name)


@pytest.mark.parametrize("edge", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_spacings(tmp_path, edge, axis):
    path = patched(save(tmp_path / "a.nii", VALUES), PIXDIM + 4 * axis, "<f", edge)
    text = image_error(path)
    assert "expected voxels with edges above 0, got the spacing" in text
    assert "pixdim" in text


def test_affines_that_are_not_finite(tmp_path):
    path = patched(save(tmp_path / "a.nii", VALUES), 280 + 12, "<f", np.nan)
    assert "expected a finite affine" in image_error(path)


@pytest.mark.parametrize("offset", [np.nan, np.inf, -1e9, 1e30])
def test_wrong_places_of_the_data(tmp_path, offset):
    path = patched(save(tmp_path / "a.nii", VALUES), OFFSET, "<f", offset)
    assert "cannot be read" in image_error(path)


def test_unknown_dtypes(tmp_path):
    for code in (0, 1, 999):
        path = patched(save(tmp_path / "a.nii", VALUES), TYPE, "<h", code)
        image_error(path)


def test_random_headers(tmp_path):
    """Any damage is an error of one line, or a volume."""
    content = save(tmp_path / "a.nii", VALUES).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in random.integers(0, 352, 3):
            damaged[place] = random.integers(0, 256)
        (tmp_path / "a.nii").write_bytes(damaged)
        try:
            found = read_image(tmp_path / "a.nii", Reading(max_pixels=10**6))
        except PictureError:
            refused += 1
        else:
            assert np.isfinite(found.values).all()
            assert min(found.spacing) > 0
    assert 10 < refused < 290


def test_without_nibabel(image, labels, monkeypatch):
    before = read_labels(labels)
    real = importlib.import_module

    def missing(name, *rest):
        if name == "nibabel":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    text = 'a NIfTI volume needs nibabel: pip install "segkernels[medical]"'
    assert text in image_error(image)
    with pytest.raises(PictureError) as caught:
        encode_labels(labels, before.positions, before)
    assert text in str(caught.value)
