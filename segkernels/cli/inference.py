"""Runs the dense CRF on a photograph and its labels: whole or in tiles, without missing pixels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from segkernels import _status
from segkernels.cli.files import PictureError, Reading, reason
from segkernels.cli.images import Photograph, read_image
from segkernels.cli.label_maps import LabelMap, read_stored
from segkernels.cli.unknown import Format, Meaning, Unknown
from segkernels.ops.dense_crf import PairwiseTerm, dense_crf, probs_from_labels

Sigma = float | tuple[float, ...]

_MAX_ENTRIES = 1 << 30  # pixels * (features + 1) in one call of dense_crf
# The defaults of dense_crf.
_TERMS: dict[str, Any] = {
    "sxy_gaussian": 3.0,
    "compat_gaussian": 3.0,
    "sxy_bilateral": 80.0,
    "srgb": 13.0,
    "compat_bilateral": 10.0,
}


@dataclass(frozen=True)
class Options:
    """What the command line says besides the files.

    Attributes:
        device: "cpu" or "cuda".
        gt_prob: as in `segkernels.probs_from_labels`.
        meaning: what the labels mean.
        reading: how pictures are read.
        crf: keyword arguments of `segkernels.dense_crf`; the others have its defaults.
        tile: the side of the tiles in pixels; None: the whole picture at once.
        overlap: how far a tile's input reaches beyond it, in pixels; None: three times the largest
            of the sigmas in pixels.
        keep_probs: also return the probabilities.
    """

    device: str = "cpu"
    gt_prob: float = 0.7
    meaning: Meaning = field(default_factory=Meaning)
    reading: Reading = field(default_factory=Reading)
    crf: Mapping[str, Any] = field(default_factory=dict)
    tile: int | None = None
    overlap: int | None = None
    keep_probs: bool = False

    def term(self, name: str) -> Any:
        """A parameter of the CRF."""
        return self.crf.get(name, _TERMS[name])

    def reach(self) -> int:
        """The overlap of tiles in pixels."""
        if self.overlap is not None:
            return self.overlap
        sigmas = (*_numbers(self.term("sxy_gaussian")), *_numbers(self.term("sxy_bilateral")))
        return math.ceil(min(3 * max(sigmas), 2.0**31))  # beyond any picture


@dataclass(frozen=True)
class Refined:
    """One refined label map.

    Attributes:
        photograph: as it was read.
        before: the labels as they were.
        after: (H, W) positions in ``before.keys``; -1 where the photograph has no data.
        probs: (C, H, W) float32, NaN where the photograph has no data; None unless
            `Options.keep_probs`.
        seconds: of the CRF, with the copies to and from the device, without the files.
    """

    photograph: Photograph
    before: LabelMap
    after: npt.NDArray[np.int32]
    probs: npt.NDArray[np.float32] | None
    seconds: float

    @property
    def missing(self) -> int:
        """Number of pixels without data."""
        return 0 if self.photograph.missing is None else int(self.photograph.missing.sum())

    @property
    def filled(self) -> int:
        """Number of pixels that were unknown and have a class now."""
        return int(((self.before.positions < 0) & (self.after >= 0)).sum())

    @property
    def changed(self) -> int:
        """Number of labelled pixels whose class changed."""
        before, after = self.before.positions, self.after
        return int(((before >= 0) & (after >= 0) & (after != before)).sum())


class _Window(NamedTuple):
    """Part of a picture: the rows and columns of a tile, and those of its input."""

    tile: tuple[slice, slice]
    input: tuple[slice, slice]

    @property
    def inner(self) -> tuple[slice, slice]:
        """The tile within its input."""
        rows, columns = (
            slice(tile.start - around.start, tile.stop - around.start)
            for tile, around in zip(self.tile, self.input, strict=True)
        )
        return rows, columns


def load(
    image: Path, labels: Path, options: Options, judged: Mapping[Format, Unknown] | None = None
) -> tuple[Photograph, LabelMap]:
    """Read a photograph (`images.read_image`) and its labels (`label_maps.read_labels`).

    `judged` is what `label_maps.judge` decided for a folder; without, it decides on these labels.

    Raises:
        PictureError: a file cannot be used, the sizes differ, or the scene needs tiles.
    """
    stored = read_stored(labels, options.reading)
    before = stored.label_map(options.meaning, (judged or {}).get(stored.format))
    photograph = read_image(image, options.reading)
    _check_sizes(image, photograph, before)
    height, width, bands = photograph.values.shape
    if options.tile is None and height * width * (bands + 3) > _MAX_ENTRIES:
        raise PictureError(
            f"IMAGE {image}: {width}x{height} pixels of {bands} bands are more than one call takes "
            f"(pixels x (bands + 3) <= 2^30); pass --tile 4096, say"
        )
    return photograph, before


def refine_labels(
    photograph: Photograph,
    before: LabelMap,
    options: Options,
    track: Callable[[list[_Window]], Iterable[_Window]] = iter,
) -> Refined:
    """Run the dense CRF on what `load` returned; `track` may show the progress over the tiles.

    Raises:
        PictureError: the CRF rejects its input, or runs out of memory.
    """
    height, width = before.positions.shape
    count = len(before.keys)
    started = time.perf_counter()
    try:
        after = np.full((height, width), -1, np.int32)
        probs = None
        if options.keep_probs:
            probs = np.full((count, height, width), np.nan, np.float32)
        for window in track(_windows(height, width, options)):
            refined = _refine_window(photograph, before, window, options)
            if refined is None:
                continue
            inner_rows, inner_columns = window.inner
            inner = refined[:count, inner_rows, inner_columns]
            here = inner.argmax(axis=0).astype(np.int32)
            if photograph.missing is not None:
                here[photograph.missing[window.tile]] = -1
            after[window.tile] = here
            if probs is not None:
                rows, columns = window.tile
                probs[:, rows, columns] = inner
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise PictureError(f"{before.path}: {reason(error)}") from error
    return Refined(photograph, before, after, probs, time.perf_counter() - started)


def _windows(height: int, width: int, options: Options) -> list[_Window]:
    """The tiles, of nearly equal sizes, in rows."""
    reach = options.reach() if options.tile is not None else 0

    def parts(size: int) -> Iterator[tuple[slice, slice]]:
        number = -(-size // (options.tile or size))
        for i in range(number):
            start, stop = size * i // number, size * (i + 1) // number
            yield slice(start, stop), slice(max(0, start - reach), min(size, stop + reach))

    return [
        _Window((rows, columns), (all_rows, all_columns))
        for rows, all_rows in parts(height)
        for columns, all_columns in parts(width)
    ]


def _refine_window(
    photograph: Photograph, before: LabelMap, window: _Window, options: Options
) -> npt.NDArray[np.float32] | None:
    """Probabilities (C, h, w) of a window's input, NaN without data; None if all of it has none."""
    values = photograph.values[window.input]
    missing = None if photograph.missing is None else photograph.missing[window.input]
    if missing is not None and missing.all():
        return None
    device = torch.device(options.device)
    with torch.no_grad():
        image = torch.from_numpy(values).to(device).float().permute(2, 0, 1)  # (n, h, w)
        scores = _scores(before, window, options).to(device)  # (C, h, w)
        if before.num_classes == 1:
            refined = torch.ones_like(scores)
            if missing is not None:
                refined[:, torch.from_numpy(missing).to(device)] = math.nan
        elif missing is None and values.shape == photograph.values.shape:
            refined = dense_crf(image, scores, **options.crf)
        else:
            terms = _terms(image, window, options)
            rest = {name: value for name, value in options.crf.items() if name not in _TERMS}
            rest.update(compat_gaussian=None, compat_bilateral=None)
            present = None if missing is None else torch.from_numpy(~missing).to(device)
            if present is None:
                refined = dense_crf(None, scores, pairwise=terms, **rest)
            else:
                # Points without a grid, so that missing pixels are no neighbours of others.
                chosen = [
                    PairwiseTerm(term.features[:, present].T.contiguous(), term.compat)
                    for term in terms
                ]
                points = scores[:, present].T.contiguous()
                refined = torch.full_like(scores, math.nan)
                refined[:, present] = dense_crf(None, points, pairwise=chosen, **rest).T
        if device.type == "cuda":
            _status.check(device)
        result: npt.NDArray[np.float32] = refined.cpu().numpy()
    if before.foreground_shape is not None:
        result = np.concatenate([1 - result, result])
    return result


