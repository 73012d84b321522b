"""Reads label maps, and writes refined ones in the same format.

Labels are palette pictures (PASCAL VOC), colour pictures (annotations painted by hand), greyscale
pictures of indices, and numpy arrays and NIfTI volumes of labels or of a network's probabilities.
Reading takes two steps: `read_stored` reads what a file holds, and `Stored.label_map` says which of
its values are classes and which mark unknown pixels. Between them `judge` decides on the values of
all the maps in a folder together, for one map may lack what the others show.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from segkernels.cli.files import (
    ARRAY_SUFFIXES,
    OptionError,
    PictureError,
    Reading,
    check_kind,
    encode_picture,
    ending,
    is_deep,
    open_picture,
    png_depth,
    read_arrays,
)
from segkernels.cli.images import read_bands, stored_nodata
from segkernels.cli.palettes import Colour, Palette
from segkernels.cli.unknown import (
    BLACK,
    LARGEST_INDEX,
    Format,
    Kind,
    Meaning,
    Unknown,
    colour_name,
    judge,
    rgb,
)
from segkernels.cli.unknown import code as _code
from segkernels.cli.volumes import AxialSlice, Grid, encode_volume, is_volume, read_volume
from segkernels.ops.interpolate import interpolate

Positions = npt.NDArray[np.int32]

# Lossless formats that a label map can be written in: pictures, and volumes.
LABEL_OUTPUTS = (".png", ".tif", ".tiff")
VOLUME_OUTPUTS = (".nii.gz", ".nii")

_LOSSY_FORMATS = frozenset({"JPEG", "MPO", "JPEG2000"})
# A map with more values is a photograph or a lossy copy, unless num_classes is given.
_MOST_VALUES = 256
# A map with more values whose rarer half covers few pixels (_RARE_SHARE) was resampled.
_MANY_VALUES = 40
_RARE_SHARE = 0.01
_PROBABILITY_SLACK = 1e-3
_BLOCK = 1 << 22  # pixels that are worked on at a time, to bound the memory


@dataclass(frozen=True)
class LabelMap:
    """A label map, and the format to write a refined one in.

    Attributes:
        path: the file.
        kind: how the file represents classes.
        positions: (H, W) or (X, Y, Z), the position of each pixel's class in `keys`; -1 if it is
            unknown.
        keys: the value of each class in the file: an index, or a colour if `kind` is "colour".
        colours: (len(keys), 3) uint8, colours to draw the classes with.
        num_classes: the number of classes for the CRF; at least len(keys).
        unknown: a description of the values that were read as unknown.
        indices: the class index of each key; None for colours without a palette.
        void: the value in the file of a pixel without a class; None for a transparent one.
        doubt: a warning, or "".
        probs: float32, (C, *shape), or the foreground (1, *shape) of two classes.
        foreground_shape: of the array that held the foreground; else None.
        mode: Pillow's mode of the picture, or of one that can hold the array's indices.
        palette: of a palette picture.
        orientation: of EXIF, if it was applied; else 1.
        save_options: for Pillow.
        cautions: more warnings, by the kinds of `inference.doubts`.
        grid: of a volume, with the header to write; None for pictures and arrays.
    """

    path: Path
    kind: Kind
    positions: Positions
    keys: tuple[int, ...] | tuple[Colour, ...]
    colours: npt.NDArray[np.uint8]
    num_classes: int
    unknown: str
    indices: tuple[int, ...] | None
    void: int | Colour | None
    doubt: str = ""
    probs: npt.NDArray[np.float32] | None = None
    foreground_shape: tuple[int, ...] | None = None
    mode: str = "L"
    palette: tuple[int, ...] = ()
    orientation: int = 1
    save_options: dict[str, Any] = field(default_factory=dict)
    cautions: dict[str, str] = field(default_factory=dict)
    grid: Grid | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """(width, height) or (X, Y, Z)."""
        shape = self.positions.shape
        return shape[::-1] if len(shape) == 2 else shape

    @property
    def outputs(self) -> tuple[str, ...]:
        """Endings of the files that it can be written in, the usual one first."""
        return LABEL_OUTPUTS if self.positions.ndim == 2 else VOLUME_OUTPUTS

    def cut(self, axial: AxialSlice) -> LabelMap:
        """A slice of a volume as a picture, without probabilities."""
        return replace(self, positions=axial.cut(self.positions), probs=None, grid=None)

    def resized(self, shape: tuple[int, ...]) -> LabelMap:
        """The map stretched to another shape of pixels.

        A label is that of the nearest pixel. Probabilities are interpolated linearly, with
        antialiasing along axes that shrink, and unknown pixels stay unknown.
        """
        old = self.positions.shape
        # The pixel that holds the centre of the new one, as "nearest-exact" of torch.
        nearest = np.ix_(
            *((2 * np.arange(n) + 1) * o // (2 * n) for n, o in zip(shape, old, strict=True))
        )
        positions = self.positions[nearest]
        if self.probs is None:
            return replace(self, positions=positions)
        probs = _interpolate(self.probs, shape)
        foreground = self.foreground_shape
        if foreground is not None:
            foreground = (*foreground[: -len(shape)], *shape)
        return replace(
            self,
            positions=np.where(
                positions < 0, positions, _most_likely(probs, foreground is not None)
            ),
            probs=probs,
            foreground_shape=foreground,
        )


@dataclass(frozen=True)
class Stored:
    """A label map as its file stores it.

    Attributes:
        path: the file.
        format: how it represents classes.
        values: (H, W) or (X, Y, Z) integers: indices, or colours 0xrrggbb.
        counts: the number of pixels, at least half opaque, of each value.
        opaque: (H, W); None: everywhere.
        mode, orientation, save_options, grid: as in `LabelMap`.
        nodata: GDAL's nodata value in a TIFF, or None.
        lossy: the format of a picture whose values are not exact, or "".
        ready: the map, if there is nothing to decide: probabilities. Then there are no values.
    """

    path: Path
    format: Format
    values: npt.NDArray[np.integer[Any]]
    counts: dict[int, int]
    opaque: npt.NDArray[np.bool_] | None = None
    mode: str = "L"
    orientation: int = 1
    save_options: dict[str, Any] = field(default_factory=dict)
    nodata: float | None = None
    lossy: str = ""
    ready: LabelMap | None = None
    grid: Grid | None = None

    def label_map(
        self, meaning: Meaning, unknown: Unknown | None = None, *, blank: bool = False
    ) -> LabelMap:
        """The classes of this map.

        Args:
            meaning: as the user gave it.
            unknown: what `judge` decided; None: it decides on this map alone.
            blank: accept a map without labelled pixels.
        """
        if self.ready is not None:
            self._check_ready(self.ready, meaning)
            if self.ready.indices is None and meaning.palette is not None:
                codes = [_code(*colour) for colour in self.ready.colours.tolist()]
                return replace(self.ready, indices=self._in_palette(codes, meaning.palette))
            return self.ready
        if self.lossy and meaning.num_classes is None:
            raise PictureError(
                f"LABELS {self.path}: {self.lossy} is lossy and invents colours along every edge; "
                "save the labels as PNG (or pass --num-classes if the colours are still exact)"
            )
        if self.format.kind == "colour":
            self._refuse_noise(meaning)
        if unknown is None:
            unknown = judge(f"LABELS {self.path}", self.format, self.counts, meaning)
        if self.format.kind != "colour":
            # After judge, which says more on a mask with grey levels.
            self._refuse_noise(meaning)
        if unknown.error:
            raise PictureError(f"LABELS {self.path}: {unknown.error}")
        used = sorted(self.counts)
        dropped = unknown.values.intersection(used)
        shown = [self.format.show(value) for value in sorted(dropped)]
        words = ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "") or unknown.note or "none"
        if len(dropped) == len(used) and not blank:
            raise PictureError(
                f"LABELS {self.path}: expected labelled pixels, got unknown ones only ({words})"
            )
        classes = [value for value in used if value not in dropped]
        if self.format.kind == "colour":
            rest = self._colour_classes(classes, meaning)
        else:
            classes = self._index_classes(classes, unknown, words, meaning)
            colours = distinct_colours(classes)
            if self.format.kind == "palette":
                known = [rgb(self.format.colour(i) or BLACK) for i in classes]
                colours = np.array(known, np.uint8).reshape(-1, 3)
            rest = {
                "keys": tuple(classes),
                "indices": tuple(classes),
                "colours": _named_colours(colours, classes, meaning.palette),
                "num_classes": len(classes),
            }
        return LabelMap(
            path=self.path,
            kind="index" if self.format.kind == "array" else self.format.kind,
            positions=self._positions(classes, blank),
            unknown=words,
            void=self._void(classes, [*sorted(dropped), *sorted(unknown.values)]),
            doubt=unknown.doubt or self._doubtful_nodata(classes, meaning),
            mode=self.mode,
            palette=self.format.palette,
            orientation=self.orientation,
            save_options=self.save_options,
            grid=self.grid,
            **rest,
        )

    def _check_ready(self, ready: LabelMap, meaning: Meaning) -> None:
        if meaning.unknown != ("auto",) and not meaning.shared:
            raise PictureError(
                f"LABELS {self.path}: --unknown cannot name pixels in an array of probabilities; "
                "an unknown pixel has equal ones"
            )
        assert ready.probs is not None
        if meaning.num_classes not in (None, ready.num_classes, len(ready.probs)):
            raise PictureError(
                f"LABELS {self.path}: expected probabilities of {meaning.num_classes} classes "
                f"(C, H, W), got shape {ready.probs.shape}"
            )

    def _refuse_noise(self, meaning: Meaning) -> None:
        """Raise for a photograph, and for a label map that was compressed or resized."""
        what = "colours" if self.format.kind == "colour" else "values"
        number = len(self.counts)
        if meaning.num_classes is not None:
            if self.format.kind == "colour" and number > meaning.num_classes + _MOST_VALUES:
                # Checked before any work on single colours: a photograph has a million.
                raise _too_many_colours(self.path, number, meaning.num_classes)
            return
        counts = np.sort(list(self.counts.values()))
        if number > _MOST_VALUES:
            found = f"{number} {what}"
        elif self.values.ndim == 3:
            return  # atlases have many small classes
        elif number > _MANY_VALUES and counts[: number // 2].sum() < _RARE_SHARE * counts.sum():
            found = f"{number} {what}, half of them on less than {_RARE_SHARE:.0%} of the pixels"
        else:
            return
        raise PictureError(
            f"LABELS {self.path}: expected a few {what}, one a class, got {found}: a photograph, "
            "or labels saved as JPEG or resized with smoothing? Pass --num-classes if these are "
            "classes"
        )

    def _colour_classes(self, classes: list[int], meaning: Meaning) -> dict[str, Any]:
        indices = None if meaning.palette is None else self._in_palette(classes, meaning.palette)
        if meaning.num_classes is not None and len(classes) > meaning.num_classes:
            raise _too_many_colours(self.path, len(classes), meaning.num_classes)
        keys = tuple(rgb(value) for value in classes)
        return {
            "keys": keys,
            "indices": indices,
            "colours": np.array(keys, np.uint8).reshape(-1, 3),
            "num_classes": max(meaning.num_classes or 0, len(keys)),
        }

    def _in_palette(self, classes: list[int], palette: Palette) -> tuple[int, ...]:
        """The class indices of colours."""
        strange = [value for value in classes if rgb(value) not in palette.indices]
        if strange:
            value = max(strange, key=lambda code: self.counts.get(code, 0))
            number = f" ({self.counts[value]} pixels)" if value in self.counts else ""
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            raise PictureError(
                f"LABELS {self.path}: expected colours of --palette {palette.name}, got "
                f"{colour_name(value)}{number}{more}"
            )
        return tuple(palette.indices[rgb(value)] for value in classes)

    def _index_classes(
        self, used: list[int], unknown: Unknown, words: str, meaning: Meaning
    ) -> list[int]:
        """The indices of the classes: those that are used, or all of `Meaning.num_classes`."""
        if meaning.num_classes is None:
            if used and used[0] < 0:
                raise PictureError(
                    f"LABELS {self.path}: expected indices from 0, got {used[0]}; if it marks "
                    f"unknown pixels, pass --unknown {used[0]}"
                )
            return used
        count = meaning.num_classes
        if self.format.kind == "palette" and count > 256:
            raise OptionError(
                f"LABELS {self.path}: expected at most 256 classes in a picture with a palette, "
                f"got --num-classes {count}"
            )
        wrong = [index for index in used if not 0 <= index < count]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise PictureError(
                f"LABELS {self.path}: expected indices in [0, {count}) for the {count} classes "
                f"given, got {wrong[0]}{more} (unknown: {words})"
            )
        return [index for index in range(count) if index not in unknown.values]

    def _positions(self, classes: list[int], blank: bool) -> Positions:
        least, most = int(self.values.min()), int(self.values.max())
        # Of 2^24 colours, calloc does not touch the pages of those that are absent.
        table = np.zeros(most - least + 1, np.int16 if len(classes) < 32767 else np.int32)
        for position, value in enumerate(classes):
            if least <= value <= most:
                table[value - least] = position + 1
        positions = np.empty(self.values.shape, np.int32)
        for rows in _blocks(self.values):
            positions[rows] = table[self.values[rows].astype(np.int64) - least]
        positions -= 1
        if self.opaque is not None:
            positions[~self.opaque] = -1
            if not (blank or (positions >= 0).any()):
                raise PictureError(
                    f"LABELS {self.path}: expected labelled pixels, got unknown ones only"
                )
        return positions

    def _void(self, classes: list[int], dropped: list[int]) -> int | Colour | None:
        """The value for pixels without a class: the map's own, or one that is no class."""
        if self.format.kind == "colour":
            value = dropped[0] if dropped else BLACK
            return None if value in classes or self.opaque is not None else rgb(value)
        highest = max(self.format.highest, 255)
        for value in (*dropped, highest):
            if 0 <= value <= highest and value not in classes:
                return value
        return _free_index(classes, highest)

    def _doubtful_nodata(self, classes: list[int], meaning: Meaning) -> str:
        """A warning where GDAL's nodata value is read as a class, or ""."""
        if (
            self.nodata not in classes
            or self.format.kind == "colour"
            or meaning.unknown != ("auto",)
        ):
            return ""
        return (
            f"LABELS {self.path}: the file's nodata value, {self.nodata:g}, is read as a class; "
            f"pass --unknown {self.nodata:g} if it marks unknown pixels"
        )


