"""Options that several subcommands have, and checks of what the user gave."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from segkernels import _native
from segkernels.cli.files import OptionError, PictureError
from segkernels.cli.inference import Sigma
from segkernels.cli.pairing import LAYOUTS, Layout, Source, is_pattern, suffix_pattern
from segkernels.cli.palettes import known_palettes, read_palette
from segkernels.cli.unknown import LARGEST_INDEX, Meaning

LABEL_PANEL = "What the labels mean"
SCORES_PANEL = "Class activation maps and other scores in .npz files"
FOLDER_PANEL = "Folders and data sets"
FILE_PANEL = "How files are read"
CRF_PANEL = "The CRF"


class Device(str, Enum):
    """Where the CRF runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Normalization(str, Enum):
    """How the pairwise kernels are normalised."""

    symmetric = "symmetric"
    before = "before"
    after = "after"
    none = "none"


class Method(str, Enum):
    """How the kernels are filtered."""

    lattice = "lattice"
    exact = "exact"


class LayoutName(str, Enum):
    """The data sets in `pairing.LAYOUTS`."""

    cityscapes = "cityscapes"
    camvid = "camvid"
    voc = "voc"
    labelme = "labelme"
    nnunet = "nnunet"


UnknownOption = Annotated[
    list[str] | None,
    typer.Option(
        "--unknown",
        "--ignore-index",
        metavar="INDEX|COLOUR|none",
        help="Value of unlabelled pixels; may be repeated. Default: black in colour labels, "
        "255 or black in palette labels (in PASCAL VOC's palette black is a class), 255 in "
        "greyscale ones; but of just two values both are classes.",
        rich_help_panel=LABEL_PANEL,
    ),
]
NumClassesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=LARGEST_INDEX + 1,
        help="Number of classes. Default: those that the labels use.",
        rich_help_panel=LABEL_PANEL,
    ),
]
PaletteOption = Annotated[
    str | None,
    typer.Option(
        metavar=f"{'|'.join(known_palettes())}|FILE",
        help="The colours of the classes, of which black may be one. A file has a line with a "
        "colour (128 0 0 or #800000) and a name for each class, or is a picture with a "
        "palette; the colour of a class named ignore is unknown.",
        rich_help_panel=LABEL_PANEL,
    ),
]
LayoutOption = Annotated[
    LayoutName | None,
    typer.Option(
        help="Names and folders of a data set: pass its folder, or those of one split. The suffix "
        "options replace what it says.",
        rich_help_panel=FOLDER_PANEL,
    ),
]
RecursiveOption = Annotated[
    bool,
    typer.Option(
        "--recursive", "-r", help="Also the folders in the folders.", rich_help_panel=FOLDER_PANEL
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=1024,
        help="Processes, with one thread each; 0: this process, with all threads. The results are "
        "the same. Default: one for each core where there are many pairs, on the CPU.",
        rich_help_panel=FOLDER_PANEL,
    ),
]
ResizeOption = Annotated[
    bool,
    typer.Option(
        "--resize",
        help="Resize labels (nearest) or probabilities (bilinear) to the size of their partner.",
        rich_help_panel=LABEL_PANEL,
    ),
]
AffineOption = Annotated[
    bool,
    typer.Option(
        "--ignore-affine",
        help="Accept volumes whose affines differ.",
        rich_help_panel=FILE_PANEL,
    ),
]
ExifOption = Annotated[
    bool,
    typer.Option(
        "--ignore-exif",
        help="Take pictures as they are stored, not turned by their EXIF orientation.",
        rich_help_panel=FILE_PANEL,
    ),
]


def sigma(text: str, option: str, most: int | None = None) -> Sigma:
    """The number, or up to `most` numbers, that an option gives."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    known = all(math.isfinite(v) and v > 0 for v in values)
    if not values or not known or len(values) > (most or len(values)):
        several = "several" if most is None else f"{most}"
        raise typer.BadParameter(
            f"expected a number above 0, or {several} with commas between, got {text[:60]!r}",
            param_hint=option,
        )
    return values[0] if len(values) == 1 else values


def weight(value: float, option: str) -> float:
    """A finite number."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}", param_hint=option)
    return value


def probability(value: float, option: str) -> float:
    """A number strictly between 0 and 1."""
    if not 0 < value < 1:
        raise typer.BadParameter(
            f"expected a number strictly between 0 and 1, got {value}", param_hint=option
        )
    return value


def meaning(
    unknown: list[str] | None, num_classes: int | None, palette: str | None, shared: bool
) -> Meaning:
    """What the labels mean, also those of a truth if it is `shared`."""
    return Meaning(
        unknown=tuple(unknown or ("auto",)),
        num_classes=num_classes,
        palette=None if palette is None else read_palette(palette),
        shared=shared,
    )


def refuse(given: Mapping[str, object], wanted: str) -> None:
    """Raise `BadParameter` for the first option that the user has given."""
    for option, value in given.items():
        if value:
            raise typer.BadParameter(f"expected {wanted} with it", param_hint=option)


def shard(text: str) -> tuple[int, int]:
    """The part, from 0, and the number of parts."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    part, parts = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise typer.BadParameter(
            f"expected i/n with i from 1 to n, such as 1/4, got {text[:60]!r}",
            param_hint="--shard",
        )
    return part - 1, parts


def is_many(path: Path, name: str) -> bool:
    """Whether an argument is a folder or a pattern; if it is neither, it must be a file."""
    if is_pattern(path):
        return True
    if not os.path.exists(path):
        raise typer.BadParameter(f"Path '{path}' does not exist.", param_hint=f"'{name}'")
    return path.is_dir()


def source(
    role: str,
    path: Path,
    layout: LayoutName | None,
    suffixes: list[str] | None,
    recursive: bool,
    option: str,
) -> Source:
    """The files of one kind, as the user described them."""
    known = Layout() if layout is None else LAYOUTS[layout.value]
    folders, ends = known.labels, known.label_suffixes
    if role == "IMAGE":
        folders, ends = known.images, known.image_suffixes
    elif role == "TRUTH":  # its names are never those of the photographs
        ends = tuple(end for end in ends if not end or end not in known.image_suffixes)
    if suffixes:
        try:
            ends = tuple(suffix_pattern(text) for text in suffixes)
        except OptionError as error:
            raise typer.BadParameter(str(error), param_hint=option) from error
    return Source(role, path, ends, recursive or known.recursive).inside(folders)


@contextmanager
def pillow_limit(max_pixels: int) -> Iterator[None]:
    """Let Pillow open what `Reading.check_pixels` allows."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(max_pixels, before or 0)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def find_device(wanted: str) -> str:
    """The device to run on: `wanted`, or for "auto" CUDA where it can be used, else the CPU.

    Raises:
        PictureError: `wanted` is "cuda", which torch or segkernels cannot use.
    """
    if wanted == "cpu":
        return "cpu"
    reason = "torch sees no CUDA device here; `segkernels info` says more"
    if torch.cuda.is_available():
        try:
            _native.where(torch.empty(0, device="cuda"))
            return "cuda"
        except RuntimeError as error:
            reason = str(error)
    if wanted == "cuda":
        raise PictureError(f"--device cuda: {reason}")
    return "cpu"
