"""Decides which values of label maps mark unknown pixels.

Values are class indices, or colours as 0xrrggbb.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from PIL import ImageColor

from segkernels.cli.files import OptionError
from segkernels.cli.palettes import Colour, Palette, known_palettes, read_palette

Kind = Literal["palette", "colour", "index", "array", "probabilities"]

LARGEST_INDEX = 65535  # of a 16-bit picture
BLACK = 0

# Beside the value 255, higher ones than ADE20K's 150 classes are the grey levels of a mask.
_MOST_CLASSES = 150
_STRAY_SHARE = 0.001
_PASCAL_VOC_START = (0, 0, 0, 128, 0, 0, 0, 128, 0)
_PASCAL_VOC_VOID = 0xE0E0C0


@dataclass(frozen=True)
class Meaning:
    """How the user wants label maps to be read.

    Attributes:
        unknown: the values of unlabelled pixels: indices, colours (a CSS name or ``#rrggbb``), or
            "none". "auto" is as `judge` decides. Pixels less than half opaque are always unknown.
        num_classes: the number of classes. Default: the classes that the map uses.
        palette: the colours of the classes. Then black is one of them, if it is in the palette.
        shared: it is also the meaning of a truth, so `unknown` may be for that alone.
    """

    unknown: tuple[str, ...] = ("auto",)
    num_classes: int | None = None
    palette: Palette | None = None
    shared: bool = False


@dataclass(frozen=True)
class Format:
    """What `judge` must know of a map besides its values; equal for maps that are judged together.

    Attributes:
        kind: how the file represents classes.
        highest: the highest value, 255 or 65535, which may mark unknown pixels; 1 in pictures of
            one bit, where it does not.
        palette: of a palette picture.
    """

    kind: Kind
    highest: int = 255
    palette: tuple[int, ...] = ()

    def show(self, value: int) -> str:
        """A value in words. Colours are 0xrrggbb."""
        if self.kind == "colour":
            return colour_name(value)
        if self.kind == "palette":
            colour = self.colour(value)
            return f"index {value} ({'no colour' if colour is None else colour_name(colour)})"
        return f"index {value}"

    def colour(self, index: int) -> int | None:
        """The colour of an index in the palette, 0xrrggbb; None if it has none."""
        channels = self.palette[3 * index : 3 * index + 3] if index >= 0 else ()
        return code(*channels) if len(channels) == 3 else None


@dataclass(frozen=True)
class Unknown:
    """Which values mark unknown pixels.

    Attributes:
        values: these values, used or not.
        note: why a value that often does is a class here, or "".
        doubt: a warning, or "".
        error: why these maps cannot be read, or "".
    """

    values: frozenset[int]
    note: str = ""
    doubt: str = ""
    error: str = ""


def judge(
    where: str, format: Format, counts: dict[int, int], meaning: Meaning, alone: bool = True
) -> Unknown:
    """Decide which values mark unknown pixels.

    If the user does not say it, they are:

    - in a colour picture black, unless there is a palette: then the palette's ignored colours;
    - in a palette picture index 255, or else black, except in PASCAL VOC's palette, where black is
      a class, and in a palette of grey levels;
    - 255 (65535 in 16 bits) in a greyscale picture; 255 and -1 in an array.

    But if there are just two values, and no maps of another format, both are classes. If 255 may be
    the object of a mask with grey levels or of a trimap, or if black covers more than half of the
    pixels, as background does, the user must say it.

    Args:
        where: the start of error messages: the file or the folder.
        format: of the maps.
        counts: the number of pixels of each value, in one map or in a folder of maps.
        meaning: as the user gave it.
        alone: whether there are no maps of other formats, which may have other classes.

    Raises:
        OptionError: the user must say what is unknown, or said what this kind of map cannot have.
    """
    counts = {value: number for value, number in counts.items() if number}
    used = set(counts)
    if meaning.unknown == ("none",):
        return Unknown(frozenset())
    ignored: frozenset[int] = frozenset()
    if meaning.palette is not None:
        ignored = frozenset(code(*colour) for colour in meaning.palette.ignored)
        if format.kind != "colour":
            ignored = frozenset(index for index in used if format.colour(index) in ignored)
    if meaning.unknown != ("auto",):
        values = [_values_of(where, word, format, used) for word in meaning.unknown]
        return Unknown(ignored.union(*values))
    if format.kind == "colour":
        if meaning.palette is not None:
            return Unknown(ignored)
        return _judge_black(where, format, counts, {BLACK} & used, alone)
    always = set(ignored)
    if format.kind == "array":
        always |= {-1} & used
    if format.highest in used and format.highest > 1:
        return _judge_highest(where, format, counts, always, meaning, alone)
    voc = format.palette[: len(_PASCAL_VOC_START)] == _PASCAL_VOC_START
    # A palette of all grey levels in order is no palette: the picture was greyscale.
    grey = format.palette[:30] == tuple(i // 3 for i in range(30))
    if format.kind != "palette" or voc or grey or meaning.palette is not None:
        return Unknown(frozenset(always))
    black = {index for index in used if format.colour(index) == BLACK}
    return _judge_black(where, format, counts, black, alone)


def _judge_black(
    where: str, format: Format, counts: dict[int, int], black: set[int], alone: bool
) -> Unknown:
    if not black or len(black) == len(counts):
        return Unknown(frozenset(black))
    if len(counts) == 2:
        return _two_values(format, black, frozenset(), alone)
    codes = [value if format.kind == "colour" else format.colour(value) for value in counts]
    colours = {rgb(code) for code in codes if code is not None}
    if all(red == green == blue for red, green, blue in colours):
        raise OptionError(
            f"{where}: all colours are grey, so black may be a class, as in a mask or in indices "
            "saved as colours, or mark unknown pixels: pass --unknown none|black|white; none if "
            "all are classes"
        )
    share = sum(counts[value] for value in black) / sum(counts.values())
    options = (
        f"pass --palette {'|'.join(known_palettes())}|FILE for labels in these colours, --unknown "
        "none if black is a class, or --unknown black if it marks unknown pixels"
    )
    if share > 0.5:
        raise OptionError(
            f"{where}: black is on {share:.0%} of the pixels, as the background of VOC, CVAT and "
            f"labelme masks is, and may be a class: {options}"
        )
    doubt = ""
    if colours <= set(read_palette("voc").indices):
        doubt = f"{where}: these are PASCAL VOC's colours, and black is read as unknown; {options}"
    return Unknown(frozenset(black), doubt=doubt)


def _judge_highest(
    where: str,
    format: Format,
    counts: dict[int, int],
    always: set[int],
    meaning: Meaning,
    alone: bool,
) -> Unknown:
    highest = format.highest
    others = set(counts) - {highest} - always
    if not others:
        return Unknown(frozenset({highest, *always}))
    if len(others) == 1:
        return _two_values(format, {highest}, frozenset(always), alone)
    unit = (highest + 1) // 256
    middles = {highest // 2, highest // 2 + 1, 127 * (highest // 255), 128 * (highest // 255)}
    trimap = 0 in others and others - {0} <= middles
    levels = sorted(value for value in others if value > _MOST_CLASSES * unit)
    sure = meaning.num_classes is not None and meaning.num_classes <= highest
    # 16-bit indices may be large: there levels are just a doubt.
    if (trimap or (levels and highest == 255)) and not sure:
        middle = min(others & middles, default=128 * unit)
        seen = ", ".join(map(str, levels[:4])) + (", ..." if len(levels) > 4 else "")
        looks = "the values of a trimap" if trimap else f"{seen} beside it, as a smoothed mask has"
        raise OptionError(
            f"{where}: {highest} may be a class or mark unknown pixels ({looks}): pass --unknown "
            f"none|{highest}|{middle}; none if it is a class, else the value that marks unknown "
            "pixels"
        )
    total = sum(counts.values())
    share = counts[highest] / total
    few = sum(sorted(counts[value] for value in others)[:-1]) < _STRAY_SHARE * total
    doubt = ""
    void = format.palette and format.colour(highest) == _PASCAL_VOC_VOID
    if (share > 0.5 or few or levels) and not (sure or void):
        doubt = (
            f"{where}: {format.show(highest)} is on {share:.0%} of the pixels and read as unknown; "
            "pass --unknown none if it is a class"
        )
    return Unknown(frozenset({highest, *always}), doubt=doubt)


def _two_values(format: Format, marks: set[int], always: frozenset[int], alone: bool) -> Unknown:
    """Two values, of which `marks` often mark unknown pixels: both are classes."""
    shown = ", ".join(format.show(value) for value in sorted(marks))
    if alone:
        return Unknown(always, f"none ({shown} is one of just two values, so a class)")
    return Unknown(
        always | marks,
        error=f"just one class beside {shown}, which marks unknown pixels; pass --unknown none if "
        "that is a class, or --unknown with its value",
    )


def _values_of(where: str, word: str, format: Format, used: set[int]) -> set[int]:
    """The values that a word of --unknown means in a map with the values `used`."""
    if word.removeprefix("-").isdecimal():
        if format.kind == "colour":
            raise OptionError(
                f"{where}: --unknown takes a colour, such as black or #000000, for a colour label "
                f"map, got {word!r}"
            )
        return {int(word)}
    if format.kind not in ("colour", "palette"):
        raise OptionError(
            f"{where}: --unknown takes an index for labels without colours, got {word!r}"
        )
    colour = code(*_named_colour(word))
    if format.kind == "colour":
        return {colour}
    return {index for index in used if format.colour(index) == colour}


def check_unknown(words: Collection[str]) -> None:
    """Raise `OptionError` unless each word is "none", "auto", an index or a colour."""
    for word in words:
        if word.removeprefix("-").isdecimal():
            if len(word) > 6 or abs(int(word)) > LARGEST_INDEX:
                shown = word if len(word) <= 20 else f"a number of {len(word)} digits"
                raise OptionError(
                    f"--unknown: expected an index from -{LARGEST_INDEX} to {LARGEST_INDEX}, "
                    f"got {shown}"
                )
        elif word not in ("none", "auto"):
            _named_colour(word)
        elif len(words) > 1:
            raise OptionError(f"--unknown: {word} does not go with other values")


def _named_colour(word: str) -> Colour:
    """The colour of a CSS name or of ``#rrggbb``."""
    try:
        red, green, blue = ImageColor.getrgb(word)[:3]
    except ValueError:
        raise OptionError(
            f"--unknown: expected none, an index or a colour (black, #000000), got {word[:40]!r}"
        ) from None
    return red, green, blue


def code(red: int, green: int, blue: int) -> int:
    """The colour as 0xrrggbb."""
    return red << 16 | green << 8 | blue


def rgb(code: int) -> Colour:
    """The colour 0xrrggbb."""
    return code >> 16, code >> 8 & 255, code & 255


def colour_name(code: int) -> str:
    """A colour in words."""
    return "black" if code == BLACK else f"#{code:06x}"