def read_labels(
    path: Path, meaning: Meaning | None = None, reading: Reading | None = None
) -> LabelMap:
    """Read a label map.

    Args:
        path: a palette picture (classes are its indices), a colour picture (its colours), a
            greyscale or 1-bit picture (its values), or ``.npy`` / ``.npz`` with integer labels
            (H, W), probabilities (C, H, W), or the foreground's probability (H, W) or (1, H, W).
            Or a volume: NIfTI with labels (X, Y, Z), integers or floats without a fraction, with
            probabilities (X, Y, Z, C), or the foreground's (X, Y, Z); or an array with integer
            labels (X, Y, Z) or probabilities (C, X, Y, Z).
        meaning: which pixels are unknown, and the number of classes.
        reading: of pictures and arrays.

    Probabilities need not sum to 1: class activation maps, say, are passed on as they are. A score
    of 0 does not make a class impossible, because `segkernels.dense_crf` raises scores below 1e-5
    to 1e-5, as pydensecrf's ``unary_from_softmax`` does.

    Raises:
        PictureError: the file cannot be read, or is not a label map as described.
    """
    return read_stored(path, reading or Reading()).label_map(meaning or Meaning())


def encode_labels(path: Path, positions: npt.NDArray[Any], like: LabelMap) -> bytes:
    """The file of `positions`, indices into ``like.keys``, in the format of `like`.

    -1 is a pixel without a class, and becomes ``like.void``.
    """
    if is_volume(path) != (positions.ndim == 3):
        kind = "a volume" if positions.ndim == 3 else "a picture"
        raise PictureError(
            f"{path}: {kind} of labels is written as {' or '.join(like.outputs)}, "
            f"got {ending(path) or 'no ending'}"
        )
    none = positions < 0
    void = like.void if none.any() else None
    # The last one is position -1.
    keys = np.array([*like.keys, like.keys[0] if void is None else void])
    if positions.ndim == 3:
        if like.grid is None:
            raise PictureError(
                f"{path}: the header of a volume is needed, and {like.path} has none"
            )
        return encode_volume(path, keys, positions, like.grid)
    mode = like.mode
    if like.kind != "colour":
        if int(keys.max()) > 255 or mode[0] == "I":
            mode = "I;16"
        elif mode == "1" and int(keys.max()) > 1:
            mode = "L"
    dtype = {"1": np.bool_, "I;16": np.uint16}.get(mode, np.uint8)
    picture = Image.fromarray(keys.astype(dtype)[positions])
    if mode == "P":
        missing = 3 * (int(keys.max()) + 1) - len(like.palette)
        picture.putpalette((*like.palette, *[0] * missing))
    elif mode in ("LA", "RGBA") or (none.any() and like.void is None):
        picture.putalpha(Image.fromarray(np.where(none, np.uint8(0), np.uint8(255))))
    return encode_picture(path, picture, **like.save_options)


