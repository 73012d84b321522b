"""Reads photographs, scenes and volumes as arrays.

Pillow reads pictures; tifffile (extra ``tiff``) reads what Pillow cannot or reads wrongly: TIFF of
other bands than grey or RGB, and of other types than 8 bits, 16-bit grey and float32 grey.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from segkernels.cli.files import (
    ARRAY_SUFFIXES,
    MASK,
    ORIENTATION,
    REDUCED,
    SUBFILE,
    PictureError,
    Reading,
    check_kind,
    ending,
    is_deep,
    open_picture,
    read_array,
    reason,
    size_words,
    upright,
)
from segkernels.cli.volumes import Grid, check_places, is_volume, read_volume

Values = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

# TIFF tags, and the values of ExtraSamples that mean alpha.
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _FORMAT, _NODATA = 258, 262, 277, 338, 339, 42113
_ALPHA = (1, 2)
# The samples without alpha that Pillow reads, by PhotometricInterpretation.
_SAMPLES_OF = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_MOST_DIRECTORIES = 1000
_INSTALL = 'pip install "segkernels[tiff]"'
# 16-bit values below this are probably 10, 12 or 14 bits in a wider file.
_DIM = 1 << 14


@dataclass(frozen=True)
class Photograph:
    """A photograph, a scene or a volume.

    Attributes:
        values: (H, W, n) or (X, Y, Z, n), one channel for grey, three for colour, or all bands.
        missing: (H, W) or (X, Y, Z), True where there are no data; None: nowhere.
        orientation: of EXIF, if it was applied; else 1.
        doubt: a warning, or "".
        grid: of a volume; else None.
        cautions: more warnings, by the kinds of `inference.doubts`.
    """

    values: Values
    missing: Mask | None = None
    orientation: int = 1
    doubt: str = ""
    grid: Grid | None = None
    cautions: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) or (X, Y, Z)."""
        return self.values.shape[:-1]

    @property
    def size(self) -> tuple[int, ...]:
        """(width, height) or (X, Y, Z)."""
        return self.shape[::-1] if len(self.shape) == 2 else self.shape

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Of the voxels along the axes of a volume, in mm."""
        return None if self.grid is None else self.grid.spacing

    @property
    def affine(self) -> npt.NDArray[np.float64] | None:
        """(4, 4), from the indices of a voxel to mm."""
        return None if self.grid is None else self.grid.affine


class Bands(NamedTuple):
    """What a TIFF holds.

    Attributes:
        values: (H, W, n), without alpha.
        missing: (H, W), True where alpha or a mask is 0; None: nowhere.
        orientation: as in `Photograph`.
        nodata: GDAL's nodata value as text, or None.
    """

    values: npt.NDArray[Any]
    missing: Mask | None
    orientation: int
    nodata: Any


def read_image(path: Path, reading: Reading | None = None) -> Photograph:
    """Read a photograph.

    The EXIF orientation is applied. Values of 8-bit and 16-bit pictures are from 0 to 255 (uint8,
    or float32 for 16 bits). An alpha channel is dropped; transparent pixels keep the file's colour,
    except that those of a TIFF have no data. Signed integers, floats, and arrays ``.npy`` or
    ``.npz``, (H, W) or (H, W, n), become float32 and keep their scale, unless `Reading.bits` is
    given.

    A NIfTI volume, (X, Y, Z) or (X, Y, Z, n) or of RGB colours, becomes float32 on the file's own
    scale.

    No data have the pixels that GDAL's nodata value, a TIFF's mask or NaN marks. An array of bands
    has none where a band is NaN.

    Raises:
        PictureError: the file cannot be read, or is not a photograph as described.
    """
    reading = reading or Reading()
    check_kind(path, "IMAGE ")  # opening a FIFO would wait for a writer
    if is_volume(path):
        if reading.bits is not None:
            raise PictureError(
                f"IMAGE {path}: --bits is for pictures; a volume keeps its own scale"
            )
        values, grid = read_volume(path, "IMAGE", reading)
        if values.dtype.kind != "f":
            values = values.astype(np.float32)
        cautions = grid.cautions(f"IMAGE {path}")
        return replace(
            _photograph(path, values, reading, scaled=False), grid=grid, cautions=cautions
        )
    if ending(path) in ARRAY_SUFFIXES:
        values = read_array(path, "IMAGE")
        if values.dtype.kind not in "uif" or values.ndim not in (2, 3) or values.size == 0:
            raise PictureError(
                f"IMAGE {path}: expected a numeric array (H, W) or (H, W, n), "
                f"got {values.dtype} {values.shape}"
            )
        values = values.reshape(*values.shape[:2], -1)
        scaled = values.dtype.kind != "f" and values.dtype.itemsize > 1 and reading.bits is not None
        return _photograph(path, values, reading, scaled=scaled)
    if _is_tiff(path):
        return _read_tiff(path, reading)
    opened = open_picture(path, "IMAGE", reading)
    picture = opened.picture
    _check_deep_colour(path, picture, reading)
    return _photograph(
        path,
        _pixels(picture, path),
        reading,
        scaled=picture.mode.startswith("I"),
        orientation=opened.orientation,
    )


def read_images(paths: Sequence[Path], reading: Reading | None = None) -> Photograph:
    """Read several images of the same size as one photograph with all their channels.

    Raises:
        PictureError: a file cannot be used, or the sizes or the places of voxels differ.
    """
    reading = reading or Reading()
    found = [read_image(path, reading) for path in paths]
    first = found[0]
    if len(found) == 1:
        return first
    missing = None
    cautions: dict[str, str] = {}
    for path, other in zip(paths, found, strict=True):
        names = f"IMAGE {paths[0]}", f"IMAGE {path}"
        if other.shape != first.shape:
            raise PictureError(
                "sizes of images differ: "
                f"{names[0]} is {size_words(first.size)}, {names[1]} is {size_words(other.size)}"
            )
        cautions.update(other.cautions)
        if first.grid is not None and other.grid is not None and not reading.ignore_affine:
            cautions.update(check_places(names[0], first.grid, names[1], other.grid))
        if other.orientation != first.orientation:
            cautions["exif"] = (
                f"{names[0]} has EXIF orientation {first.orientation}, {names[1]} has "
                f"{other.orientation}, and each was turned by its own; pass --ignore-exif if they "
                "belong together as they are stored"
            )
        missing = _either(missing, other.missing)
    if missing is not None and missing.all():
        shown = ", ".join(map(str, paths))
        raise PictureError(f"IMAGE {shown}: expected pixels with data in all of them, got none")
    return Photograph(
        np.concatenate([other.values for other in found], axis=-1),
        missing,
        first.orientation,
        next((other.doubt for other in found if other.doubt), ""),
        first.grid,
        cautions,
    )


def read_bands(path: Path, role: str, reading: Reading) -> Bands | None:
    """The bands of a TIFF that Pillow cannot read or would change; None for any other file."""
    if not _is_tiff(path) or _pillow_suits(path, role) is None:
        return None
    return _decode(path, role, reading)


def stored_nodata(path: Path) -> float | None:
    """GDAL's nodata value of a TIFF; None for any other file."""
    try:
        return _number(_directories(path)[0].get(_NODATA)) if _is_tiff(path) else None
    except Exception:
        return None  # what decodes the file says why


