"""Runs the pairs of a command, and prints what came of them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from segkernels.cli.console import complain, error_console, one_line
from segkernels.cli.files import OptionError, PictureError, Reading
from segkernels.cli.folders import Totals, Work, judge_folder, process
from segkernels.cli.label_maps import LabelMap, read_stored
from segkernels.cli.metrics import check_shapes, mismatch, shared_classes
from segkernels.cli.pairing import Job, Pairs, Source
from segkernels.cli.unknown import Format, Meaning, Unknown
from segkernels.cli.volumes import check_places

Judged = Mapping[Format, Unknown]

_FEW_PAIRS = 100  # are done before processes have started
_MOST_WORKERS = 16
_FIRST = 5  # of many errors that are alike
# Kinds of warnings.
_DOUBTS = {
    "values": "16-bit values that do not use 16 bits",
    "unknown": "values read as unknown that may be a class",
    "truth": "values of the truth read as unknown that may be a class",
    "exif": "photographs turned by their EXIF orientation, unlike their labels",
    "srgb": "values in another unit than --srgb",
    "resize": "labels of another aspect ratio than the photograph",
    "affine": "volumes without an affine",
}


def judge(role: str, paths: list[Path], folder: Path, meaning: Meaning, reading: Reading) -> Judged:
    """What `folders.judge_folder` decides; its warnings are printed."""
    reading = _reading_of(role, reading)
    with progress_bar(f"reading {role}") as progress:
        judged = judge_folder(
            role,
            paths,
            folder,
            meaning,
            reading,
            lambda steps: progress.track(steps, total=len(paths)),
        )
    for unknown in judged.values():
        if unknown.doubt:
            complain("Warning", unknown.doubt)
    return {format: replace(unknown, doubt="") for format, unknown in judged.items()}


def check_pairs(pairs: Pairs, images: Source, labels: Source, truth: Source | None = None) -> None:
    """Print what cannot be used, and raise `PictureError` if nothing is left."""
    failures = list(pairs.failed.values())
    for failure in failures if pairs.jobs else failures[:_FIRST]:
        complain("Error", failure)
    if not pairs.jobs:
        if len(failures) > _FIRST:
            complain("Error", f"... and {len(failures) - _FIRST} more")
        raise PictureError(
            f"no {images.what} in {images.path} has usable {labels.what}s of the same name, but "
            f"for the ending and suffixes, in {labels.path}"
        )
    if truth is not None and len(pairs.untrue) == len(pairs.jobs):
        name, hint = next(iter(pairs.untrue.items()))
        raise OptionError(
            f"--truth {truth.path}: no truth has the name of a label map, such as {name}{hint}; "
            "see --truth-suffix and --layout"
        )


def read_map(
    role: str, path: Path, meaning: Meaning, reading: Reading, judged: Judged | None
) -> LabelMap:
    """Read a label map, with what `judge` decided on all, as the argument `role`."""
    try:
        stored = read_stored(path, _reading_of(role, reading))
        found = stored.label_map(meaning, (judged or {}).get(stored.format), blank=True)
        return replace(found, doubt=found.doubt.replace("LABELS", role, 1))
    except PictureError as error:
        raise type(error)(str(error).replace("LABELS", role, 1)) from error


def _reading_of(role: str, reading: Reading) -> Reading:
    """How the files of a role are read: a truth has no scores."""
    if role != "TRUTH":
        return reading
    return replace(reading, scores_key=None, indices_key=None, background=None)


def check_truth(labels: LabelMap, truth: LabelMap, ignore_affine: bool) -> dict[str, str]:
    """Compare sizes, classes and places of labels and truth before any work.

    Returns:
        Warnings by their kind.

    Raises:
        PictureError: they cannot be compared.
    """
    check_shapes(labels.positions, labels, truth)
    shared_classes(labels, truth)
    found = {"truth": truth.doubt} if truth.doubt else {}
    if labels.grid is not None and truth.grid is not None and not ignore_affine:
        names = f"LABELS {labels.path}", f"TRUTH {truth.path}"
        found |= check_places(names[0], labels.grid, names[1], truth.grid)
    return found


def results(totals: Totals) -> dict[str, dict[str, Any]]:
    """What all metrics result in; a doubt on it is printed."""
    found = {name: each.result() for name, each in totals.metrics.items()}
    for result in list(found.values())[-1:]:
        if doubt := mismatch(result):
            complain("Warning", doubt)
    return found


def default_workers(jobs: int, device: str) -> int:
    """The number of processes for a number of jobs; 0 is this process alone."""
    if device != "cpu" or jobs < _FEW_PAIRS or multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_WORKERS)


def run(what: str, jobs: list[Job], work: Work, workers: int, totals: Totals) -> None:
    """Run jobs and count them in `totals`, with a progress bar."""
    steps = process(jobs, work, workers, complain, totals)
    with progress_bar(what) as progress, closing(steps):
        for _ in progress.track(steps, total=len(jobs)):
            pass


def progress_bar(what: str) -> Progress:
    """A progress bar on standard error, if that is a terminal."""
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=error_console,
        disable=not error_console.is_terminal,
    )


@dataclass(frozen=True)
class Rest:
    """What was not processed.

    Attributes:
        pairs: what was found.
        skipped: the number of jobs whose results exist.
        selected: the number of the others in this run.
        totals: of those that were processed.
    """

    pairs: Pairs
    skipped: int
    selected: int
    totals: Totals

    @property
    def failed(self) -> list[str]:
        """Names of files."""
        return self.totals.failed + list(self.pairs.failed)

    @property
    def not_done(self) -> int:
        """The number of jobs that a signal prevented."""
        return self.selected - self.totals.done - len(self.totals.failed)

    def rows(self, alone: str = "no labels", what: str = " photographs") -> list[tuple[str, str]]:
        """For the summary; `alone` and `what` name the photographs without labels."""
        rows = []
        if self.skipped:
            rows.append(("skipped", f"{self.skipped}, which exist"))
        if self.not_done:
            rows.append(("not done", f"{self.not_done}"))
        if self.failed:
            rows.append(("failed", _some([(name, "") for name in self.failed])))
        if self.pairs.alone:
            rows.append((alone, _some([*self.pairs.alone.items()], what)))
        if self.pairs.untrue:
            rows.append(("no truth", _some([*self.pairs.untrue.items()], " label maps")))
        for kind, number in self.totals.doubted.items():
            rows.append(("warned", f"{number} pairs: {_DOUBTS[kind]}"))
        return rows

    def as_json(self, alone: str = "no_labels") -> dict[str, Any]:
        """For the summary as JSON; `alone` names the photographs without labels."""
        return {
            "skipped": self.skipped,
            "not_done": self.not_done,
            "failed": self.failed,
            alone: list(self.pairs.alone),
            "no_truth": list(self.pairs.untrue),
            "warned": dict(self.totals.doubted),
        }


def _some(names: list[tuple[str, str]], what: str = "") -> str:
    """The number of names, and the first of them with the nearest names."""
    shown = [name + (f" ({hint[2:]})" if hint else "") for name, hint in names]
    more = ", ..." if len(shown) > 5 else ""
    return one_line(f"{len(shown)}{what}: {', '.join(shown[:5])}{more}")


def percent(part: int, whole: int) -> str:
    """A share."""
    return f"{part / max(whole, 1):.2%}"


def table(rows: list[tuple[str, str]]) -> Table:
    """The rows of a summary."""
    shown = Table(show_header=False, box=None, pad_edge=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown
