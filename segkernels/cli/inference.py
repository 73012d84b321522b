"""Runs the dense CRF on a photograph and its labels: whole or in tiles, without missing pixels.

Arrays of pixels have the shape (H, W), or (X, Y, Z) for a volume, in the order of the file's axes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from segkernels import _status
from segkernels.cli.files import OptionError, PictureError, Reading, reason, size_words
from segkernels.cli.images import Photograph, read_images
from segkernels.cli.label_maps import LabelMap, not_labels, read_stored
from segkernels.cli.unknown import Format, Meaning, Unknown
from segkernels.cli.volumes import AxialSlice, Grid, check_places
from segkernels.ops.dense_crf import PairwiseTerm, dense_crf, probs_from_labels

Sigma = float | tuple[float, ...]

_MAX_ENTRIES = 1 << 30  # pixels * (features + 1) in one call of dense_crf
_STRETCH = 1.05  # labels whose sides have another ratio, by more than this, cause a warning
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
        crf: keyword arguments of `segkernels.dense_crf`; the others have its defaults. For a volume
            the sigmas of positions are in mm: a number, or one for each of the file's axes.
        tile: the side of the tiles in pixels; None: the whole picture at once.
        overlap: how far a tile's input reaches beyond it, in pixels; None: three times the largest
            of the sigmas in pixels.
        keep_probs: also return the probabilities.
        resize: stretch labels of another size to the photograph's.
    """

    device: str = "cpu"
    gt_prob: float = 0.7
    meaning: Meaning = field(default_factory=Meaning)
    reading: Reading = field(default_factory=Reading)
    crf: Mapping[str, Any] = field(default_factory=dict)
    tile: int | None = None
    overlap: int | None = None
    keep_probs: bool = False
    resize: bool = False

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
        after: positions in ``before.keys``; -1 where the photograph has no data.
        probs: (C, *shape) float32, NaN where the photograph has no data; None unless
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

    tile: tuple[slice, ...]
    input: tuple[slice, ...]

    @property
    def inner(self) -> tuple[slice, ...]:
        """The tile within its input."""
        return tuple(
            slice(tile.start - around.start, tile.stop - around.start)
            for tile, around in zip(self.tile, self.input, strict=True)
        )


def load(
    image: Path | Sequence[Path],
    labels: Path,
    options: Options,
    judged: Mapping[Format, Unknown] | None = None,
) -> tuple[Photograph, LabelMap]:
    """Read a photograph (`images.read_images`) and its labels (`label_maps.read_labels`).

    `judged` is what `label_maps.judge` decided for a folder; without, it decides on these labels.

    Raises:
        PictureError: a file cannot be used, the sizes or the places of voxels differ, or the scene
            needs tiles.
    """
    stored = read_stored(labels, options.reading)
    before = stored.label_map(options.meaning, (judged or {}).get(stored.format))
    paths = (image,) if isinstance(image, Path) else tuple(image)
    photograph = read_images(paths, options.reading)
    if options.resize:
        before = stretched(before, photograph.shape, options.reading.ignore_affine)
    for name in ("sxy_gaussian", "sxy_bilateral"):
        _sigmas(options, name, len(photograph.shape))
    _sigmas(options, "srgb", photograph.values.shape[-1])
    where = f"IMAGE {_names(image)}"
    _check_sizes(where, photograph, before)
    if photograph.grid is not None:
        before = _placed(where, photograph.grid, before, options)
    axes, bands = len(photograph.shape), photograph.values.shape[-1]
    size = size_words(photograph.size)
    if math.prod(photograph.shape) * (axes + bands + 1) <= _MAX_ENTRIES:
        return photograph, before
    if axes == 3:
        raise PictureError(
            f"{where}: {size} voxels of {bands} channels are more than one call "
            "takes (voxels x (channels + 4) <= 2^30); resample it, or cut out a part"
        )
    if options.tile is None:
        raise PictureError(
            f"{where}: {size} pixels of {bands} bands are more than one call takes "
            f"(pixels x (bands + 3) <= 2^30); pass --tile 4096, say"
        )
    return photograph, before


