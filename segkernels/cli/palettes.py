"""The colours of classes: those of known data sets, and those that a file lists.

The known ones are in ``palettes/``, one file each, in the format that `read_palette` describes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageColor

from segkernels.cli.files import OptionError, reason

Colour = tuple[int, int, int]

_KNOWN = Path(__file__).resolve().parent / "palettes"
_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
_HEX_LIKE = re.compile(r"#[0-9a-fA-F]{3,8}\b")
_IGNORED = re.compile(r"\b(ignore|ignored)\b", re.IGNORECASE)
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Palette:
    """The colours of classes.

    Attributes:
        name: as the user gave it.
        indices: the class index of each colour. Of two classes with one colour it is the first.
        ignored: colours of unknown pixels.
        names: the name of each class index that has one.
    """

    name: str
    indices: dict[Colour, int]
    ignored: frozenset[Colour] = frozenset()
    names: dict[int, str] = field(default_factory=dict)


def known_palettes() -> list[str]:
    """The names of the known palettes."""
    return sorted(path.stem for path in _KNOWN.glob("*.txt"))


def read_palette(name: str) -> Palette:
    """The known palette called `name`, or the palette in the file `name`.

    A file is a picture with a palette, or text with one class on each line: its colour, as three
    numbers from 0 to 255 or as ``#rrggbb``, and its name, in any order. So are CVAT's
    ``labelmap.txt``, a CSV file of names and colours, and GIMP's ``.gpl``. The first line with a
    colour is class 0. The colour of a class named "ignore" marks unknown pixels. Lines before the
    first colour, empty lines, and comments, which begin with ``#`` and hold no colour, are skipped.

    Raises:
        OptionError: there is no such palette or file, or it is not as described.
    """
    known = _KNOWN / f"{name}.txt"
    if name in known_palettes():
        return _from_text(name, known.read_text(encoding="utf-8"))
    path = Path(name)
    try:
        if not path.is_file():
            raise OptionError(
                f"--palette: expected {', '.join(known_palettes())} or a file, got {name}"
            )
        with open(path, "rb") as file:
            start = file.read(_LARGEST_FILE + 1)
        if b"\0" not in start:
            if len(start) > _LARGEST_FILE:
                raise OptionError(f"--palette {name}: expected at most {_LARGEST_FILE} bytes")
            return _from_text(name, start.decode("utf-8-sig", "replace"))
        with Image.open(path, formats=("PNG", "GIF", "TIFF", "BMP")) as picture:
            values = picture.getpalette("RGB") or []
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"--palette {name}: cannot be read ({reason(error)})") from error
    channels = iter(values)
    return _numbered(name, list(zip(channels, channels, channels, strict=True)))


def _from_text(name: str, text: str) -> Palette:
    colours: list[Colour] = []
    ignored: set[Colour] = set()
    names: dict[int, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or (line.lstrip()[0] == "#" and not _HEX_LIKE.match(line.lstrip())):
            continue
        found, class_name = _parse(line)
        heading = not colours and "#" not in line and len(re.findall(r"\d+", line)) < 2
        if not found and heading:
            continue
        if len(found) != 1 or max(found[0]) > 255:
            raise OptionError(
                f"--palette {name}: line {number}: expected one colour, as 128 0 0 or #800000, "
                f"got {line.strip()[:60]!r}"
            )
        if class_name:
            names[len(colours)] = class_name
        colours += found
        if _IGNORED.search(line):
            ignored.update(found)
    return _numbered(name, colours, ignored, names)


def _parse(line: str) -> tuple[list[Colour], str]:
    """The colours in a line, and the name of its class, or "".

    Colours are #rrggbb, and runs of numbers, of which there should be three. Of cells with commas
    between, the name is the first that is no number; else it is all the words after such numbers.
    """
    found = [ImageColor.getrgb(match[0])[:3] for match in _HEX.finditer(line)]
    # Cells with commas between, or words.
    cells = re.split(r"[,;:]", line)
    separated = len(cells) > 1
    cells = cells if separated else re.sub(r"[\[\](){}\"']", " ", line).split()
    run: list[str] = []
    rest: list[str] = []
    for cell in [*cells, ""]:
        words = cell.strip("[](){}\"' \t").split()
        if words and all(word.isdecimal() for word in words):
            run += words
            continue
        if len(run) >= 3:
            red, green, blue = (int(word[:4]) for word in run[:3])
            found.append((red, green, blue if len(run) == 3 else 256))
        elif rest:
            rest += run
        run = []
        text = " ".join(_HEX.sub("", " ".join(words)).split())
        rest += [text] if text else []
    return found, " ".join(rest[:1] if separated else rest)


def _numbered(
    name: str,
    colours: list[Colour],
    ignored: set[Colour] | None = None,
    names: dict[int, str] | None = None,
) -> Palette:
    if not colours:
        raise OptionError(f"--palette {name}: expected the colours of classes, found none")
    indices: dict[Colour, int] = {}
    for index, colour in enumerate(colours):
        indices.setdefault(colour, index)
    return Palette(name, indices, frozenset(ignored or ()), names or {})
