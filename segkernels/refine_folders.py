"""Refining whole folders: which files belong together, and all of them at work at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from segkernels.images import PictureError, picture_suffixes
from segkernels.refine import Options, doubt, load, refine_labels, write_refined

__all__ = ["Pairs", "Totals", "pair_files", "refine_pairs"]


@dataclass
class Pairs:
    """What two folders hold."""

    #: Photographs with their labels, in order of their names.
    jobs: list[tuple[Path, Path]] = field(default_factory=list)
    #: Photographs without labels.
    unlabelled: list[str] = field(default_factory=list)
    #: Names that cannot be used, and why.
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Outcome:
    """What the summary needs of one picture, whose arrays are let go."""

    filled: int
    changed: int
    pixels: int
    seconds: float
    doubt: str


@dataclass
class Totals:
    """What came of them."""

    refined: int = 0
    filled: int = 0
    changed: int = 0
    pixels: int = 0
    crf_seconds: float = 0.0
    doubted: bool = False
    #: File name to the reason.
    failed: dict[str, str] = field(default_factory=dict)


def pair_files(images: Path, labels: Path) -> Pairs:
    """Finds photographs and label maps of the same name, but for the ending.

    Hidden files, folders and files with endings of neither pictures nor arrays are passed over.
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


def refine_pairs(
    jobs: list[tuple[Path, Path]],
    out: Path,
    overlay: Path | None,
    options: Options,
    complain: Callable[[str, str], None],
    totals: Totals,
) -> Iterator[Path]:
    """Refines all jobs, counts them in ``totals`` and yields each label map when it is done.

    A bad file stops no other: ``complain`` hears the kind of trouble and the text at once.
    Files are read and written on several threads. The CRF runs on one: it is parallel inside, and
    several at once would fight for cores and memory.
    """

    def work(image: Path, labels: Path) -> _Outcome:
        photograph, before = load(image, labels, options)
        done = crf.submit(refine_labels, photograph, before, options).result()
        picture = None if overlay is None else overlay / f"{image.stem}.jpg"
        write_refined(done, image, out / f"{image.stem}.png", picture)
        said = doubt(image, photograph, options)
        return _Outcome(done.filled, done.changed, done.after.size, done.seconds, said)

    with (
        ThreadPoolExecutor(1) as crf,
        ThreadPoolExecutor(min(4, (os.cpu_count() or 1) + 1)) as files,
    ):
        started = [(files.submit(work, *job), job[1]) for job in jobs]
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
                    _add(totals, outcome, complain)
                yield labels
        except BaseException:
            files.shutdown(wait=False, cancel_futures=True)
            raise


def _add(totals: Totals, outcome: _Outcome, complain: Callable[[str, str], None]) -> None:
    totals.refined += 1
    totals.filled += outcome.filled
    totals.changed += outcome.changed
    totals.pixels += outcome.pixels
    totals.crf_seconds += outcome.seconds
    if outcome.doubt and not totals.doubted:
        # Once: the rest of a folder is likely to be the same.
        totals.doubted = True
        complain("Warning", outcome.doubt)