def distinct_colours(classes: Iterable[int]) -> npt.NDArray[np.uint8]:
    """A fixed colour for each class index, distinct from those of nearby indices: (C, 3) uint8.

    Hues step by the golden angle, so none repeats; lightness and saturation alternate.
    """
    colours = []
    for i in classes:
        hue = (0.58 + i * 0.618033988749895) % 1.0
        light, full = ((0.52, 0.78), (0.68, 0.62), (0.38, 0.70))[i % 3]
        colours.append([round(255 * v) for v in colorsys.hls_to_rgb(hue, light, full)])
    return np.array(colours, np.uint8).reshape(-1, 3)


# --- file formats


def read_stored(path: Path, reading: Reading) -> Stored:
    """Read what a file holds, without a decision on unknown pixels.

    Raises:
        PictureError: the file cannot be read, or cannot be a label map.
    """
    check_kind(path, "LABELS ")
    _check_scores(path, reading)
    stored = _read(path, reading)
    if reading.background is not None and stored.ready is None:
        raise PictureError(
            f"LABELS {path}: --background adds a class to scores, and these are labels; expected "
            "float scores (K, H, W)"
        )
    return stored


def _check_scores(path: Path, reading: Reading) -> None:
    """Raise `PictureError` for options on scores that do not fit the file or each other."""
    if reading.background is not None and not 0 <= reading.background <= 1:
        raise OptionError(f"--background: expected a score from 0 to 1, got {reading.background}")
    if reading.indices_key is not None and reading.scores_key is None:
        raise OptionError("--indices-key: expected --scores-key with it")
    if reading.scores_key is not None and ending(path) != ".npz":
        raise PictureError(f"LABELS {path}: --scores-key names an array in a .npz file")