def _scores(before: LabelMap, window: _Window, options: Options) -> torch.Tensor:
    if before.probs is not None:
        rows, columns = window.input
        return torch.from_numpy(np.ascontiguousarray(before.probs[:, rows, columns]))
    marked = torch.from_numpy(np.ascontiguousarray(before.positions[window.input]))
    return probs_from_labels(marked, before.num_classes, options.gt_prob, ignore_index=-1)


def _terms(image: torch.Tensor, window: _Window, options: Options) -> list[PairwiseTerm]:
    """The terms of `dense_crf` with coordinates in the whole picture.

    So the lattices of all tiles are parts of one, and a tile differs from the whole only by what
    is beyond its input.
    """
    axes = [
        torch.arange(part.start, part.stop, dtype=torch.float32, device=image.device)
        for part in window.input
    ]

    def sigmas(name: str, count: int) -> tuple[float, ...]:
        given = _numbers(options.term(name))
        if len(given) not in (1, count):
            raise ValueError(f"{name} must be a number or {count} numbers, got {len(given)}")
        return given if len(given) == count else given * count

    def coordinates(name: str) -> torch.Tensor:
        sx, sy = sigmas(name, 2)
        y, x = torch.meshgrid(axes[0] / sy, axes[1] / sx, indexing="ij")
        return torch.stack([x, y])

    colours = torch.tensor(sigmas("srgb", len(image)), device=image.device)
    bilateral = torch.cat([coordinates("sxy_bilateral"), image / colours.view(-1, 1, 1)])
    return [
        PairwiseTerm(coordinates("sxy_gaussian"), options.term("compat_gaussian")),
        PairwiseTerm(bilateral, options.term("compat_bilateral")),
    ]


