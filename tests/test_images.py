"""Reading images as arrays, and writing files atomically."""

from __future__ import annotations

import os
import re
import stat

import numpy as np
import pytest
from PIL import Image

from segkernels.cli import images
from segkernels.cli.files import (
    PictureError,
    check_writable,
    encode_picture,
    make_folder,
    picture_suffixes,
    write_files,
)


def read_image(path):
    return images.read_image(path).values


RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
GREY = np.arange(24, dtype=np.uint8).reshape(4, 6)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_lossless_colour_formats(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RGB).save(path)
    read = read_image(path)
    assert read.dtype == np.uint8
    assert np.array_equal(read, RGB)


def test_jpeg(tmp_path):
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    Image.fromarray(flat).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - flat).max() <= 3


def test_grey_images_have_one_channel(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), GREY[..., None])


def test_one_bit_images_are_black_and_white(tmp_path):
    bits = GREY % 2 == 1
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], bits * 255)


def test_sixteen_bit_images_are_scaled_to_255(tmp_path):
    deep = GREY.astype(np.uint16) * 2570
    Image.fromarray(deep).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.float32
    assert read.shape == (4, 6, 1)
    np.testing.assert_allclose(read[..., 0], GREY * 10.0, rtol=1e-6)
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(tmp_path / "b.tif")
    assert read_image(tmp_path / "b.tif").max() == 255


def test_alpha_is_dropped(tmp_path):
    alpha = GREY * 10
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png"), RGB)
    with_alpha = Image.fromarray(GREY)
    with_alpha.putalpha(Image.fromarray(alpha))
    with_alpha.save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png"), GREY[..., None])


def test_palette_images_use_their_colours(tmp_path):
    image = Image.fromarray(GREY % 2)
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.save(tmp_path / "a.png", transparency=0)
    read = read_image(tmp_path / "a.png")
    assert read[0, 0].tolist() == [10, 20, 30]
    assert read[0, 1].tolist() == [200, 150, 100]


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (6, np.rot90(RGB, -1)),
        (8, np.rot90(RGB)),
    ],
)
def test_exif_orientation(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)


def test_floating_point_keeps_its_scale(tmp_path):
    values = GREY.astype(np.float32) / 24
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], values)


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int32, np.uint16])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 5)])
def test_arrays(tmp_path, dtype, shape):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", anything=values)
    for name in ("a.npy", "a.npz"):
        read = read_image(tmp_path / name)
        assert read.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
        assert np.array_equal(read, values.reshape(4, 6, -1))


def broken(path):
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"nonsense" * 9)


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def animated(path):
    frames = [Image.fromarray(GREY + i) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.png", lambda p: p.write_text("hello"), "IMAGE .*a.png: not a picture that can"),
        ("a.png", lambda p: p.write_bytes(b""), "not a picture"),
        ("a.png", broken, "IMAGE .*a.png: (cannot be read|not a picture)"),
        ("a.png", truncated, "IMAGE .*a.png: cannot be read .*"),
        ("a.gif", animated, "expected one picture, got 3 frames"),
        ("a.npy", lambda p: p.write_text("hello"), "not a readable numpy array"),
        ("a.npy", lambda p: np.save(p, np.array([{}, 1])), "not a readable numpy array"),
        ("a.npz", lambda p: p.write_bytes(b"PK\x03\x04junk"), "not a readable numpy array"),
        ("a.npz", lambda p: np.savez(p, x=GREY, y=GREY), r"expected one array, got \['x', 'y'\]"),
        ("a.npy", lambda p: np.save(p, np.zeros(3)), r"\(H, W\) or \(H, W, n\), got float64 \(3,"),
        ("a.npy", lambda p: np.save(p, np.zeros((0, 3))), r"got float64 \(0, 3\)"),
        ("a.npy", lambda p: np.save(p, GREY > 3), "expected a numeric array"),
        ("a.npy", lambda p: np.save(p, np.full((2, 2), np.nan)), "nodata or NaN only"),
        ("a.npy", lambda p: np.save(p, np.full((2, 2), np.inf)), "finite values, got infinity"),
    ],
)
def test_invalid_files(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(PictureError, match=message) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(PictureError, match="No such file"):
        read_image(tmp_path / "none.png")


def test_suffixes():
    suffixes = picture_suffixes()
    assert {".png", ".jpg", ".tif", ".npy", ".npz"} <= suffixes
    assert not {".pdf", ".txt", ".py"} & suffixes


# --- writing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_files_replaces(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    write_files({path: b"new"})
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_write_files_keeps_the_old_file_if_writing_fails(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(PictureError, match=r"a.bin: cannot be written \(No space left"):
        write_files({path: fail})
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_write_files_cleans_up_if_replacing_fails(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(PictureError, match="expected a file, got a folder"):
        write_files({tmp_path / "folder": b"x"})
    assert names(tmp_path) == ["folder"]


def test_written_files_have_usual_permissions(tmp_path):
    umask = os.umask(0o027)
    try:
        write_files({tmp_path / "a.png": encode_picture(tmp_path / "a.png", Image.fromarray(GREY))})
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o640


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real.png").write_bytes(b"")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    write_files(
        {tmp_path / "link.png": encode_picture(tmp_path / "link.png", Image.fromarray(GREY))}
    )
    assert (tmp_path / "link.png").is_symlink()
    assert np.array_equal(np.array(Image.open(tmp_path / "real.png")), GREY)


def test_check_writable(tmp_path):
    check_writable(tmp_path / "new.png", "-o")
    (tmp_path / "old.png").write_bytes(b"old")
    check_writable(tmp_path / "old.png", "-o")
    assert names(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_check_writable_raises(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cases = [
        (tmp_path, "-o .*: expected a file, got a folder"),
        (tmp_path / "no" / "a.png", "-o .*a.png: there is no folder .*no"),
        (tmp_path / "file" / "a.png", "there is no folder"),
        (tmp_path / ("x" * 300 + ".png"), "cannot be written"),
    ]
    for path, message in cases:
        with pytest.raises(PictureError, match=message):
            check_writable(path, "-o")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_raises_without_permission(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(PictureError, match=r"cannot be written \(Permission denied\)"):
        check_writable(locked / "a.png", "-o")


def test_make_folder(tmp_path):
    make_folder(tmp_path / "a" / "b", "-o")
    make_folder(tmp_path / "a" / "b", "-o")
    assert (tmp_path / "a" / "b").is_dir()
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PictureError, match=re.escape(f"-o {tmp_path / 'file'}: cannot be made")):
        make_folder(tmp_path / "file", "-o")