def _photograph(
    path: Path,
    values: npt.NDArray[Any],
    reading: Reading,
    *,
    scaled: bool,
    missing: Mask | None = None,
    orientation: int = 1,
) -> Photograph:
    """A photograph of values (*, n); `scaled`: of unsigned integers, to [0, 255]."""
    doubt = ""
    if values.dtype.kind == "f":
        missing = _either(missing, np.isnan(values).any(axis=-1))
    if missing is not None and not missing.any():
        missing = None
    if missing is not None:
        if missing.all():
            raise PictureError(f"IMAGE {path}: expected pixels with data, got nodata or NaN only")
        # A value that others have, too.
        values = np.where(missing[..., None], values[~missing][0], values)
    if scaled:
        values, doubt = _scale(path, values, reading.bits)
    if values.dtype != np.uint8:
        with np.errstate(over="ignore"):  # float64 beyond float32
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise PictureError(f"IMAGE {path}: expected finite values, got infinity")
    return Photograph(values, missing, orientation, doubt)


def _scale(
    path: Path, values: npt.NDArray[Any], bits: int | None
) -> tuple[npt.NDArray[np.float32], str]:
    """Scale integers of `bits` bits to [0, 255]; also a doubt on values of fewer bits, or ""."""
    least, most = int(values.min()), int(values.max())
    full = (1 << (bits or 16)) - 1
    if least < 0 or most > full:
        expected = "8 or 16 bits a channel" if bits is None else f"values of --bits {bits}"
        raise PictureError(f"IMAGE {path}: expected {expected}, got values from {least} to {most}")
    doubt = ""
    if bits is None and 0 < most < _DIM:
        doubt = (
            f"IMAGE {path} has 16-bit values from {least} to {most}, read as 0 to 65535, so all of "
            f"it is dark; pass --bits {max(most.bit_length(), 8)} if that is its depth"
        )
    return values.astype(np.float32) / np.float32(full / 255), doubt