def _numbers(sigma: Sigma) -> tuple[float, ...]:
    return tuple(sigma) if isinstance(sigma, tuple) else (float(sigma),)


def _check_sizes(image: Path, photograph: Photograph, labels: LabelMap) -> None:
    height, width = photograph.values.shape[:2]
    if (width, height) == labels.size:
        return
    hint = ""
    if labels.foreground_shape is None and labels.probs is not None:
        hint = f"; the array is {labels.probs.shape}, read as (C, H, W)"
    if (height, width) == labels.size:
        hint = "; one is turned by 90 degrees"
        if photograph.orientation >= 5:
            hint += (
                f": IMAGE was, by its EXIF orientation {photograph.orientation}; pass "
                "--ignore-exif if LABELS belong to the picture as it is stored"
            )
    raise PictureError(
        f"sizes differ (width x height): IMAGE {image} is {width}x{height}, "
        f"LABELS {labels.path} is {labels.size[0]}x{labels.size[1]}{hint}"
    )


def doubts(
    image: Path, photograph: Photograph, before: LabelMap, options: Options
) -> dict[str, str]:
    """Warnings on a photograph and its labels, by their kind."""
    found = {"values": photograph.doubt, "unknown": before.doubt}
    if photograph.orientation != before.orientation:
        found["exif"] = (
            f"IMAGE {image} has EXIF orientation {photograph.orientation}, LABELS "
            f"{before.path.name} has {before.orientation}, and each was turned by its own; pass "
            "--ignore-exif if the labels were made on the picture as it is stored"
        )
    if not photograph.doubt:
        found["srgb"] = _doubtful_srgb(image, photograph, options)
    return {kind: text for kind, text in found.items() if text}


def _doubtful_srgb(image: Path, photograph: Photograph, options: Options) -> str:
    """A warning where `srgb` is in another unit than the image, or ""."""
    srgb = min(_numbers(options.term("srgb")))
    values = photograph.values
    if photograph.missing is not None:
        values = values[~photograph.missing]
    least, most = float(values.min()), float(values.max())
    units = (
        f"IMAGE {image} has values from {least:.4g} to {most:.4g}, and --srgb {srgb:g} is in the "
        "same units"
    )
    if most - least < 2 * srgb:
        unit = values.dtype != np.uint8 and least >= -1 and most <= 1
        hint = "; a picture in [0, 1] wants --srgb 0.05 (13/255)" if unit else ""
        return f"{units}, so all of it looks alike{hint}"
    if most - least > 20 * 255 * srgb / _TERMS["srgb"]:
        wanted = (most - least) * _TERMS["srgb"] / 255
        return (
            f"{units}, so no two pixels look alike; for a picture with this range 13/255 of it is "
            f"--srgb {wanted:.3g}"
        )
    return ""
