"""How well label maps agree with the truth: IoU, pixel accuracy and boundary F-score.

`compare` scores one label map, and `Metrics` sums over many. They need the extra ``eval``.
"""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.table import Table
from rich.text import Text

from segkernels.cli.files import PictureError
from segkernels.cli.label_maps import LabelMap
from segkernels.cli.unknown import code

ClassId = int | str  # an index, or the colour "#rrggbb" of a class without one

TOLERANCE = 2  # of the boundary F-score, in pixels


@dataclass(frozen=True, eq=False)
class Score:
    """One label map against its truth; small, so that processes can send it.

    Attributes:
        path: the file of the label map.
        classes: those that the counted pixels of the truth or of the label map have, in order.
        confusion: (C, C + 1) int64, the number of pixels of each class in the truth (row) and in
            the label map (column). The last column is without a class.
        boundary_f: for each class, from 0 to 1; None without a boundary in both maps.
        ignored: the number of pixels without a class in the truth. Nothing else counts them.
    """

    path: Path
    classes: tuple[ClassId, ...]
    confusion: npt.NDArray[np.int64]
    boundary_f: tuple[float | None, ...]
    ignored: int

    @property
    def pixels(self) -> int:
        """The number of pixels with a class in the truth."""
        return int(self.confusion.sum())

    @property
    def unlabelled(self) -> int:
        """The number of these that have no class in the label map, and so are wrong."""
        return int(self.confusion[:, -1].sum())


def check_installed() -> None:
    """Raise `PictureError` if torchmetrics, the extra ``eval``, is missing."""
    _import("torchmetrics")


def shared_classes(labels: LabelMap, truth: LabelMap) -> tuple[list[ClassId], list[ClassId]]:
    """The class of each position in `labels`, and in `truth`, named alike in both.

    Classes are indices, or colours where both maps have colours without a palette.

    Raises:
        PictureError: one map has indices, the other colours.
    """
    if (labels.indices is None) != (truth.indices is None):
        kinds = ["colours" if m.indices is None else "indices" for m in (labels, truth)]
        raise PictureError(
            f"expected indices in both maps, or colours in both, got {kinds[0]} in LABELS "
            f"{labels.path} and {kinds[1]} in TRUTH {truth.path}; pass --palette"
        )
    ours, theirs = (
        [f"#{code(*key):06x}" if isinstance(key, tuple) else key for key in found]
        for found in (labels.indices or labels.keys, truth.indices or truth.keys)
    )
    return ours, theirs


def check_shapes(positions: npt.NDArray[Any], labels: LabelMap, truth: LabelMap) -> None:
    """Raise `PictureError` unless `positions`, of `labels`, has the shape of the truth."""
    shapes = positions.shape, truth.positions.shape
    if shapes[0] == shapes[1]:
        return
    flat = len(shapes[0]) == len(shapes[1]) == 2
    sizes = ["x".join(map(str, shape[::-1] if flat else shape)) for shape in shapes]
    raise PictureError(
        f"{'sizes differ (width x height)' if flat else 'shapes differ'}: "
        f"LABELS {labels.path} is {sizes[0]}, TRUTH {truth.path} is {sizes[1]}"
        + ("; one is turned by 90 degrees" if flat and shapes[0] == shapes[1][::-1] else "")
    )


def compare(positions: npt.NDArray[Any], labels: LabelMap, truth: LabelMap) -> Score:
    """Compare a label map, before or after refinement, with the truth.

    A pixel without a class in the truth is ignored, as if it were not there. A pixel with a class
    there and none in `positions` is wrong: it is in the union of its true class.

    The boundary F-score is that of Csurka et al., "What is a good evaluation measure for semantic
    segmentation?", BMVC 2013, with a tolerance of `TOLERANCE` pixels. A pixel is on the boundary of
    its class if a pixel beside it, along an axis, has another class or, in `positions`, none. There
    is no boundary at the picture's border, nor beside ignored pixels. Precision is the share of the
    label map's boundary within the tolerance of the truth's, recall the converse, and
    F = 2 precision * recall / (precision + recall).

    Args:
        positions: integers of any number of axes, positions in ``labels.keys``; -1: no class.
        labels: the map that `positions` belong to; ``labels.positions`` are not used.
        truth: the right classes, with the shape of `positions`.

    Raises:
        PictureError: the shapes differ, the maps have no common classes (`shared_classes`), or the
            extra ``eval`` is missing.
    """
    check_shapes(positions, labels, truth)
    ours, theirs = shared_classes(labels, truth)
    counted = truth.positions >= 0
    classes = tuple(
        sorted(
            {ours[i] for i in _used(positions[counted], len(ours))}
            | {theirs[i] for i in _used(truth.positions[counted], len(theirs))},
            key=_order,
        )
    )
    count = len(classes)
    ignored = int(counted.size - counted.sum())
    if not count:
        return Score(labels.path, (), np.zeros((0, 1), np.int64), (), ignored)
    number = {key: i for i, key in enumerate(classes)}
    # The last one is position -1.
    table = np.array([*(number.get(key, -1) for key in ours), count], np.int32)
    predicted = np.where(counted, table[positions], np.int32(-1))
    table = np.array([*(number.get(key, -1) for key in theirs), -1], np.int32)
    actual = table[truth.positions]
    confusion = _import("torchmetrics.functional.classification").multiclass_confusion_matrix(
        torch.from_numpy(predicted[counted]).long(),
        torch.from_numpy(actual[counted]).long(),
        num_classes=count + 1,
        validate_args=False,
    )
    return Score(
        labels.path,
        classes,
        confusion.numpy()[:count].astype(np.int64),
        _boundary_f(predicted, actual, count),
        ignored,
    )