def _read(path: Path, reading: Reading) -> Stored:
    if is_volume(path):
        return _from_volume(path, reading)
    if ending(path) in ARRAY_SUFFIXES:
        return _from_arrays(path, _named_arrays(path, reading), reading, axes=(2, 3))
    bands = read_bands(path, "LABELS", reading)
    if bands is not None:
        values = np.moveaxis(bands.values, -1, 0)  # (C, H, W)
        return _from_arrays(
            path,
            {"": values[0] if len(values) == 1 else values},
            reading,
            None if bands.missing is None else ~bands.missing,
            orientation=bands.orientation,
            nodata=stored_nodata(path),
        )
    opened = open_picture(path, "LABELS", reading)
    picture = opened.picture
    if is_deep(path, picture):
        raise PictureError(
            f"LABELS {path}: a PNG of 16 bits a channel, of which Pillow keeps the upper 8; save "
            "it with 8 bits, or as 16-bit greyscale without alpha"
        )
    lossy = str(picture.format) if picture.format in _LOSSY_FORMATS else ""
    rest: dict[str, Any] = {"orientation": opened.orientation, "nodata": stored_nodata(path)}
    rest["lossy"] = lossy
    transparent = picture.info.get("transparency")  # a value that stands for transparent pixels
    if picture.mode == "RGB" and transparent is not None:
        picture = picture.convert("RGBA")
    mode = picture.mode
    if mode == "F":
        return _from_arrays(path, {"": np.array(picture)}, reading, orientation=opened.orientation)
    if mode == "P":
        # A transparent index is an ordinary class, and stays transparent.
        options = {key: value for key, value in picture.info.items() if key == "transparency"}
        format = Format("palette", palette=tuple(picture.getpalette("RGB") or ()))
        return _indices(path, format, np.array(picture), mode="P", save_options=options, **rest)
    if mode == "LA":
        grey, alpha = np.moveaxis(np.array(picture), -1, 0)
        return _indices(path, Format("index"), grey, alpha >= 128, mode=mode, **rest)
    if mode in ("1", "L") or mode.startswith("I"):
        values = np.array(picture)
        highest = {"1": 1, "L": 255}.get(mode, LARGEST_INDEX)
        if mode == "1":
            values = values.astype(np.uint8)
        elif mode == "L":
            # Pillow scales the values of 2 and 4 bits to 255.
            values = values // (255 // ((1 << min(png_depth(path, picture), 8)) - 1))
        opaque = None if transparent is None else values != transparent
        return _indices(path, Format("index", highest), values, opaque, mode=mode, **rest)
    if mode in ("RGB", "RGBA", "PA"):
        return _from_colours(path, picture, rest)
    raise PictureError(
        f"LABELS {path}: expected a palette, colour, greyscale or 1-bit picture, "
        f"got Pillow's mode {mode}"
    )


