"""Reads photographs and arrays, and writes files atomically.

A file that cannot be used raises `PictureError` with one line: the file, what was expected, what it
holds.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Photograph = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})


class PictureError(Exception):
    """A file cannot be used; the message is one line."""


def picture_suffixes() -> frozenset[str]:
    """File endings of pictures that Pillow can read, and of arrays."""
    readable = {s for s, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(readable) | ARRAY_SUFFIXES


def read_image(path: Path) -> Photograph:
    """Read a photograph as an array (H, W, n), with n = 1 for grey and n = 3 for colour.

    The EXIF orientation is applied. Values are from 0 to 255 for every bit depth (uint8, or float32
    for 16 bits a channel). The alpha channel is dropped; transparent pixels keep the file's colour.
    Floating-point pictures and ``.npy`` / ``.npz`` arrays (H, W) or (H, W, n) become float32 and
    keep their scale.

    Raises:
        PictureError: the file cannot be read, or is not a photograph as described.
    """
    if path.suffix.lower() in ARRAY_SUFFIXES:
        pixels = read_array(path, "IMAGE")
        if pixels.dtype.kind not in "uif" or pixels.ndim not in (2, 3) or pixels.size == 0:
            raise PictureError(
                f"IMAGE {path}: expected a numeric array (H, W) or (H, W, n), "
                f"got {pixels.dtype} {pixels.shape}"
            )
        photograph: Photograph = pixels.reshape(*pixels.shape[:2], -1)
        if photograph.dtype != np.uint8:
            photograph = photograph.astype(np.float32)
    else:
        photograph = _photograph(open_picture(path, "IMAGE"), path)
    if not np.isfinite(photograph).all():
        raise PictureError(f"IMAGE {path}: expected finite values, got NaN or infinity")
    return photograph


def _photograph(picture: Image.Image, path: Path) -> Photograph:
    mode = picture.mode
    if mode == "F":
        return np.array(picture, np.float32)[..., None]
    if mode.startswith("I"):
        # 16-bit grey: "I;16" and its byte orders, or "I" from older releases of Pillow.
        grey = np.array(picture)
        if grey.min() < 0 or grey.max() > 65535:
            raise PictureError(
                f"IMAGE {path}: expected 8 or 16 bits a channel, "
                f"got values from {grey.min()} to {grey.max()}"
            )
        scaled: Photograph = grey.astype(np.float32)[..., None] / np.float32(257)
        return scaled
    if mode in ("1", "L", "LA"):
        return np.array(picture.convert("L"))[..., None]
    try:
        return np.array(picture.convert("RGB"))
    except ValueError as error:
        raise PictureError(f"IMAGE {path}: Pillow's mode {mode} is not supported") from error


def open_picture(path: Path, role: str) -> Image.Image:
    """Decode the only picture in a file and apply its EXIF orientation.

    `role` (IMAGE, LABELS) starts the error messages.
    """
    try:
        with Image.open(path) as opened:
            frames = getattr(opened, "n_frames", 1)
            if frames != 1 and opened.format != "MPO":
                # MPO is a phone's JPEG: the picture, then a preview.
                raise PictureError(f"{role} {path}: expected one picture, got {frames} frames")
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            picture.format = opened.format
            return picture
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{role} {path}: not a picture that Pillow can read") from None
    except Exception as error:
        # Decoders raise many types: OSError, SyntaxError, struct.error, ValueError...
        raise PictureError(f"{role} {path}: cannot be read ({_reason(error)})") from error


def read_array(path: Path, role: str) -> npt.NDArray[Any]:
    """Read the only array in a ``.npy`` or ``.npz`` file; `role` starts the error messages."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = list(loaded.files)
            if len(names) != 1:
                raise PictureError(f"{role} {path}: expected one array, got {names}")
            array: npt.NDArray[Any] = loaded[names[0]]
            return array
    except PictureError:
        raise
    except Exception as error:
        # OSError, ValueError, BadZipFile, zlib.error...
        raise PictureError(
            f"{role} {path}: not a readable numpy array ({_reason(error)})"
        ) from error


def save_picture(path: Path, picture: Image.Image, **options: Any) -> None:
    """Write a picture atomically, in the format of the path's ending."""
    name = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda file: picture.save(file, format=name, **options))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a temporary file with `write`, then rename it to `path`."""
    target = path.resolve()
    # open() instead of tempfile, which would restrict the permissions.
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        # Encoders seek, so they write to memory: a full disk then leaves no partial file.
        buffer = io.BytesIO()
        write(buffer)
        with open(part, "xb") as file:
            file.write(buffer.getbuffer())
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PictureError(f"{path}: cannot be written ({_reason(error)})") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: Path, option: str) -> None:
    """Raise `PictureError` before any work if a file could not be written; leave no trace."""
    try:
        target = path.resolve()
        if target.is_dir():
            raise PictureError(f"{option} {path}: expected a file, got a folder")
        if not target.parent.is_dir():
            raise PictureError(f"{option} {path}: there is no folder {target.parent}")
        with suppress(FileNotFoundError):
            os.stat(target)  # the file system may reject the name
            if not os.access(target, os.W_OK):
                raise PictureError(f"{option} {path}: cannot be written (it is read-only)")
        probe = target.with_name(f".{uuid.uuid4().hex}.part")
        with open(probe, "xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise PictureError(f"{option} {path}: cannot be written ({_reason(error)})") from error


def make_folder(folder: Path, option: str) -> None:
    """Make an output folder if it is missing, and check that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"{option} {folder}: cannot be made ({_reason(error)})") from error
    check_writable(folder / "probe", option)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__
