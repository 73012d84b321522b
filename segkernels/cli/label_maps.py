"""Reads label maps, and writes refined ones in the same format.

Labels are palette pictures (PASCAL VOC), colour pictures (annotations painted by hand), greyscale
pictures of indices, and numpy arrays of labels or of a network's probabilities. All become a
`LabelMap`, which records the format.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from segkernels.cli.files import (
    ARRAY_SUFFIXES,
    PictureError,
    open_picture,
    read_array,
    save_picture,
)

Colour = tuple[int, int, int]
Positions = npt.NDArray[np.int32]

# Lossless formats that a label map can be written in.
LABEL_OUTPUTS = (".png", ".tif", ".tiff")

_LOSSY_FORMATS = frozenset({"JPEG", "MPO", "JPEG2000"})
_LARGEST_INDEX = 65535  # of a 16-bit picture
# A map with more values is a photograph or a lossy copy, unless num_classes is given.
_MOST_VALUES = 256
# A map with more values whose rarer half covers few pixels (_RARE_SHARE) was resampled.
_MANY_VALUES = 40
_RARE_SHARE = 0.01
_BLACK = (0, 0, 0)
_PASCAL_VOC_START = (0, 0, 0, 128, 0, 0, 0, 128, 0)
_PROBABILITY_SLACK = 1e-3


@dataclass(frozen=True)
class Meaning:
    """How the user wants label maps to be read.

    Attributes:
        unknown: the values of unlabelled pixels: indices, colours (a CSS name or ``#rrggbb``), or
            "none". "auto" is, if the map uses it: black in a colour picture; index 255, or else
            black, in a palette picture, except in PASCAL VOC's palette, where black is a class; 255
            (65535 in 16 bits) in a greyscale picture; 255 and -1 in an array. Pixels less than half
            opaque are always unknown.
        num_classes: the number of classes. Default: the classes that the map uses.
        alone: whether this is the only map. Then "auto" reads a map of two values as a mask, in
            which both are classes. Among many maps such a map may lack the other classes, so there
            it is an error.
    """

    unknown: tuple[str, ...] = ("auto",)
    num_classes: int | None = None
    alone: bool = True


@dataclass(frozen=True)
class LabelMap:
    """A label map, and the format to write a refined one in.

    Attributes:
        path: the file.
        kind: how the file represents classes.
        positions: (H, W), the position of each pixel's class in `keys`; -1 if it is unknown.
        keys: the value of each class in the file: an index, or a colour if `kind` is "colour".
        colours: (len(keys), 3) uint8, colours to draw the classes with.
        num_classes: the number of classes for the CRF; at least len(keys).
        unknown: a description of the values that were read as unknown.
        probs: (C, H, W) float32 if `kind` is "probabilities".
        mode: Pillow's mode of the picture, or of one that can hold the array's indices.
        palette: of a palette picture.
        save_options: for Pillow.
    """

    path: Path
    kind: Literal["palette", "colour", "index", "probabilities"]
    positions: Positions
    keys: tuple[int, ...] | tuple[Colour, ...]
    colours: npt.NDArray[np.uint8]
    num_classes: int
    unknown: str
    probs: npt.NDArray[np.float32] | None = None
    mode: str = "L"
    palette: tuple[int, ...] = ()
    save_options: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        height, width = self.positions.shape
        return width, height


def read_labels(path: Path, meaning: Meaning | None = None) -> LabelMap:
    """Read a label map.

    Args:
        path: a palette picture (classes are its indices), a colour picture (its colours), a
            greyscale or 1-bit picture (its values), or ``.npy`` / ``.npz`` with integer labels
            (H, W) or probabilities (C, H, W).
        meaning: which pixels are unknown, and the number of classes.

    Raises:
        PictureError: the file cannot be read, or is not a label map as described.
    """
    meaning = meaning or Meaning()
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _from_array(path, read_array(path, "LABELS"), meaning)
    picture = open_picture(path, "LABELS")
    if picture.format in _LOSSY_FORMATS and meaning.num_classes is None:
        raise PictureError(
            f"LABELS {path}: {picture.format} is lossy and invents colours along every edge; save "
            "the labels as PNG (or pass --num-classes if the colours are still exact)"
        )
    if picture.mode == "P":
        return _from_palette(path, picture, meaning)
    if picture.mode in ("1", "L", "LA") or picture.mode.startswith("I"):
        return _from_grey(path, picture, meaning)
    if picture.mode in ("RGB", "RGBA", "PA"):
        return _from_colours(path, picture, meaning)
    raise PictureError(
        f"LABELS {path}: expected a palette, colour, greyscale or 1-bit picture, "
        f"got Pillow's mode {picture.mode}"
    )


def write_labels(path: Path, positions: npt.NDArray[Any], like: LabelMap) -> None:
    """Write `positions` (H, W), indices into ``like.keys``, in the format of `like`."""
    dtype = {"1": np.bool_, "I": np.uint16}.get(like.mode[0], np.uint8)
    keys = np.array(like.keys)
    picture = Image.fromarray(keys.astype(dtype)[positions])
    if like.kind == "palette":
        missing = 3 * (int(keys.max()) + 1) - len(like.palette)
        picture.putpalette((*like.palette, *[0] * missing))
    elif like.mode in ("LA", "RGBA"):
        picture.putalpha(255)
    save_picture(path, picture, **like.save_options)


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


def _from_array(path: Path, values: npt.NDArray[Any], meaning: Meaning) -> LabelMap:
    if values.size and values.dtype.kind == "f" and values.ndim == 3:
        return _from_probabilities(path, values, meaning)
    if not (values.size and values.dtype.kind in "uib" and values.ndim == 2):
        raise PictureError(
            f"LABELS {path}: expected float probabilities (C, H, W) or integer labels (H, W), "
            f"got {values.dtype} {values.shape}"
        )
    indices = _Indices(path, values.astype(np.uint8) if values.dtype == np.bool_ else values)
    keys, unknown = indices.classes(meaning, lambda used: {255, -1}, indices.named)
    return indices.label_map(keys, unknown, mode="L" if max(keys) <= 255 else "I;16")


def _from_probabilities(path: Path, values: npt.NDArray[Any], meaning: Meaning) -> LabelMap:
    count = values.shape[0]
    if meaning.unknown != ("auto",):
        raise PictureError(
            f"LABELS {path}: --unknown cannot name pixels in an array of probabilities; an unknown "
            "pixel has equal ones"
        )
    if meaning.num_classes not in (None, count):
        raise PictureError(
            f"LABELS {path}: expected probabilities of {meaning.num_classes} classes (C, H, W), "
            f"got shape {values.shape}"
        )
    if count > _LARGEST_INDEX + 1:
        raise PictureError(f"LABELS {path}: expected at most 65536 classes, got {count}")
    probs = np.ascontiguousarray(values, np.float32)
    least, most = float(probs.min()), float(probs.max())
    if not np.isfinite([least, most]).all():
        raise PictureError(f"LABELS {path}: expected finite probabilities, got NaN or infinity")
    if least < 0 or most > 1 + _PROBABILITY_SLACK:
        raise PictureError(
            f"LABELS {path}: expected probabilities between 0 and 1, got values from {least:.6g} "
            f"to {most:.6g} (logits need a softmax first)"
        )
    return LabelMap(
        path=path,
        kind="probabilities",
        positions=probs.argmax(axis=0).astype(np.int32),
        keys=tuple(range(count)),
        colours=distinct_colours(range(count)),
        num_classes=count,
        unknown="none (probabilities)",
        probs=np.minimum(probs, 1),
        mode="L" if count <= 256 else "I;16",
    )


def _from_grey(path: Path, picture: Image.Image, meaning: Meaning) -> LabelMap:
    values = np.array(picture)
    opaque = None
    if picture.mode == "LA":
        values, opaque = values[..., 0], values[..., 1] >= 128
    indices = _Indices(path, values.astype(np.uint8) if picture.mode == "1" else values, opaque)
    if meaning.num_classes is None:
        _refuse_noise(path, indices.counts, "values")
    highest = 65535 if picture.mode.startswith("I") else 255
    keys, unknown = indices.classes(meaning, lambda used: {highest}, indices.named)
    return indices.label_map(keys, unknown, mode=picture.mode)


def _from_palette(path: Path, picture: Image.Image, meaning: Meaning) -> LabelMap:
    palette = tuple(picture.getpalette("RGB") or ())
    indices = _Indices(path, np.array(picture))
    shown = {index: _palette_colour(palette, index) for index in indices.used}

    def automatic(used: Collection[int]) -> set[int]:
        if 255 in used:
            return {255}
        if palette[: len(_PASCAL_VOC_START)] == _PASCAL_VOC_START:
            return set()
        return {index for index in used if shown[index] == _BLACK}

    def named(word: str) -> set[int]:
        if _is_integer(word):
            return {int(word)}
        colour = _colour(word)
        return {index for index in indices.used if shown[index] == colour}

    def show(index: Any) -> str:
        return f"index {index} ({_name(_palette_colour(palette, index))})"

    keys, unknown = indices.classes(meaning, automatic, named, show)
    colours = np.array([_palette_colour(palette, key) for key in keys], np.uint8)
    # A transparent index is an ordinary class, and stays transparent.
    options = {key: value for key, value in picture.info.items() if key == "transparency"}
    return indices.label_map(
        keys,
        unknown,
        kind="palette",
        mode="P",
        colours=colours,
        palette=palette,
        save_options=options,
    )


def _from_colours(path: Path, picture: Image.Image, meaning: Meaning) -> LabelMap:
    opaque = None
    if picture.mode != "RGB":
        opaque = np.array(picture.convert("RGBA").getchannel("A")) >= 128
    rgb = picture.convert("RGB")
    wide = np.asarray(rgb).astype(np.int32)
    codes = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    found, counts = _tally(path, rgb, codes, opaque, meaning)
    if meaning.num_classes is None:
        _refuse_noise(path, counts, "colours")
    elif len(found) > meaning.num_classes + _MOST_VALUES:
        # Checked before any work on single colours: a photograph has a million.
        raise _too_many_colours(path, len(found), meaning.num_classes)
    used = [(code >> 16, code >> 8 & 255, code & 255) for code in found.tolist()]

    def named(word: str) -> set[Colour]:
        if _is_integer(word):
            raise PictureError(
                f"LABELS {path}: --unknown takes a colour, such as black or #000000, for a colour "
                f"label map, got {word!r}"
            )
        return {_colour(word)}

    dropped, words = _split(path, used, meaning, lambda used: {_BLACK}, named)
    keys = tuple(colour for colour in used if colour not in dropped)
    if meaning.num_classes is not None and len(keys) > meaning.num_classes:
        raise _too_many_colours(path, len(keys), meaning.num_classes)
    # A table of all 2^24 colours: calloc does not touch the pages of absent ones.
    table = np.zeros(1 << 24, np.int16 if len(keys) < 32767 else np.int32)
    for position, (red, green, blue) in enumerate(keys):
        table[red << 16 | green << 8 | blue] = position + 1
    positions = table[codes].astype(np.int32) - 1
    _forget_transparent(path, positions, opaque)
    return LabelMap(
        path=path,
        kind="colour",
        positions=positions,
        keys=keys,
        colours=np.array(keys, np.uint8),
        num_classes=max(meaning.num_classes or 0, len(keys)),
        unknown=words,
        mode="RGB" if opaque is None else "RGBA",
    )


def _tally(
    path: Path,
    rgb: Image.Image,
    codes: npt.NDArray[np.int32],
    opaque: npt.NDArray[np.bool_] | None,
    meaning: Meaning,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The colours in the picture as ascending codes, and the number of pixels of each."""
    if opaque is not None:
        if not opaque.any():
            raise PictureError(
                f"LABELS {path}: expected labelled pixels, got transparent ones only"
            )
        return np.unique(codes[opaque], return_counts=True)
    # Pillow counts up to a limit in one pass. Sorting all codes precedes an error only.
    listed = rgb.getcolors((meaning.num_classes or 0) + _MOST_VALUES)
    if listed is None:
        return np.unique(codes, return_counts=True)
    rows = np.array([(*colour, count) for count, colour in listed])  # type: ignore[misc]
    found = rows[:, 0] << 16 | rows[:, 1] << 8 | rows[:, 2]
    order = np.argsort(found)
    return found[order], rows[order, 3]


def _name(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"index {value}"
    return "black" if value == _BLACK else "#{:02x}{:02x}{:02x}".format(*value)


class _Indices:
    """A map whose pixel values are class indices."""

    def __init__(
        self, path: Path, values: npt.NDArray[Any], opaque: npt.NDArray[np.bool_] | None = None
    ) -> None:
        self.path, self.opaque = path, opaque
        self.least, self.most = int(values.min()), int(values.max())
        if self.least < -_LARGEST_INDEX or self.most > _LARGEST_INDEX:
            raise PictureError(
                f"LABELS {path}: expected indices from 0 to {_LARGEST_INDEX}, "
                f"got values from {self.least} to {self.most}"
            )
        self.shifted = values.astype(np.int64) - self.least
        tally = np.bincount(self.shifted.ravel())
        places = np.flatnonzero(tally)
        self.counts = tally[places]
        self.used: list[int] = (places + self.least).tolist()

    def named(self, word: str) -> set[int]:
        if not _is_integer(word):
            raise PictureError(
                f"LABELS {self.path}: --unknown takes an index for labels without colours, "
                f"got {word!r}"
            )
        return {int(word)}

    def classes(
        self,
        meaning: Meaning,
        automatic: Callable[[Collection[int]], set[int]],
        named: Callable[[str], set[int]],
        show: Callable[[Any], str] = _name,
    ) -> tuple[tuple[int, ...], str]:
        """The indices that are classes, and a description of the unknown ones."""
        dropped, words = _split(self.path, self.used, meaning, automatic, named, show)
        keys = [index for index in self.used if index not in dropped]
        count = meaning.num_classes
        if count is None:
            if keys[0] < 0:
                raise PictureError(
                    f"LABELS {self.path}: expected indices from 0, got {keys[0]}; if it marks "
                    f"unknown pixels, pass --unknown {keys[0]}"
                )
            return tuple(keys), words
        wrong = [index for index in keys if not 0 <= index < count]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise PictureError(
                f"LABELS {self.path}: expected indices in [0, {count}) for the {count} classes "
                f"given, got {wrong[0]}{more} (unknown: {words})"
            )
        return tuple(index for index in range(count) if index not in dropped), words

    def label_map(self, keys: tuple[int, ...], unknown: str, **rest: Any) -> LabelMap:
        table = np.full(self.most - self.least + 1, -1, np.int32)
        for position, index in enumerate(keys):
            if self.least <= index <= self.most:
                table[index - self.least] = position
        positions = table[self.shifted]
        _forget_transparent(self.path, positions, self.opaque)
        defaults: dict[str, Any] = {"kind": "index", "colours": distinct_colours(keys)}
        return LabelMap(
            path=self.path,
            positions=positions,
            keys=keys,
            num_classes=len(keys),
            unknown=unknown,
            **{**defaults, **rest},
        )


# --- unknown values, and pictures that are not label maps


def _split(
    path: Path,
    used: list[Any],
    meaning: Meaning,
    automatic: Callable[[Collection[Any]], set[Any]],
    named: Callable[[str], set[Any]],
    show: Callable[[Any], str] = _name,
) -> tuple[set[Any], str]:
    """The values of unknown pixels, and a description of those that the map uses."""

    def words(values: Collection[Any]) -> str:
        shown = [show(value) for value in sorted(values)]
        return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")

    if meaning.unknown == ("auto",):
        dropped = automatic(used) & set(used)
        if dropped and len(used) == 2:
            if meaning.alone:
                return set(), f"none ({words(dropped)} is one of just two values, so a class)"
            raise PictureError(
                f"LABELS {path}: just one class beside {words(dropped)}, which marks unknown "
                "pixels; pass --unknown none if that is a class, or --unknown with its value"
            )
    elif meaning.unknown == ("none",):
        dropped = set()
    else:
        dropped = {value for word in meaning.unknown for value in named(word)}
    if dropped.issuperset(used):
        raise PictureError(
            f"LABELS {path}: expected labelled pixels, got unknown ones only ({words(used)})"
        )
    return dropped, words(dropped & set(used)) or "none"


def _refuse_noise(path: Path, counts: npt.NDArray[Any], what: str) -> None:
    """Raise for a photograph, and for a label map that was compressed or resized."""
    number = len(counts)
    rare = np.sort(counts)[: number // 2].sum()
    if number > _MOST_VALUES:
        found = f"{number} {what}"
    elif number > _MANY_VALUES and rare < _RARE_SHARE * counts.sum():
        found = f"{number} {what}, half of them on less than {_RARE_SHARE:.0%} of the pixels"
    else:
        return
    raise PictureError(
        f"LABELS {path}: expected a few {what}, one a class, got {found}: a photograph, or labels "
        "saved as JPEG or resized with smoothing? Pass --num-classes if these are classes"
    )


def _too_many_colours(path: Path, found: int, num_classes: int) -> PictureError:
    return PictureError(
        f"LABELS {path}: expected at most {num_classes} colours for the {num_classes} classes "
        f"given, got {found} (labels saved as JPEG or resized with smoothing have more)"
    )


def _forget_transparent(
    path: Path, positions: Positions, opaque: npt.NDArray[np.bool_] | None
) -> None:
    if opaque is None:
        return
    positions[~opaque] = -1
    if not (positions >= 0).any():
        raise PictureError(f"LABELS {path}: expected labelled pixels, got unknown ones only")


def _palette_colour(palette: tuple[int, ...], index: int) -> Colour:
    colour = palette[3 * index : 3 * index + 3]
    return (colour[0], colour[1], colour[2]) if len(colour) == 3 else _BLACK


def _is_integer(word: str) -> bool:
    return word.removeprefix("-").isdecimal()


def _colour(word: str) -> Colour:
    try:
        colour = ImageColor.getrgb(word)
    except ValueError:
        raise PictureError(
            f"--unknown: expected none, an index or a colour (black, #000000), got {word!r}"
        ) from None
    return colour[0], colour[1], colour[2]