def _indices(
    path: Path,
    format: Format,
    values: npt.NDArray[Any],
    opaque: npt.NDArray[np.bool_] | None = None,
    **rest: Any,
) -> Stored:
    least, most = int(values.min()), int(values.max())
    if least < -LARGEST_INDEX or most > LARGEST_INDEX:
        raise PictureError(
            f"LABELS {path}: expected indices from 0 to {LARGEST_INDEX}, "
            f"got values from {least} to {most}"
        )
    tally = np.zeros(most - least + 1, np.int64)
    for rows in _blocks(values):
        seen = values[rows] if opaque is None else values[rows][opaque[rows]]
        tally += np.bincount(seen.ravel().astype(np.int64) - least, minlength=len(tally))
    counts = {int(i) + least: int(tally[i]) for i in np.flatnonzero(tally)}
    if not counts:
        raise PictureError(f"LABELS {path}: expected labelled pixels, got transparent ones only")
    return Stored(path, format, values, counts, opaque, **rest)


def _from_colours(path: Path, picture: Image.Image, rest: dict[str, Any]) -> Stored:
    opaque = None
    if picture.mode != "RGB":
        opaque = np.array(picture.convert("RGBA").getchannel("A")) >= 128
    rgb = np.asarray(picture.convert("RGB"))
    codes = np.empty(rgb.shape[:2], np.int32)
    counts: Counter[int] = Counter()
    for rows in _blocks(codes):
        wide = rgb[rows].astype(np.int32)
        codes[rows] = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
        seen = codes[rows] if opaque is None else codes[rows][opaque[rows]]
        found, numbers = _tally(seen)
        counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))
    if not counts:
        raise PictureError(f"LABELS {path}: expected labelled pixels, got transparent ones only")
    mode = "RGB" if opaque is None else "RGBA"
    return Stored(path, Format("colour"), codes, dict(counts), opaque, mode=mode, **rest)


