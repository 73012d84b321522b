"""Draws label maps side by side: before and after, and their differences from the truth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from segkernels.cli.images import Photograph
from segkernels.cli.label_maps import LabelMap, distinct_colours
from segkernels.cli.metrics import check_shapes, shared_classes

# Limits of a panel's longer side in pixels: edges must be visible, any viewer must open it.
_SMALLEST, _LARGEST = 460, 1600
_MARGIN, _GAP, _HEAD = 24, 14, 34
_PAGE, _INK, _FAINT = (250, 250, 248), (34, 36, 40), (122, 126, 132)
_TINT = 0.55  # opacity of the class colours
_STRONG = 0.85  # opacity of the errors, which are small
_DIM = 0.38  # brightness of the photograph where labels are unknown
_HATCH = 10  # period of the stripes there, in panel pixels
_ALIKE = 110  # colours at a smaller distance look the same once blended
_NARROWEST = 120  # of the panels with a truth: room for a title
_RIGHT, _WRONG, _NO_CLASS = (96, 96, 96), (225, 40, 40), (245, 175, 25)
_CORRECTED, _NEWLY_WRONG = (40, 180, 70), (220, 40, 220)


def side_by_side(
    photograph: Photograph,
    before: LabelMap,
    after: npt.NDArray[Any],
    *,
    names: Sequence[str] = (),
    notes: tuple[str, str, str] = ("", "", ""),
) -> Image.Image:
    """Draw image, labels before and labels after in a row, with titles.

    Args:
        photograph: as `images.read_image` returns it.
        before: the labels before. Unknown pixels are dimmed and striped.
        after: (H, W) positions in ``before.keys``; -1, without data, is striped too.
        names: class names for a legend. Default: no legend.
        notes: a note beside each title.
    """
    size = _panel_size(after.shape)
    shown = Image.fromarray(_displayed(photograph)).resize(size, Image.Resampling.LANCZOS)
    colours = _told_apart(before.colours)
    panels = {
        "Image": shown,
        "Before": _blend(shown, before.positions, colours),
        "After": _blend(shown, after, colours),
    }
    page = _page(panels, notes, foot=44 if names else 0)
    if names:
        _legend(page, names, colours, _MARGIN)
    return page


def differences(
    positions: npt.NDArray[Any],
    labels: LabelMap,
    truth: LabelMap,
    photograph: Photograph | None = None,
    after: npt.NDArray[Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Image.Image:
    """Draw where labels differ from the truth: panels in a row, with titles and a legend.

    The panels are "Truth", "Prediction" and "Errors"; with `after` "Image" (if there is one),
    "Truth", "Before", "After" and "Errors". A class has one colour in all of them. Pixels without a
    class are dimmed and striped; among the errors these are the ones that the truth ignores.

    Args:
        positions: (H, W) positions in ``labels.keys``; -1: no class.
        labels: the map that `positions` and `after` belong to.
        truth: (H, W), the right classes.
        photograph: drawn below the classes. Default: plain grey.
        after: (H, W), the refined positions.
        notes: a note beside the title of each panel, by the title.

    Raises:
        PictureError: the sizes differ, or the maps have no common classes.
    """
    for given in (positions,) if after is None else (positions, after):
        check_shapes(given, labels, truth)
    size = _panel_size(positions.shape)
    if photograph is None:
        shown = Image.new("RGB", size, (128, 128, 128))
    else:
        shown = Image.fromarray(_displayed(photograph)).resize(size, Image.Resampling.LANCZOS)
    ours, theirs = shared_classes(labels, truth)
    colour_of = dict(zip(theirs, truth.colours, strict=True))
    for key, colour in zip(ours, labels.colours, strict=True):
        colour_of.setdefault(key, colour)
    number = {key: i for i, key in enumerate(colour_of)}
    # The last one is position -1.
    table = np.array([*(number[key] for key in ours), -1])
    colours = _told_apart(np.array(list(colour_of.values()) or [(0, 0, 0)], np.uint8))
    exact = _nearest(truth.positions, size)  # a class of the truth has its position as number
    found = [table[_nearest(given, size)] for given in (positions, after) if given is not None]

    panels = {"Truth": _blend(shown, exact, colours)}
    if after is not None and photograph is not None:
        panels = {"Image": shown, **panels}
    titles = ("Prediction",) if after is None else ("Before", "After")
    for title, numbers in zip(titles, found, strict=True):
        panels[title] = _blend(shown, numbers, colours)
    legend = {"right": _RIGHT, "wrong": _WRONG, "no class": _NO_CLASS}
    errors = np.where(found[0] == exact, 0, np.where(found[0] < 0, 2, 1))
    if after is not None:
        legend = {"right": _RIGHT, "corrected": _CORRECTED, "still wrong": _WRONG}
        legend["newly wrong"] = _NEWLY_WRONG
        errors = np.where(found[1] == exact, errors > 0, np.where(errors > 0, 2, 3))
    errors[exact < 0] = -1
    swatches = np.array(list(legend.values()), np.uint8)
    grey = shown.convert("L").convert("RGB")
    panels["Errors"] = Image.fromarray(_tinted(grey, errors, swatches, _STRONG))

    shown_notes = [(notes or {}).get(title, "") for title in panels]
    page = _page(panels, shown_notes, foot=44, narrowest=_NARROWEST)
    # Below the errors, or as far to the right as it fits.
    left = page.width - _MARGIN - max(_legend_width(legend), size[0], _NARROWEST)
    _legend(page, list(legend), swatches, left)
    return page


def _panel_size(shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = shape
    scale = 1.0
    if max(height, width) < _SMALLEST:
        scale = float(-(-_SMALLEST // max(height, width)))
    elif max(height, width) > _LARGEST:
        scale = _LARGEST / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _page(
    panels: Mapping[str, Image.Image],
    notes: Sequence[str],
    *,
    foot: int,
    narrowest: int = 0,
) -> Image.Image:
    """The panels in a row, below their titles and notes.

    Args:
        panels: of one size, by title.
        notes: one for each panel.
        foot: the height of the room for a legend.
        narrowest: the least width of a column.
    """
    title, small = ImageFont.load_default(20), ImageFont.load_default(15)
    width, height = next(iter(panels.values())).size
    width = max(width, narrowest)
    across = len(panels) * (width + _GAP) - _GAP
    page = Image.new(
        "RGB", (across + 2 * _MARGIN, _MARGIN + _HEAD + height + foot + _MARGIN), _PAGE
    )
    draw = ImageDraw.Draw(page)
    for column, ((name, panel), note) in enumerate(zip(panels.items(), notes, strict=True)):
        left = _MARGIN + column * (width + _GAP)
        base = _MARGIN + 20
        draw.text((left, base), name, _INK, title, anchor="ls")
        # Names of files may not be text, or have several lines.
        note = " ".join(os.fsencode(note).decode("utf-8", "replace").split())
        room = width - draw.textlength(name, title) - 12
        if note and draw.textlength(note, small) <= room:
            draw.text((left + width, base), note, _FAINT, small, anchor="rs")
        page.paste(panel, (left, _MARGIN + _HEAD))
    return page


def _displayed(photograph: Photograph) -> npt.NDArray[np.uint8]:
    """The photograph as (H, W, 3) uint8; other dtypes are stretched from minimum to maximum."""
    # Of a large scene some rows and columns are enough.
    step = max(1, max(photograph.values.shape[:2]) // (4 * _LARGEST))
    channels: npt.NDArray[Any] = photograph.values[::step, ::step]
    channels = channels if channels.shape[2] in (1, 3) else channels[..., :3]
    if channels.shape[2] != 3:
        channels = np.repeat(channels[..., :1], 3, axis=2)
    if channels.dtype == np.uint8:
        return np.ascontiguousarray(channels)
    present = channels
    if photograph.missing is not None and not photograph.missing[::step, ::step].all():
        present = channels[~photograph.missing[::step, ::step]]
    least, most = float(present.min()), float(present.max())
    stretched = (channels - least) * (255 / max(most - least, 1e-30))
    return np.asarray(stretched.clip(0, 255).round(), np.uint8)


def _told_apart(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The labels' own colours, or distinct ones where two of them look the same."""
    others = distinct_colours(range(len(colours)))
    if _closest(colours) < _ALIKE and _closest(others) > _closest(colours):
        return others
    return colours