class Metrics:
    """Sums scores; the result does not depend on their order.

    Args:
        names: of class indices.
    """

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        self._names: Mapping[Any, str] = names or {}
        self._confusion: Counter[tuple[ClassId, ClassId | None]] = Counter()
        self._boundary_f: dict[ClassId, list[float]] = {}
        self._images: Counter[ClassId | None] = Counter()  # None: all
        self._ignored = 0

    def add(self, score: Score) -> None:
        """Count one more label map.

        Raises:
            PictureError: it has indices and the others have colours, or the converse.
        """
        known = next((key for key in self._images if key is not None), None)
        if score.classes and known is not None and type(known) is not type(score.classes[0]):
            raise PictureError(
                f"{score.path}: expected a class like {known} of the other maps, "
                f"got {score.classes[0]}; pass --palette"
            )
        self._ignored += score.ignored
        self._images[None] += bool(score.pixels)
        columns = (*score.classes, None)
        for key, row, value in zip(score.classes, score.confusion, score.boundary_f, strict=True):
            self._images[key] += bool(row.any())
            for i in np.flatnonzero(row):
                self._confusion[key, columns[i]] += int(row[i])
            if value is not None:
                self._boundary_f.setdefault(key, []).append(value)

    def result(self) -> dict[str, Any]:
        """The metrics, for JSON. Shares are from 0 to 1, and None where they are undefined.

        ``images`` is the number of label maps, without those whose truth is ignored everywhere.
        ``pixels``, ``ignored`` and ``unlabelled`` are sums over the scores.

        ``pixel_accuracy`` is the share of right pixels. ``iou`` is a class's intersection over
        union, summed over all images, and ``accuracy`` the share of its pixels that are right
        (recall). Its ``boundary_f`` is the mean over the images where it has one, ``pixels`` the
        number in the truth, ``predicted`` that in the label maps, and ``images`` the number of
        those whose truth has the class.

        The means are over the classes of the truth and the label maps. A class that the truth has
        nowhere has IoU 0 and is in the mean, as in torchmetrics'
        ``MulticlassJaccardIndex(average="macro")``; a class that neither has does not appear.
        """
        keys: list[Any] = sorted((key for key in self._images if key is not None), key=_order)
        number = {key: i for i, key in enumerate([*keys, None])}
        confusion = np.zeros((len(number), len(number)), np.int64)
        for (true, found), pixels in self._confusion.items():
            confusion[number[true], number[found]] = pixels
        totals, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
        right = confusion.diagonal()
        ious = _jaccard(confusion)
        classes = [
            {
                "class": key,
                "name": self._names.get(key),
                "iou": ious[i],
                "accuracy": _share(right[i], totals[i]),
                "boundary_f": _mean(self._boundary_f.get(key, [])),
                "pixels": int(totals[i]),
                "predicted": int(predicted[i]),
                "images": self._images[key],
            }
            for i, key in enumerate(keys)
        ]
        return {
            "images": self._images[None],
            "pixels": int(totals.sum()),
            "ignored": self._ignored,
            "unlabelled": int(confusion[:, -1].sum()),
            "pixel_accuracy": _share(right.sum(), totals.sum()),
            # Not by torchmetrics, whose float32 mean of ones is not exactly one.
            "mean_iou": _mean(ious),
            "mean_boundary_f": _mean(
                [entry["boundary_f"] for entry in classes if entry["boundary_f"] is not None]
            ),
            "classes": classes,
        }


def mismatch(result: Mapping[str, Any]) -> str:
    """A warning where each side has classes that the other lacks, or ""."""
    ours = [entry["class"] for entry in result["classes"] if not entry["pixels"]]
    theirs = [entry["class"] for entry in result["classes"] if not entry["predicted"]]
    if not (ours and theirs):
        return ""
    words = [", ".join(map(str, c[:4])) + (", ..." if len(c) > 4 else "") for c in (ours, theirs)]
    return (
        f"class {words[0]} is only in the labels and {words[1]} only in the truth: are these other "
        "values for the same class, such as 1 and 255, or one that is unknown?"
    )