def _from_volume(path: Path, reading: Reading) -> Stored:
    values, grid = read_volume(path, "LABELS", reading)
    whole = np.ascontiguousarray(np.moveaxis(values, -1, 0))  # (C, X, Y, Z)
    if len(whole) == 1 and np.abs(whole).max() < 1 << 30 and np.array_equal(whole, whole.round()):
        # Floats without a fraction are labels, too.
        whole = whole[0] if whole.dtype.kind != "f" else whole[0].astype(np.int32)
    stored = _from_arrays(path, {"": whole}, reading, axes=(3,))
    if stored.ready is None:
        return replace(stored, grid=grid)
    return replace(stored, ready=replace(stored.ready, grid=grid.for_labels()))


def _named_arrays(path: Path, reading: Reading) -> dict[str, npt.NDArray[Any]]:
    """The arrays that `_from_arrays` takes."""
    if reading.scores_key is None:
        return read_arrays(
            path,
            "LABELS",
            "one array (or --scores-key with the name of one)",
            lambda names: names if len(names) == 1 or _is_refined(names) else [],
        )
    keys = [key for key in (reading.scores_key, reading.indices_key) if key is not None]
    arrays = read_arrays(path, "LABELS", f"arrays named {' and '.join(keys)}", lambda _: keys)
    if len(arrays) == 1:
        return arrays
    return {"probs": arrays[keys[0]], "indices": arrays[keys[1]]}


def not_labels(path: Path, dtype: object, shape: tuple[int, ...]) -> PictureError:
    """The error for an array of another shape or dtype."""
    return PictureError(
        f"LABELS {path}: expected float probabilities (C, H, W), those of the foreground "
        f"(H, W), or integer labels (H, W), got {dtype} {shape}; for a volume, (C, X, Y, Z) or "
        "(X, Y, Z)"
    )


def _is_refined(names: Collection[str]) -> bool:
    """Whether arrays of these names are what `segkernels refine -o out.npz` writes."""
    return set(names) in ({"probs", "indices"}, {"probs", "colours"})


