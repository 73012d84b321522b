"""Photographs as arrays, and the ways in and out of files that the command shares.

What cannot be used raises :class:`PictureError`, whose text is one line that names the file, what
was expected and what came.
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
    """A file that cannot be used, told in one line."""


def picture_suffixes() -> frozenset[str]:
    """The file endings that Pillow can read, and those of arrays."""
    readable = {s for s, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(readable) | ARRAY_SUFFIXES


def read_image(path: Path) -> Photograph:
    """The photograph at ``path`` as an array (H, W, n), n = 1 for grey and 3 for colour.

    Pictures come out upright (EXIF orientation applied), on the scale 0 to 255 whatever their bit
    depth (uint8, or float32 for 16 bits a channel), and without their alpha channel: transparent
    pixels keep the colour that the file holds. Floating-point pictures and ``.npy`` / ``.npz``
    arrays (H, W) or (H, W, n) come out as float32 on their own scale.

    Raises:
        PictureError: The file cannot be read, or is no photograph as described.
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
    """The one picture in a file, decoded, upright; ``role`` (IMAGE, LABELS) begins the errors."""
    try:
        with Image.open(path) as opened:
            frames = getattr(opened, "n_frames", 1)
            if frames != 1 and opened.format != "MPO":
                # MPO is a phone's JPEG with a preview behind the picture; the picture is first.
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
        # Decoders raise whatever they trip over: OSError, SyntaxError, struct.error, ValueError...
        raise PictureError(f"{role} {path}: cannot be read ({_reason(error)})") from error


def read_array(path: Path, role: str) -> npt.NDArray[Any]:
    """The one array in a ``.npy`` or ``.npz`` file; ``role`` (IMAGE, LABELS) begins the errors."""
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
        # As with pictures: OSError, ValueError, BadZipFile, zlib.error...
        raise PictureError(
            f"{role} {path}: not a readable numpy array ({_reason(error)})"
        ) from error


def save_picture(path: Path, picture: Image.Image, **options: Any) -> None:
    """Writes a picture in the format that the path's ending names, or nothing at all."""
    name = Image.registered_extensions()[path.suffix.lower()]
    write_atomically(path, lambda file: picture.save(file, format=name, **options))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Has ``write`` fill a new file beside ``path``, and then puts it there in one step."""
    target = path.resolve()
    # Made by open(), not by tempfile, so that the result has the permissions of any new file.
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        # Encoders seek and patch; in memory that cannot leave half a file on a full disk.
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
    """Finds out, before any work, that a file could not be written; leaves no trace."""
    try:
        target = path.resolve()
        if target.is_dir():
            raise PictureError(f"{option} {path}: expected a file, got a folder")
        if not target.parent.is_dir():
            raise PictureError(f"{option} {path}: there is no folder {target.parent}")
        with suppress(FileNotFoundError):
            os.stat(target)  # the name, too, has to be one that the file system takes
            if not os.access(target, os.W_OK):
                raise PictureError(f"{option} {path}: cannot be written (it is read-only)")
        probe = target.with_name(f".{uuid.uuid4().hex}.part")
        with open(probe, "xb"):
            pass
        probe.unlink()
    except OSError as error:
        raise PictureError(f"{option} {path}: cannot be written ({_reason(error)})") from error


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder for output where it is missing, and finds out whether it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"{option} {folder}: cannot be made ({_reason(error)})") from error
    check_writable(folder / "probe", option)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__
