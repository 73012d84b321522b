"""Opens pictures, reads arrays, and writes files atomically.

A file that cannot be used raises `PictureError` with one line: the file, what was expected, what it
holds.
"""

from __future__ import annotations

import io
import math
import os
import re
import socket
import stat
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
VOLUME_SUFFIXES = frozenset({".nii", ".nii.gz"})

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
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:64]


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
        max_pixels: pictures and volumes with more are refused, before they are decoded.
        scores_key: the name of the labels' array in a ``.npz`` with several: the scores (K, H, W).
            None: the only one.
        indices_key: the name of the array (K,) with the class indices of the scores. None: k.
        background: adds class 0, the background, with this score at every pixel to the scores in a
            label file. Then channel k is class index + 1.
        ignore_affine: do not compare where the voxels of volumes are.
    """

    ignore_exif: bool = False
    bits: int | None = None
    max_pixels: int = _PILLOW_LIMIT
    scores_key: str | None = None
    indices_key: str | None = None
    background: float | None = None
    ignore_affine: bool = False

    def check_pixels(self, size: tuple[int, ...], where: str) -> None:
        """Raise `PictureError`, which starts with `where`, for a picture that is too large."""
        if math.prod(size) > self.max_pixels:
            unit, tile = "pixels", ", or --tile for a large scene"
            if len(size) > 2:
                unit, tile = "voxels" if len(size) == 3 else "values", ""
            raise PictureError(
                f"{where}: {size_words(size)} is {math.prod(size)} {unit}, more than --max-pixels "
                f"{self.max_pixels} (a limit, because a small file can claim any size); pass a "
                f"larger one{tile}"
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
    """File endings of the pictures that are opened, of arrays and of volumes."""
    formats = picture_formats()
    suffixes = {s for s, name in Image.registered_extensions().items() if name in formats}
    return frozenset(suffixes) | ARRAY_SUFFIXES | VOLUME_SUFFIXES


def ending(path: Path) -> str:
    """The ending of a file's name in lower case, of which ".nii.gz" is one."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def size_words(size: tuple[int, ...]) -> str:
    """A size in words."""
    return "x".join(map(str, size))


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


def read_arrays(
    path: Path, role: str, expected: str, choose: Callable[[list[str]], Sequence[str]]
) -> dict[str, npt.NDArray[Any]]:
    """Read some of the arrays in a ``.npz`` file by name, or the one in a ``.npy`` file as "".

    Args:
        path: the file.
        role: the start of error messages.
        expected: the arrays that are expected, in words.
        choose: returns the names to read, of those in the file. An error lists what the file holds
            if there are none, or if the file lacks one.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            names, held = [""], f"one without a name, {loaded.dtype} {loaded.shape}"
            arrays = {"": loaded} if choose(names) == names else {}
        else:
            with loaded:
                wanted = choose(loaded.files)
                known = set(wanted) <= set(loaded.files)
                arrays = {name: loaded[name] for name in wanted} if known else {}
                held = "" if arrays else f"{loaded.files}{_held(loaded)}"
        if not arrays:
            raise PictureError(f"{role} {path}: expected {expected}, got {held}")
        strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if strange:
            raise ValueError(f"{strange[0]} is no array")
        return arrays
    except PictureError:
        raise
    except Exception as error:
        # OSError, ValueError, BadZipFile, zlib.error, MemoryError...
        if "Object arrays" in str(error):
            raise PictureError(
                f"{role} {path}: not a readable numpy array (it holds pickled objects, which can "
                "run programs); if you trust it, convert a dictionary to .npz: "
                "np.savez(path, **np.load(path, allow_pickle=True).item()), or if its keys are "
                "class indices: d = np.load(path, allow_pickle=True).item(); np.savez(path, "
                "scores=np.stack(list(d.values())), indices=np.array(list(d)))"
            ) from None
        raise PictureError(
            f"{role} {path}: not a readable numpy array ({reason(error)})"
        ) from error


def _held(loaded: Any) -> str:
    """The names, dtypes and shapes of the arrays in a ``.npz`` file, from their headers."""
    shown = []
    for name in loaded.files:
        member = name if name in loaded.zip.namelist() else f"{name}.npy"
        with loaded.zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_2_0
            if version == (1, 0):
                read = np.lib.format.read_array_header_1_0
            shape, _, dtype = read(file)
        shown.append(f"{name} {dtype} {shape}")
    return f": {', '.join(shown)}" if shown else ""


def read_array(path: Path, role: str) -> npt.NDArray[Any]:
    """Read the only array in a ``.npy`` or ``.npz`` file; `role` starts the error messages."""
    (array,) = read_arrays(
        path, role, "one array", lambda names: names if len(names) == 1 else []
    ).values()
    return array


def encode_picture(path: Path, picture: Image.Image, **options: Any) -> bytes:
    """The file of a picture, in the format of the path's ending."""
    name = Image.registered_extensions()[ending(path)]
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
            part = target.with_name(f".{uuid.uuid4().hex}.{_HOST}.{os.getpid()}.part")
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


def remove_parts(folder: Path) -> None:
    """Remove what `write_files` left in a folder when its process was killed."""
    mine = re.compile(rf"\.[0-9a-f]{{32}}\.{re.escape(_HOST)}\.(\d+)\.part")
    for below, _, names in os.walk(folder):
        for match in filter(None, map(mine.fullmatch, names)):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                with suppress(OSError):
                    os.unlink(os.path.join(below, match[0]))
            except (OSError, OverflowError):
                pass  # it runs, as another user


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
