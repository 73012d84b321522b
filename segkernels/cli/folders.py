"""Folders of photographs and label maps: pairing by name, and processing all pairs at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from segkernels.cli.files import PictureError, picture_suffixes


@dataclass
class Pairs:
    """The contents of two folders.

    Attributes:
        jobs: photographs with their labels, ordered by name.
        unlabelled: names of photographs without labels.
        failed: names that cannot be used, and why.
    """

    jobs: list[tuple[Path, Path]] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """One result without its arrays, for the summary; `doubt` is a warning or ""."""

    filled: int
    changed: int
    pixels: int
    seconds: float
    doubt: str


@dataclass
class Totals:
    """Sums over all results; `failed` has a reason for each file name."""

    refined: int = 0
    filled: int = 0
    changed: int = 0
    pixels: int = 0
    crf_seconds: float = 0.0
    doubted: bool = False
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one more result."""
        self.refined += 1
        self.filled += outcome.filled
        self.changed += outcome.changed
        self.pixels += outcome.pixels
        self.crf_seconds += outcome.seconds


def pair_files(images: Path, labels: Path) -> Pairs:
    """Find photographs and label maps whose names differ only in the ending.

    Hidden files, folders, and files whose ending is neither a picture's nor an array's are skipped.
    """
    photographs, maps = _by_stem(images), _by_stem(labels)
    pairs = Pairs()
    for stem in sorted(photographs.keys() | maps.keys()):
        found = photographs.get(stem, []), maps.get(stem, [])
        if not found[0]:
            name = found[1][0].name
            pairs.failed[name] = f"LABELS {found[1][0]}: no photograph of that name in {images}"
        elif not found[1]:
            pairs.unlabelled.append(found[0][0].name)
        elif len(found[0]) > 1 or len(found[1]) > 1:
            several = max(found, key=len)
            names = ", ".join(path.name for path in several)
            pairs.failed[stem] = f"{several[0].parent}: several files named {stem}: {names}"
        else:
            pairs.jobs.append((found[0][0], found[1][0]))
    return pairs


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    suffixes = picture_suffixes()
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file():
            files.setdefault(path.stem, []).append(path)
    return files


def process(
    jobs: list[tuple[Path, Path]],
    work: Callable[[Path, Path, Executor], Outcome],
    complain: Callable[[str, str], None],
    totals: Totals,
) -> Iterator[Path]:
    """Run all jobs, count them in `totals`, and yield the label map of each finished one.

    `work(image, labels, one_thread)` runs on several threads, which read and write files. It
    submits what is parallel itself to `one_thread`. A bad file does not stop the others: `complain`
    gets the kind of trouble and the text at once.
    """
    with (
        ThreadPoolExecutor(1) as one_thread,
        ThreadPoolExecutor(min(4, (os.cpu_count() or 1) + 1)) as files,
    ):
        started = [(files.submit(work, *job, one_thread), job[1]) for job in jobs]
        try:
            for future, labels in started:
                try:
                    outcome = future.result()
                except Exception as error:
                    reason = str(error)
                    if not isinstance(error, PictureError):
                        reason = f"LABELS {labels}: {type(error).__name__}: {error}"
                    totals.failed[labels.name] = reason
                    complain("Error", reason)
                else:
                    totals.add(outcome)
                    if outcome.doubt and not totals.doubted:
                        # Once: the rest of a folder is probably the same.
                        totals.doubted = True
                        complain("Warning", outcome.doubt)
                yield labels
        except BaseException:
            files.shutdown(wait=False, cancel_futures=True)
            raise