def _from_arrays(
    path: Path,
    arrays: dict[str, npt.NDArray[Any]],
    reading: Reading,
    opaque: npt.NDArray[np.bool_] | None = None,
    *,
    orientation: int = 1,
    nodata: float | None = None,
    axes: tuple[int, ...] = (2,),
) -> Stored:
    """Labels or probabilities in an array, or the result of `segkernels refine -o out.npz`.

    `axes` are the numbers of axes that labels may have: 3 for volumes.
    """
    keys: npt.NDArray[Any] | None = None
    if _is_refined(arrays):
        keys = arrays.get("indices", arrays.get("colours"))
    values = arrays["probs"] if keys is not None else next(iter(arrays.values()))
    floats = values.ndim - 1 in axes or values.ndim == 2
    if values.size and values.dtype.kind == "f" and floats:
        ready = _from_probabilities(path, values, keys, reading, opaque)
        ready = replace(ready, orientation=orientation)
        return Stored(path, Format("probabilities"), np.empty((0, 0), int), {}, ready=ready)
    integers = values.dtype.kind in "uib" and values.ndim in axes
    if not (values.size and integers and keys is None):
        raise not_labels(path, values.dtype, values.shape)
    values = values.astype(np.uint8) if values.dtype == np.bool_ else values
    mode = "L" if int(values.max()) <= 255 else "I;16"
    rest = {"mode": mode, "orientation": orientation, "nodata": nodata}
    return _indices(path, Format("array"), values, opaque, **rest)


def _from_probabilities(
    path: Path,
    values: npt.NDArray[Any],
    keys: npt.NDArray[Any] | None,
    reading: Reading,
    opaque: npt.NDArray[np.bool_] | None,
) -> LabelMap:
    probs = np.array(values if values.ndim > 2 else values[None], np.float32)
    scores = reading.scores_key is not None or reading.background is not None
    if (
        scores
        and keys is not None
        and (keys.dtype.kind not in "ui" or keys.shape != probs.shape[:1])
    ):
        raise PictureError(
            f"LABELS {path}: expected one integer index for each of {len(probs)} scores, "
            f"got {keys.dtype} {keys.shape}"
        )
    if reading.background is not None:
        own = range(len(probs)) if keys is None else keys.tolist()
        keys = np.array([0, *(index + 1 for index in own)])
        probs = np.concatenate([np.full_like(probs[:1], reading.background), probs])
    foreground = len(probs) == 1 and keys is None
    count = 2 if foreground else len(probs)
    if count > LARGEST_INDEX + 1:
        raise PictureError(f"LABELS {path}: expected at most 65536 classes, got {count}")
    unknown: npt.NDArray[np.bool_] = np.zeros(probs.shape[1:], bool)
    if keys is not None and not scores:
        # Pixels without data, as refine writes them. Elsewhere NaN is an error of the network.
        unknown |= np.isnan(probs).all(axis=0)
    if opaque is not None:
        unknown |= ~opaque
    if not unknown.all():
        probs[:, unknown] = 1 / count
    least, most = float(probs.min()), float(probs.max())
    if not np.isfinite([least, most]).all():
        hint = (
            ""
            if keys is not None or scores
            else " (for pixels without data, .npz can be read again)"
        )
        raise PictureError(
            f"LABELS {path}: expected finite probabilities, got NaN or infinity{hint}"
        )
    if least < 0 or most > 1 + _PROBABILITY_SLACK:
        cure = "a sigmoid first; labels need integers" if foreground else "a softmax first"
        cure += ", activation maps a division by their largest" if scores else ""
        raise PictureError(
            f"LABELS {path}: expected probabilities between 0 and 1, got values from {least:.6g} "
            f"to {most:.6g} (logits need {cure})"
        )
    positions = _most_likely(probs, foreground)
    if scores:
        unknown |= (probs == 0).all(axis=0)
        if unknown.all():
            raise PictureError(f"LABELS {path}: expected scores above 0, got 0 only")
    positions[unknown] = -1
    number = int(unknown.sum())
    rest = _classes(path, np.arange(count) if keys is None else keys, count)
    return LabelMap(
        path=path,
        positions=positions,
        num_classes=count,
        unknown=f"{number} pixels without {'a score' if scores else 'data'}"
        if number
        else "none (probabilities)",
        probs=np.minimum(probs, 1),
        foreground_shape=values.shape if foreground else None,
        **rest,
    )