def _closest(colours: npt.NDArray[np.uint8]) -> float:
    """The smallest distance between two colours."""
    if len(colours) < 2:
        return float("inf")
    wide = colours.astype(np.float32)
    distances = np.linalg.norm(wide[:, None] - wide, axis=2)
    return float(distances[np.triu_indices(len(colours), 1)].min())


def _blend(
    shown: Image.Image, positions: npt.NDArray[Any], colours: npt.NDArray[np.uint8]
) -> Image.Image:
    """The photograph tinted with the class colours, with white lines between classes."""
    blended = _tinted(shown, positions, colours, _TINT)
    blended[_edges(_nearest(positions, shown.size))] = 255
    return Image.fromarray(blended)


def _tinted(
    shown: Image.Image,
    positions: npt.NDArray[Any],
    colours: npt.NDArray[np.uint8],
    opacity: float,
) -> npt.NDArray[np.uint8]:
    """The photograph tinted with the class colours; dimmed and striped where the position is -1."""
    labels = _nearest(positions, shown.size)
    photo = np.asarray(shown, np.float32)
    grey = photo.mean(axis=2, keepdims=True)
    known = (labels >= 0)[..., None]
    # Tinting a half grey photograph keeps both colour and texture visible.
    tinted = (1 - opacity) * (0.5 * photo + 0.5 * grey) + opacity * colours[np.maximum(labels, 0)]
    rows, columns = np.indices(labels.shape)
    stripe = ((rows + columns) % _HATCH < 2)[..., None]
    hidden = np.where(stripe, 0.75 * 90 + 0.25 * grey, _DIM * grey)
    return np.where(known, tinted, hidden).round().astype(np.uint8)


def _nearest(positions: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    height, width = positions.shape
    rows = (np.arange(size[1]) * height) // size[1]
    columns = (np.arange(size[0]) * width) // size[0]
    resized: npt.NDArray[Any] = positions[rows[:, None], columns]
    return resized


def _edges(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Mask of pixels whose right or lower neighbour has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1] |= labels[:-1] != labels[1:]
    return edge


def _legend(
    page: Image.Image, names: Sequence[str], colours: npt.NDArray[np.uint8], left: float
) -> None:
    """Draw a legend at the foot of a page."""
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    top = page.height - _MARGIN - 24
    for name, colour in zip(names, colours.tolist(), strict=True):
        draw.rounded_rectangle((left, top, left + 16, top + 16), 4, tuple(colour))
        draw.text((left + 23, top + 14), name, _INK, font, anchor="ls")
        left += 23 + draw.textlength(name, font) + 22


def _legend_width(names: Iterable[str]) -> float:
    font = ImageFont.load_default(15)
    return sum(45 + font.getlength(name) for name in names) - 22
