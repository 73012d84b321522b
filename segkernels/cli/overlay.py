"""Draws photograph, labels before and labels after, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from segkernels.cli.images import Photograph
from segkernels.cli.label_maps import LabelMap, distinct_colours

# Limits of a panel's longer side in pixels: edges must be visible, any viewer must open it.
_SMALLEST, _LARGEST = 460, 1600
_MARGIN, _GAP = 24, 14
_PAGE, _INK, _FAINT = (250, 250, 248), (34, 36, 40), (122, 126, 132)
_TINT = 0.55  # opacity of the class colours
_DIM = 0.38  # brightness of the photograph where labels are unknown
_HATCH = 10  # period of the stripes there, in panel pixels
_ALIKE = 110  # colours at a smaller distance look the same once blended


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
    height, width = after.shape
    scale = 1.0
    if max(height, width) < _SMALLEST:
        scale = float(-(-_SMALLEST // max(height, width)))
    elif max(height, width) > _LARGEST:
        scale = _LARGEST / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shown = Image.fromarray(_displayed(photograph)).resize(size, Image.Resampling.LANCZOS)
    colours = _told_apart(before.colours)
    panels = (
        ("Image", shown),
        ("Before", _blend(shown, before.positions, colours)),
        ("After", _blend(shown, after, colours)),
    )

    title, small = ImageFont.load_default(20), ImageFont.load_default(15)
    head, foot = 34, 44 if names else 0
    page = Image.new(
        "RGB",
        (3 * size[0] + 2 * _GAP + 2 * _MARGIN, _MARGIN + head + size[1] + foot + _MARGIN),
        _PAGE,
    )
    draw = ImageDraw.Draw(page)
    for column, ((name, panel), note) in enumerate(zip(panels, notes, strict=True)):
        left = _MARGIN + column * (size[0] + _GAP)
        base = _MARGIN + 20
        draw.text((left, base), name, _INK, title, anchor="ls")
        # Names of files may not be text, or have several lines.
        note = " ".join(os.fsencode(note).decode("utf-8", "replace").split())
        room = size[0] - draw.textlength(name, title) - 12
        if note and draw.textlength(note, small) <= room:
            draw.text((left + size[0], base), note, _FAINT, small, anchor="rs")
        page.paste(panel, (left, _MARGIN + head))
    if names:
        _legend(draw, names, colours, small, _MARGIN, _MARGIN + head + size[1] + 20)
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
    labels = _nearest(positions, shown.size)
    photo = np.asarray(shown, np.float32)
    grey = photo.mean(axis=2, keepdims=True)
    known = (labels >= 0)[..., None]
    # Tinting a half grey photograph keeps both colour and texture visible.
    tinted = (1 - _TINT) * (0.5 * photo + 0.5 * grey) + _TINT * colours[np.maximum(labels, 0)]
    rows, columns = np.indices(labels.shape)
    stripe = ((rows + columns) % _HATCH < 2)[..., None]
    hidden = np.where(stripe, 0.75 * 90 + 0.25 * grey, _DIM * grey)
    blended = np.where(known, tinted, hidden)
    blended[_edges(labels)] = (255, 255, 255)
    return Image.fromarray(blended.round().astype(np.uint8))


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
    draw: ImageDraw.ImageDraw,
    names: Sequence[str],
    colours: npt.NDArray[np.uint8],
    font: Any,
    left: float,
    top: float,
) -> None:
    for name, colour in zip(names, colours.tolist(), strict=True):
        draw.rounded_rectangle((left, top, left + 16, top + 16), 4, tuple(colour))
        draw.text((left + 23, top + 14), name, _INK, font, anchor="ls")
        left += 23 + draw.textlength(name, font) + 22