def _most_likely(probs: npt.NDArray[np.float32], foreground: bool) -> Positions:
    """The position of each pixel's most likely class."""
    return (probs[0] > 0.5 if foreground else probs.argmax(axis=0)).astype(np.int32)


def _interpolate(probs: npt.NDArray[np.float32], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Probabilities (C, *old) interpolated linearly to (C, *shape)."""
    resized = torch.from_numpy(probs)
    if all(new >= old for new, old in zip(shape, probs.shape[1:], strict=True)):
        mode = "bilinear" if len(shape) == 2 else "trilinear"
        return interpolate(resized[None], shape, mode=mode)[0].numpy()
    # One axis at a time: torch's antialiasing lacks volumes, and is wrong for an output of width 1.
    for axis, new in enumerate(shape, start=1):
        lines = resized.movedim(axis, -1)
        flat = lines.reshape(1, 1, -1, lines.shape[-1])
        flat = interpolate(flat, (flat.shape[2], new), mode="bilinear", antialias=True)
        resized = flat.view(*lines.shape[:-1], new).movedim(-1, axis)
    return resized.contiguous().numpy()


def _classes(path: Path, keys: npt.NDArray[Any], count: int) -> dict[str, Any]:
    """The part of a `LabelMap` that follows from the indices (K,) or colours (K, 3)."""
    if keys.dtype.kind not in "ui" or keys.shape not in ((count,), (count, 3)):
        raise PictureError(
            f"LABELS {path}: expected one index or colour for each of {count} classes, "
            f"got {keys.dtype} {keys.shape}"
        )
    limit = LARGEST_INDEX if keys.ndim == 1 else 255
    if keys.min() < 0 or keys.max() > limit or len(np.unique(keys, axis=0)) < count:
        raise PictureError(f"LABELS {path}: expected different indices from 0 to 65535, or colours")
    if keys.ndim == 2:
        return {
            "kind": "colour",
            "keys": tuple(map(tuple, keys.tolist())),
            "indices": None,
            "colours": keys.astype(np.uint8),
            "void": None,
            "mode": "RGB",
        }
    indices = tuple(keys.tolist())
    return {
        "kind": "probabilities",
        "keys": indices,
        "indices": indices,
        "colours": distinct_colours(indices),
        "void": _free_index(indices, 255),
        "mode": "L" if max(indices) <= 255 else "I;16",
    }


def _tally(codes: npt.NDArray[np.int32]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The different codes and the number of each.

    Labels are runs of one colour: sorting the runs is far faster than sorting the pixels.
    """
    flat = codes.ravel()
    if not flat.size:
        return flat, flat
    starts = np.flatnonzero(np.r_[True, flat[1:] != flat[:-1]])
    lengths = np.diff(np.r_[starts, flat.size])
    found, runs = np.unique(flat[starts], return_inverse=True)
    return found, np.bincount(runs, weights=lengths).astype(np.int64)


def _free_index(taken: Collection[int], highest: int) -> int:
    """The highest index up to `highest` that is no class; if all are, that of 16 bits."""
    known = set(taken)
    return next((index for index in range(highest, -1, -1) if index not in known), LARGEST_INDEX)


def _named_colours(
    colours: npt.NDArray[np.uint8], classes: list[int], palette: Palette | None
) -> npt.NDArray[np.uint8]:
    """The colours of class indices, those of `palette` where it has them."""
    if palette is None:
        return colours
    known = {index: colour for colour, index in palette.indices.items()}
    own = zip(classes, colours.tolist(), strict=True)
    return np.array([known.get(index, colour) for index, colour in own], np.uint8).reshape(-1, 3)


def _blocks(values: npt.NDArray[Any]) -> Iterator[slice]:
    """Slices of the first axis that hold a bounded number of pixels."""
    step = max(1, _BLOCK // max(values[:1].size, 1))
    for start in range(0, values.shape[0], step):
        yield slice(start, start + step)


def _too_many_colours(path: Path, found: int, num_classes: int) -> PictureError:
    return PictureError(
        f"LABELS {path}: expected at most {num_classes} colours for the {num_classes} classes "
        f"given, got {found} (labels saved as JPEG or resized with smoothing have more)"
    )