def _names(image: Path | Sequence[Path]) -> str:
    return str(image) if isinstance(image, Path) else ", ".join(map(str, image))


def _placed(where: str, grid: Grid, before: LabelMap, options: Options) -> LabelMap:
    """The labels of a volume, compared with the image's grid, and with a header to write."""
    if options.tile is not None:
        raise PictureError(f"{where}: --tile is for pictures; a volume is refined at once")
    own = before.grid
    if own is None:
        return replace(before, grid=grid.for_labels())
    cautions = before.cautions
    if not options.reading.ignore_affine:
        found = check_places(where, grid, f"LABELS {before.path}", own)
        cautions = {**cautions, **found}
    if own.shape != grid.shape:  # resized
        own = grid.for_labels(own.header.get_data_dtype())
    return replace(before, grid=own, cautions=cautions)


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
    shape = before.positions.shape
    count = len(before.keys)
    started = time.perf_counter()
    try:
        if photograph.spacing is not None:
            options = _in_voxels(photograph.spacing, options)
        after = np.full(shape, -1, np.int32)
        probs = None
        if options.keep_probs:
            probs = np.full((count, *shape), np.nan, np.float32)
        for window in track(_windows(shape, options)):
            refined = _refine_window(photograph, before, window, options)
            if refined is None:
                continue
            part = slice(count), *window.inner
            inner = refined[part]
            here = inner.argmax(axis=0).astype(np.int32)
            if photograph.missing is not None:
                here[photograph.missing[window.tile]] = -1
            after[window.tile] = here
            if probs is not None:
                part = slice(None), *window.tile
                probs[part] = inner
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise PictureError(f"{before.path}: {reason(error)}") from error
    return Refined(photograph, before, after, probs, time.perf_counter() - started)


def _in_voxels(spacing: tuple[float, ...], options: Options) -> Options:
    """The options with sigmas as `dense_crf` takes them: in voxels, from the last axis on."""
    crf = dict(options.crf)
    for name in ("sxy_gaussian", "sxy_bilateral"):
        sigmas = zip(_sigmas(options, name, len(spacing)), spacing, strict=True)
        crf[name] = tuple(sigma / edge for sigma, edge in sigmas)[::-1]
    return replace(options, crf=crf)