def table(columns: Mapping[str, dict[str, Any]]) -> Table:
    """A table of what `Metrics.result` returned, one column or more for each title in `columns`.

    Numbers are in percent; "-" is undefined. Of two columns it also shows the gain of the IoU.
    """
    results = list(columns.values())
    by_class = [{entry["class"]: entry for entry in result["classes"]} for result in results]
    entries = {key: entry for part in by_class for key, entry in part.items()}
    named = any(entry["name"] for entry in entries.values())
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("class", no_wrap=True, vertical="bottom")
    if named:
        shown.add_column("name", overflow="fold", vertical="bottom")
    heads = [f"IoU %\n{title}" for title in columns]
    heads += ["gain"] if len(results) == 2 else []
    heads += [f"boundary\nF %\n{title}" for title in columns]
    for head in heads:
        shown.add_column(head.strip(), justify="right", no_wrap=True, vertical="bottom")

    def row(title: str, name: str, ious: list[Any], boundary: list[Any] | None = None) -> None:
        cells = [_percent(value) for value in ious]
        if len(ious) == 2:
            both = None not in ious
            cells.append(f"{100 * (ious[1] - ious[0]):+.2f}" if both else "-")
        cells += [""] * len(ious) if boundary is None else [_percent(value) for value in boundary]
        # Names may hold what rich takes for markup.
        shown.add_row(*map(Text, [title, *([name] if named else []), *cells]))

    for key in sorted(entries, key=_order):
        found = [part.get(key, {}) for part in by_class]
        row(
            str(key),
            entries[key]["name"] or "",
            [entry.get("iou") for entry in found],
            [entry.get("boundary_f") for entry in found],
        )
    shown.add_row()
    means = ([result[key] for result in results] for key in ("mean_iou", "mean_boundary_f"))
    row("mean", "", *means)
    row("pixel accuracy", "", [result["pixel_accuracy"] for result in results])
    return shown


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _order(key: ClassId) -> tuple[bool, ClassId]:
    return isinstance(key, str), key


def _used(positions: npt.NDArray[Any], count: int) -> list[int]:
    """The positions that occur, without -1."""
    occur = np.bincount(positions.astype(np.int64) + 1, minlength=count + 1)
    return [int(i) for i in np.flatnonzero(occur[1:])]


def _jaccard(confusion: npt.NDArray[np.int64]) -> list[float]:
    """The IoU of each class; the last row and column are without a class."""
    count = len(confusion) - 1
    if not count:
        return []
    metric = _import("torchmetrics.classification").MulticlassJaccardIndex(count + 1, average=None)
    metric.confmat = torch.from_numpy(confusion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that `update` was not called
        ious: list[float] = metric.compute()[:count].tolist()
    return ious


def _boundary_f(
    predicted: npt.NDArray[np.int32], actual: npt.NDArray[np.int32], count: int
) -> tuple[float | None, ...]:
    """The boundary F-score of each class below `count`.

    -1 is ignored, and `count` is without a class.
    """
    ours, theirs = _boundaries(predicted), _boundaries(actual)
    scores: list[float | None] = []
    for (right, found), (hit, wanted) in zip(
        _near(ours, theirs, count), _near(theirs, ours, count), strict=True
    ):
        if not (found or wanted):
            scores.append(None)
        elif not (right and hit):
            scores.append(0.0)  # as where one of the maps has no boundary
        else:
            precision, recall = right / found, hit / wanted
            scores.append(2 * precision * recall / (precision + recall))
    return tuple(scores)


def _near(
    here: npt.NDArray[np.int32], there: npt.NDArray[np.int32], count: int
) -> list[tuple[int, int]]:
    """For each class the number of pixels in `here` near some in `there`, and of all in `here`."""
    points = np.nonzero(here)
    classes = here[points]
    padded = np.pad(there, TOLERANCE)
    near = np.zeros(len(classes), bool)
    for offset in itertools.product(range(-TOLERANCE, TOLERANCE + 1), repeat=here.ndim):
        if sum(step**2 for step in offset) <= TOLERANCE**2:
            moved = tuple(x + step + TOLERANCE for x, step in zip(points, offset, strict=True))
            near |= padded[moved] == classes
    some, every = (np.bincount(c, minlength=count + 1) for c in (classes[near], classes))
    return [(int(some[i]), int(every[i])) for i in range(1, count + 1)]


def _boundaries(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The class + 1 of each pixel that has another class beside it, along an axis; else 0."""
    edge = np.zeros(values.shape, bool)
    for axis in range(values.ndim):
        here, there = np.moveaxis(values, axis, 0)[:-1], np.moveaxis(values, axis, 0)[1:]
        differ = (here != there) & (here >= 0) & (there >= 0)
        along = np.moveaxis(edge, axis, 0)
        along[:-1] |= differ
        along[1:] |= differ
    return np.where(edge, values + 1, 0)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PictureError(
            f"metrics: expected the package {module.partition('.')[0]}, got none; "
            'pip install "segkernels[eval]"'
        ) from error
