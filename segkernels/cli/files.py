"""Opens pictures, reads arrays, and writes files atomically.

A file that cannot be used raises `PictureError` with one line: the file, what was expected, what it
holds.
"""

from __future__ import annotations

import io
import os
import stat
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})

# Others that Pillow knows run programs (EPS), draw (WMF), or hold no pictures of this kind.
_FORMATS = (
    "AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP",
)  # fmt: skip
# Twice Image.MAX_IMAGE_PIXELS, as Pillow itself has it.
_PILLOW_LIMIT = 178_956_970
ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SUBFILE = 254  # TIFF's tag NewSubfileType, and its bits
REDUCED, MASK = 1, 4


class PictureError(Exception):
    """A file cannot be used; the message is one line."""


class OptionError(PictureError):
    """An option is missing or wrong; the message is one line."""


@dataclass(frozen=True)
class Reading:
    """How the user wants pictures to be read.

    Attributes:
        ignore_exif: do not apply the EXIF orientation.
        bits: of the values in pictures of 16 bits; None: all 16.
        max_pixels: pictures with more are refused, before they are decoded.
    """

    ignore_exif: bool = False
    bits: int | None = None
    max_pixels: int = _PILLOW_LIMIT

    def check_pixels(self, size: tuple[int, int], where: str) -> None:
        """Raise `PictureError`, which starts with `where`, for a picture that is too large."""
        width, height = size
        if width * height > self.max_pixels:
            raise PictureError(
                f"{where}: {width}x{height} is {width * height} pixels, more than --max-pixels "
                f"{self.max_pixels} (a limit, because a small file can claim any size); pass a "
                "larger one, or --tile for a large scene"
            )


@dataclass(frozen=True)
class Opened:
    """A decoded picture.

    Attributes:
        picture: upright, unless `Reading.ignore_exif`.
        orientation: of EXIF, which has been applied; 1 if there was nothing to do.
    """

    picture: Image.Image
    orientation: int = 1


def picture_formats() -> list[str]:
    """The formats of pictures that are opened, among those that Pillow was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def picture_suffixes() -> frozenset[str]:
    """File endings of the pictures that are opened, and of arrays."""
    formats = picture_formats()
    suffixes = {s for s, name in Image.registered_extensions().items() if name in formats}
    return frozenset(suffixes) | ARRAY_SUFFIXES


def open_picture(path: Path, role: str, reading: Reading) -> Opened:
    """Decode the only picture in a file and apply its EXIF orientation.

    `role` (IMAGE, LABELS) starts the error messages.
    """
    try:
        # Of a path Pillow may map the memory, and then misreads greyscale TIFF with an orientation.
        with open(path, "rb") as file, Image.open(file, formats=picture_formats()) as opened:
            reading.check_pixels(opened.size, f"{role} {path}")
            frames = _frames(opened)
            if frames != 1 and opened.format != "MPO":
                # MPO is a phone's JPEG: the picture, then a preview.
                raise PictureError(f"{role} {path}: expected one picture, got {frames} frames")
            stored = _orientation(opened)
            opened.load()
            now = _orientation(opened)  # 1 for TIFF, which Pillow turns itself
            picture: Image.Image = opened
            orientation = stored
            if reading.ignore_exif:
                orientation = 1
                if now != stored:
                    picture = opened.transpose(_TURNS[{6: 8, 8: 6}.get(stored, stored)])
            elif now != 1:
                picture = opened.transpose(_TURNS[now])
            picture.format = opened.format
            return Opened(picture, orientation)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(
            f"{role} {path}: not a picture that can be read ({', '.join(picture_formats())})"
        ) from None
    except Exception as error:
        # Decoders raise many types: OSError, SyntaxError, struct.error, ValueError...
        raise PictureError(f"{role} {path}: cannot be read ({reason(error)})") from error


def _frames(opened: Image.Image) -> int:
    """The number of pictures in a file, without the overviews of a TIFF."""
    frames: int = getattr(opened, "n_frames", 1)
    if frames == 1 or opened.format != "TIFF":
        return frames
    pictures = []
    for frame in range(frames):
        opened.seek(frame)
        if not int(opened.tag_v2.get(SUBFILE, 0)) & REDUCED:  # type: ignore[attr-defined]
            pictures.append(frame)
    opened.seek(pictures[0] if pictures else 0)
    return len(pictures)


def png_depth(path: Path, picture: Image.Image) -> int:
    """The bits a channel of a PNG; 8 for other formats."""
    if picture.format != "PNG":
        return 8
    with open(path, "rb") as file:
        return file.read(25)[24]


def is_deep(path: Path, picture: Image.Image) -> bool:
    """Whether a picture is a PNG of 16 bits a channel, of which Pillow keeps the upper 8."""
    return png_depth(path, picture) == 16 and not picture.mode.startswith("I")


def _orientation(opened: Image.Image) -> int:
    value = opened.getexif().get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def upright(array: Any, orientation: int) -> Any:
    """Apply an EXIF orientation to an array (H, W, ...), or to None."""
    if array is None or orientation == 1:
        return array
    turned = array.swapaxes(0, 1) if orientation >= 5 else array
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def read_arrays(path: Path, role: str) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays in a ``.npz`` file by name, or the one in a ``.npy`` file as "".

    `role` starts the error messages.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if strange:
            raise ValueError(f"{strange[0]} is no array")
        return arrays
    except Exception as error:
        # OSError, ValueError, BadZipFile, zlib.error, MemoryError...
        raise PictureError(
            f"{role} {path}: not a readable numpy array ({reason(error)})"
        ) from error


def read_array(path: Path, role: str) -> npt.NDArray[Any]:
    """Read the only array in a ``.npy`` or ``.npz`` file; `role` starts the error messages."""
    arrays = read_arrays(path, role)
    if len(arrays) != 1:
        raise PictureError(f"{role} {path}: expected one array, got {list(arrays)}")
    (array,) = arrays.values()
    return array


def encode_picture(path: Path, picture: Image.Image, **options: Any) -> bytes:
    """The file of a picture, in the format of the path's ending."""
    name = Image.registered_extensions()[path.suffix.lower()]
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format=name, **options)
    except Exception as error:
        # Encoders raise many types, as decoders do.
        raise PictureError(f"{path}: cannot be written ({reason(error)})") from error
    return buffer.getvalue()