# --- pictures


def _pixels(picture: Image.Image, path: Path) -> npt.NDArray[Any]:
    mode = picture.mode
    if mode == "F" or mode.startswith("I"):
        # 16-bit grey: "I;16" and its byte orders, or "I" from older releases of Pillow.
        return np.array(picture)[..., None]
    if mode in ("1", "L", "LA"):
        return np.array(picture.convert("L"))[..., None]
    try:
        return np.array(picture.convert("RGB"))
    except ValueError as error:
        raise PictureError(f"IMAGE {path}: Pillow's mode {mode} is not supported") from error


def _check_deep_colour(path: Path, picture: Image.Image, reading: Reading) -> None:
    """Raise `PictureError` if Pillow cuts off the bits of a PNG's 16-bit colours that matter."""
    if not is_deep(path, picture):
        return
    most = int(np.array(picture.convert("RGB")).max())
    if most >= _DIM >> 8 and reading.bits in (None, 16):
        return
    raise PictureError(
        f"IMAGE {path}: a PNG of 16-bit colours with values below {(most + 1) << 8}, of which "
        f"Pillow keeps the upper 8 bits; save it as TIFF ({_INSTALL}) or .npy, and pass --bits"
    )


# --- TIFF


def _is_tiff(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    except OSError:
        return False  # the reader says why


def _directories(path: Path) -> list[TiffImagePlugin.ImageFileDirectory_v2]:
    """The tags of each picture in a TIFF."""
    found: list[TiffImagePlugin.ImageFileDirectory_v2] = []
    seen = {0}
    with open(path, "rb") as file:
        header = file.read(8)
        header += file.read(8) if b"+" in header[2:4] else b""
        place = TiffImagePlugin.ImageFileDirectory_v2(header).next
        while place not in seen and len(found) < _MOST_DIRECTORIES:
            seen.add(place)
            file.seek(place)
            found.append(TiffImagePlugin.ImageFileDirectory_v2(header))
            found[-1].load(file)
            place = found[-1].next
    return found


def _pillow_suits(path: Path, role: str) -> str | None:
    """None if Pillow reads all of a TIFF, or what it holds that Pillow would drop or change."""
    try:
        directories = _directories(path)
        tags = directories[0]
        bits = tuple(tags.get(_BITS, (1,)))
        samples = int(tags.get(_SAMPLES, 1))
        kinds = set(tags.get(_FORMAT, (1,)))
        alphas = [value for value in tags.get(_EXTRA, ()) if value in _ALPHA]
        photometric = int(tags.get(_PHOTOMETRIC, 1))
        if any(int(other.get(SUBFILE, 0)) & MASK for other in directories):
            return "a mask"
        bands = samples - len(alphas)
        usual = bands == _SAMPLES_OF.get(photometric) and len(alphas) < 2
        if role == "LABELS" and usual and photometric in (0, 1) and 1 < max(bits) < 8:
            return f"{max(bits)}-bit indices"  # Pillow scales them to 255
        if kinds == {1} and max(bits) <= 8 and usual:
            return None
        if (kinds, bits, samples) in (({1}, (16,), 1), ({3}, (32,), 1)):
            return None
        kind = {1: "uint", 2: "int", 3: "float"}.get(max(kinds), "type ")
        return f"{bands} band{'s' if bands > 1 else ''} of {kind}{max(bits)}"
    except Exception as error:
        return f"what Pillow cannot read: {reason(error)}"


def _read_tiff(path: Path, reading: Reading) -> Photograph:
    bands = read_bands(path, "IMAGE", reading)
    if bands is not None:
        values, dtype = bands.values, bands.values.dtype
        wide = dtype.kind in "ui" and dtype.itemsize > 1
        return _photograph(
            path,
            values,
            reading,
            scaled=wide and (dtype == np.uint16 or reading.bits is not None),
            missing=_either(bands.missing, _nodata(values, _number(bands.nodata))),
            orientation=bands.orientation,
        )
    opened = open_picture(path, "IMAGE", reading)
    picture = opened.picture
    values = _pixels(picture, path)
    missing = None
    if picture.mode in ("LA", "RGBA", "PA"):
        missing = np.array(picture.getchannel("A")) == 0
    tags = _directories(path)[0]
    nodata = _number(tags.get(_NODATA))
    if nodata is not None and picture.mode == "P":
        missing = _either(missing, np.array(picture) == nodata)
    elif nodata is not None:
        depth = tags.get(_BITS, (1,))[0]
        if depth < 8:  # Pillow scales to 255
            nodata *= 255 // ((1 << depth) - 1)
        if tags.get(_PHOTOMETRIC) == 0 and depth <= 8:  # white is 0
            nodata = 255 - nodata
        missing = _either(missing, _nodata(values, nodata))
    return _photograph(
        path,
        values,
        reading,
        scaled=picture.mode.startswith("I"),
        missing=missing,
        orientation=opened.orientation,
    )


def _decode(path: Path, role: str, reading: Reading) -> Bands:
    try:
        tifffile: Any = importlib.import_module("tifffile")
    except ImportError as error:
        raise PictureError(
            f"{role} {path}: a TIFF of {_pillow_suits(path, role)} needs tifffile: {_INSTALL}; or "
            f"save it as .npy ({'H, W' if role == 'LABELS' else 'H, W, n'})"
        ) from error
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if not page.subfiletype & REDUCED]
            masks = [page for page in pages if page.subfiletype & MASK]
            pages = [page for page in pages if not page.subfiletype & MASK]
            if len(pages) != 1:
                raise PictureError(f"{role} {path}: expected one picture, got {len(pages)} frames")
            (page,) = pages
            if set(page.axes) - set("YXS"):
                raise PictureError(f"{role} {path}: expected (H, W, bands), got axes {page.axes}")
            reading.check_pixels((page.imagewidth, page.imagelength), f"{role} {path}")
            values = page.asarray()
            if values.dtype.kind not in "buif" or values.size == 0:
                raise PictureError(
                    f"{role} {path}: expected integers or floats, got {values.dtype} {values.shape}"
                )
            if page.axes == "SYX":
                values = np.moveaxis(values, 0, -1)
            values = values.reshape(*values.shape[:2], -1)
            extra = [int(kind) for kind in page.extrasamples]
            first = values.shape[2] - len(extra)
            alphas = [first + i for i, kind in enumerate(extra) if kind in _ALPHA]
            tags: dict[int, Any] = {tag.code: tag.value for tag in page.tags}
            missing = None
            if masks:
                missing = masks[0].asarray().reshape(values.shape[:2]) == 0
    except PictureError:
        raise
    except Exception as error:
        # Compressed files need imagecodecs.
        cure = f"; {_INSTALL}" if importlib.util.find_spec("imagecodecs") is None else ""
        raise PictureError(f"{role} {path}: cannot be read ({reason(error)}){cure}") from error
    for alpha in alphas:
        missing = _either(missing, values[..., alpha] == 0)
    if alphas:
        values = np.delete(values, alphas, axis=2)
    orientation: int = tags.get(ORIENTATION, 1)
    if orientation not in range(1, 9) or reading.ignore_exif:
        orientation = 1
    values, missing = upright(values, orientation), upright(missing, orientation)
    return Bands(values, missing, orientation, tags.get(_NODATA))


def _number(stored: Any) -> float | None:
    """The number in GDAL's tag, which is text; None if there is none."""
    text = str(stored).strip(" \0")
    try:
        return int(text) if text.removeprefix("-").isdecimal() else float(text)
    except ValueError:
        return None


def _nodata(values: npt.NDArray[Any], value: float | None) -> Mask | None:
    """Where values (H, W, n) are the nodata value.

    A nodata value of unsigned integers, such as 0, may be an ordinary value of one band, so there
    all bands must have it; other types have room for one that no band uses.
    """
    if value is None:
        return None
    with np.errstate(over="ignore"):
        equal = values == (values.dtype.type(value) if values.dtype.kind == "f" else value)
    found: Mask = equal.all(axis=2) if values.dtype.kind == "u" else equal.any(axis=2)
    return found if found.any() else None


def _either(first: Mask | None, second: Mask | None) -> Mask | None:
    if first is None or second is None:
        return second if first is None else first
    return first | second