def _windows(shape: tuple[int, ...], options: Options) -> list[_Window]:
    """The tiles, of nearly equal sizes, in rows."""
    reach = options.reach() if options.tile is not None else 0

    def parts(size: int) -> Iterator[tuple[slice, slice]]:
        number = -(-size // (options.tile or size))
        for i in range(number):
            start, stop = size * i // number, size * (i + 1) // number
            yield slice(start, stop), slice(max(0, start - reach), min(size, stop + reach))

    boxes = itertools.product(*(list(parts(size)) for size in shape))
    return [
        _Window(tuple(tile for tile, _ in box), tuple(around for _, around in box)) for box in boxes
    ]


def _refine_window(
    photograph: Photograph, before: LabelMap, window: _Window, options: Options
) -> npt.NDArray[np.float32] | None:
    """Probabilities (C, *shape) of a window's input, NaN without data; None if none has data."""
    values = photograph.values[window.input]
    missing = None if photograph.missing is None else photograph.missing[window.input]
    if missing is not None and missing.all():
        return None
    device = torch.device(options.device)
    with torch.no_grad():
        image = torch.from_numpy(values).to(device).float().movedim(-1, 0)
        scores = _scores(before, window, options).to(device)
        if before.num_classes == 1:
            refined = torch.ones_like(scores)
            if missing is not None:
                refined[:, torch.from_numpy(missing).to(device)] = math.nan
        elif missing is None and values.shape == photograph.values.shape:
            batch = (None,) * (len(window.input) - 2)  # an axis that volumes must have
            refined = dense_crf(image[batch], scores[batch], **options.crf).view(scores.shape)
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
        part = slice(None), *window.input
        return torch.from_numpy(np.ascontiguousarray(before.probs[part]))
    marked = torch.from_numpy(np.ascontiguousarray(before.positions[window.input]))[None]
    return probs_from_labels(marked, before.num_classes, options.gt_prob, ignore_index=-1)[0]


def _terms(image: torch.Tensor, window: _Window, options: Options) -> list[PairwiseTerm]:
    """The terms of `dense_crf` with coordinates in the whole picture.

    So the lattices of all tiles are parts of one, and a tile differs from the whole only by what
    is beyond its input.
    """
    axes = [
        torch.arange(part.start, part.stop, dtype=torch.float32, device=image.device)
        for part in window.input
    ]

    def coordinates(name: str) -> torch.Tensor:
        sigmas = _sigmas(options, name, len(axes))[::-1]
        lines = [axis / sigma for axis, sigma in zip(axes, sigmas, strict=True)]
        return torch.stack(torch.meshgrid(*lines, indexing="ij")[::-1])

    colours = torch.tensor(_sigmas(options, "srgb", len(image)), device=image.device)
    scaled = image / colours.view(-1, *[1] * len(axes))
    bilateral = torch.cat([coordinates("sxy_bilateral"), scaled])
    return [
        PairwiseTerm(coordinates("sxy_gaussian"), options.term("compat_gaussian")),
        PairwiseTerm(bilateral, options.term("compat_bilateral")),
    ]


def _sigmas(options: Options, name: str, count: int) -> tuple[float, ...]:
    given = _numbers(options.term(name))
    if len(given) not in (1, count):
        raise OptionError(
            f"--{name.replace('_', '-')}: expected a number or {count} numbers, got {len(given)}"
        )
    return given if len(given) == count else given * count


def _numbers(sigma: Sigma) -> tuple[float, ...]:
    return tuple(sigma) if isinstance(sigma, tuple) else (float(sigma),)


def stretched(before: LabelMap, shape: tuple[int, ...], ignore_affine: bool = False) -> LabelMap:
    """The labels stretched to a shape, unless they are turned or have other axes.

    Another ratio of the sides is a caution, except in volumes with an affine.
    """
    old = before.positions.shape
    if old in (shape, shape[::-1]) or len(old) != len(shape):
        return before
    resized = before.resized(shape)
    scales = [new / was for new, was in zip(shape, old, strict=True)]
    compared = before.grid is not None and not ignore_affine  # by `_placed`
    if max(scales) <= _STRETCH * min(scales) or compared:
        return resized
    text = (
        f"LABELS {before.path} is {size_words(before.size)}, stretched to "
        f"{size_words(resized.size)}, which has another ratio of the sides; if they are of a part "
        "of the picture, cut or pad them instead"
    )
    return replace(resized, cautions={**before.cautions, "resize": text})


def _check_sizes(where: str, photograph: Photograph, labels: LabelMap) -> None:
    shape, own = photograph.shape, labels.positions.shape
    if shape == own:
        return
    if len(shape) != len(own):
        _refuse_axes(where, photograph, labels)
    hint = "; pass --resize to stretch LABELS to IMAGE"
    if labels.foreground_shape is None and labels.probs is not None:
        letters = "C, H, W" if len(own) == 2 else "C, X, Y, Z"
        hint = f"; the array is {labels.probs.shape}, read as ({letters})" + hint
    if shape == own[::-1]:
        hint = "; one is turned by 90 degrees"
        if len(shape) == 3:
            hint = "; the axes of LABELS are (Z, Y, X), as of nnU-Net's arrays; transpose them"
        if photograph.orientation >= 5:
            hint += (
                f": IMAGE was, by its EXIF orientation {photograph.orientation}; pass "
                "--ignore-exif if LABELS belong to the picture as it is stored"
            )
    order = "width x height" if len(shape) == 2 else "X x Y x Z"
    raise PictureError(
        f"sizes differ ({order}): {where} is {size_words(photograph.size)}, "
        f"LABELS {labels.path} is {size_words(labels.size)}{hint}"
    )


def _refuse_axes(where: str, photograph: Photograph, labels: LabelMap) -> NoReturn:
    """Raise for a picture and a volume."""
    if len(photograph.shape) == 2 and labels.grid is None:
        shape = labels.positions.shape if labels.probs is None else labels.probs.shape
        dtype = "integers" if labels.probs is None else "floats"
        raise not_labels(labels.path, dtype, shape)
    kinds = {2: "a picture", 3: "a volume"}
    array = "" if labels.probs is None else f", an array {labels.probs.shape}"
    raise PictureError(
        f"{where} is {kinds[len(photograph.shape)]} of {size_words(photograph.size)}, "
        f"LABELS {labels.path} is {kinds[labels.positions.ndim]} of {size_words(labels.size)}"
        f"{array}; the labels of a volume are NIfTI, or an array of integers (X, Y, Z) or floats "
        "(C, X, Y, Z)"
    )


def middle_slice(
    done: Refined, truth: LabelMap | None = None
) -> tuple[Refined, LabelMap | None, str]:
    """The axial slice of a refined volume that shows most, as a picture, and which one it is.

    It is the slice with the most voxels that changed, or else, whose class is not the most frequent
    one. The truth is cut, too.
    """
    before, after = done.before.positions, done.after
    interesting = (after != before) & (after >= 0)
    if not interesting.any():
        most = np.bincount(after[after >= 0], minlength=1).argmax()
        interesting = (after != most) & (after >= 0)
    axial = AxialSlice(interesting, done.photograph.grid)
    missing = done.photograph.missing
    photograph = Photograph(
        axial.cut(done.photograph.values), None if missing is None else axial.cut(missing)
    )
    cut = replace(
        done,
        photograph=photograph,
        before=done.before.cut(axial),
        after=axial.cut(after),
        probs=None,
    )
    return cut, None if truth is None else truth.cut(axial), axial.note


def doubts(
    image: Path | Sequence[Path], photograph: Photograph, before: LabelMap, options: Options
) -> dict[str, str]:
    """Warnings on a photograph and its labels, by their kind."""
    where = f"IMAGE {_names(image)}"
    found = {"values": photograph.doubt, "unknown": before.doubt}
    if photograph.orientation != before.orientation:
        found["exif"] = (
            f"{where} has EXIF orientation {photograph.orientation}, LABELS "
            f"{before.path.name} has {before.orientation}, and each was turned by its own; pass "
            "--ignore-exif if the labels were made on the picture as it is stored"
        )
    if not photograph.doubt:
        found["srgb"] = _doubtful_srgb(where, photograph, options)
    found.update(photograph.cautions)
    found.update(before.cautions)
    return {kind: text for kind, text in found.items() if text}


def _doubtful_srgb(where: str, photograph: Photograph, options: Options) -> str:
    """A warning where `srgb` is in another unit than the image, or ""."""
    sigmas = _numbers(options.term("srgb"))
    srgb = min(sigmas)
    values = photograph.values
    if photograph.missing is not None:
        values = values[~photograph.missing]
    if len(sigmas) == values.shape[-1] > 1:
        # The channel that differs most in its own unit.
        channels = values.reshape(-1, len(sigmas))
        ranges = (channels.max(axis=0).astype(float) - channels.min(axis=0)) / sigmas
        chosen = int(ranges.argmax())
        values, srgb = channels[:, chosen], sigmas[chosen]
    least, most = float(values.min()), float(values.max())
    units = (
        f"{where} has values from {least:.4g} to {most:.4g}, and --srgb {srgb:g} is in the "
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