def write_files(files: Mapping[Path, bytes | Callable[[IO[bytes]], object]]) -> None:
    """Write files, each as bytes or with a function that writes to an open file.

    All are written under temporary names and then renamed: what was there before stays until all
    are whole.

    Raises:
        PictureError: a file cannot be written, or would replace what is no regular file.
    """
    parts: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in files.items():
            target = resolve(path, "")
            _check_target(path, "")
            # open() instead of tempfile, which would restrict the permissions.
            part = target.with_name(f".{uuid.uuid4().hex}.part")
            parts[part] = target
            with open(part, "xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content)
        for part, target in parts.items():
            os.replace(part, target)
    except OSError as error:
        raise PictureError(f"{path}: cannot be written ({reason(error)})") from error
    finally:
        for part in parts:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def check_writable(path: Path, option: str) -> None:
    """Raise `PictureError` before any work if a file could not be written; leave no trace."""
    try:
        target = resolve(path, f"{option} ")
        _check_target(path, f"{option} ")
        if not target.parent.is_dir():
            raise PictureError(f"{option} {path}: there is no folder {target.parent}")
        _probe(target.parent)
    except OSError as error:
        raise PictureError(f"{option} {path}: cannot be written ({reason(error)})") from error


def make_folder(folder: Path, option: str) -> None:
    """Make an output folder if it is missing, and check that it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PictureError(f"{option} {folder}: cannot be made ({reason(error)})") from error
    try:
        _probe(folder)
    except OSError as error:
        raise PictureError(f"{option} {folder}: cannot be written ({reason(error)})") from error


def _probe(folder: Path) -> None:
    """Make a file in a folder and remove it."""
    probe = folder / f".{uuid.uuid4().hex}.part"
    with open(probe, "xb"):
        pass
    probe.unlink()


def resolve(path: Path, start: str) -> Path:
    """The absolute path without links; `start` starts the error message."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise PictureError(f"{start}{path}: {reason(error)}") from error


def _check_target(path: Path, start: str) -> None:
    """Raise `PictureError` if a file that is there must not be replaced."""
    check_kind(path, start)
    if path.exists() and not os.access(path, os.W_OK):
        raise PictureError(f"{start}{path}: cannot be written (it is read-only)")


def check_kind(path: Path, start: str) -> None:
    """Raise `PictureError` if a path leads to anything but a regular file or nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # what opens it says why
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise PictureError(f"{start}{path}: expected a file, got {kind}")


def reason(error: BaseException) -> str:
    """One line on an error, for a message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[0] or type(error).__name__
