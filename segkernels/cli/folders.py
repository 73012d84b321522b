"""Folders of photographs and label maps: pairing by name, and processing all pairs at once."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import TypeVar

from segkernels.cli.files import PictureError, Reading, picture_suffixes, reason
from segkernels.cli.label_maps import read_stored
from segkernels.cli.unknown import BLACK, Format, Meaning, Unknown, judge

T = TypeVar("T")


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
    """One result without its arrays, for the summary; `doubts` are warnings by their kind."""

    filled: int
    changed: int
    pixels: int
    missing: int
    seconds: float
    doubts: dict[str, str]


@dataclass
class Totals:
    """Sums over all results; `failed` has the names of files."""

    refined: int = 0
    filled: int = 0
    changed: int = 0
    pixels: int = 0
    missing: int = 0
    crf_seconds: float = 0.0
    doubted: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one more result."""
        self.refined += 1
        self.filled += outcome.filled
        self.changed += outcome.changed
        self.pixels += outcome.pixels
        self.missing += outcome.missing
        self.crf_seconds += outcome.seconds
        self.doubted.update(outcome.doubts.keys())


def pair_files(images: Path, labels: Path) -> Pairs:
    """Find photographs and label maps whose names differ only in the ending.

    Hidden files, folders, and files whose ending is neither a picture's nor an array's are skipped.

    Raises:
        PictureError: a folder cannot be listed.
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
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                wanted = path.suffix.lower() in suffixes and not entry.name.startswith(".")
                # A broken link is a file that fails.
                if wanted and not _is_folder(entry):
                    files.setdefault(path.stem, []).append(path)
    except OSError as error:
        raise PictureError(f"{folder}: cannot be listed ({reason(error)})") from error
    return {stem: sorted(paths) for stem, paths in files.items()}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def judge_folder(
    jobs: list[tuple[Path, Path]],
    folder: Path,
    meaning: Meaning,
    reading: Reading,
    track: Callable[[Iterable[object]], Iterable[object]],
) -> dict[Format, Unknown]:
    """Decide on unknown pixels with the values of all label maps together, by format.

    Label maps that cannot be read have no say: `process` reports them.

    Raises:
        OptionError: the user must say which pixels are unknown.
    """
    if meaning.unknown != ("auto",):
        return {}
    counts: dict[Format, Counter[int]] = {}
    pairs_of: dict[Format, dict[str, set[int]]] = {}  # the maps of two values

    def look(labels: Path) -> tuple[Format, dict[int, int]] | None:
        try:
            stored = read_stored(labels, reading)
        except Exception:
            return None
        exact = stored.ready is None and (not stored.lossy or meaning.num_classes is not None)
        # A photograph among the labels has a million values, and will be refused.
        return (stored.format, stored.counts) if exact and len(stored.counts) < 1 << 12 else None

    names = iter([labels.name for _, labels in jobs])
    with ThreadPoolExecutor(_workers()) as files:
        for future in track(_in_order(files, look, [(labels,) for _, labels in jobs])):
            assert isinstance(future, Future)
            name, seen = next(names), future.result()
            if seen is not None:
                format, values = seen
                counts.setdefault(format, Counter()).update(values)
                if len(values) == 2:
                    pairs_of.setdefault(format, {})[name] = set(values)
    judged = {}
    for format, total in counts.items():
        unknown = judge(f"LABELS {folder}", format, dict(total), meaning, len(counts) == 1)
        marks = {value for value in unknown.values if value >= 0}
        lonely = [n for n, two in pairs_of.get(format, {}).items() if two & marks]
        if lonely and not (unknown.doubt or unknown.error):
            unknown = replace(unknown, doubt=_one_class(folder, format, marks, lonely))
        judged[format] = unknown
    return _compare_palettes(folder, judged, counts)


def _compare_palettes(
    folder: Path, judged: dict[Format, Unknown], counts: Mapping[Format, Collection[int]]
) -> dict[Format, Unknown]:
    """Add a warning where black is a class with one palette and unknown with another."""
    unknown = {
        format: {format.colour(index) == BLACK and index in judged[format].values for index in used}
        for format, used in counts.items()
        if format.kind == "palette" and BLACK in map(format.colour, used)
    }
    kept = [format for format, marks in unknown.items() if True not in marks]
    lost = [format for format, marks in unknown.items() if True in marks]
    if kept and lost and not judged[lost[0]].error:
        doubt = (
            f"LABELS {folder}: the palettes differ: black is a class in some maps, as in PASCAL "
            "VOC's palette, and unknown in others; pass --unknown none or --unknown black"
        )
        judged[lost[0]] = replace(judged[lost[0]], doubt=doubt)
    return judged


def _one_class(folder: Path, format: Format, values: set[int], names: list[str]) -> str:
    """A warning on maps that would be masks of two classes if there were no others."""
    marks = " or ".join(format.show(value) for value in sorted(values))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"LABELS {folder}: {len(names)} maps ({shown}) have just one class beside {marks}, which "
        "is read as unknown because other maps have more values; pass --unknown none if it is a "
        "class"
    )


def process(
    jobs: list[tuple[Path, Path]],
    work: Callable[[Path, Path, Executor], Outcome],
    complain: Callable[[str, str], None],
    totals: Totals,
) -> Generator[Path, None, None]:
    """Run all jobs, count them in `totals`, and yield the label map of each finished one.

    `work(image, labels, one_thread)` runs on several threads, which read and write files. It
    submits what is parallel itself to `one_thread`. A bad file does not stop the others: `complain`
    gets the kind of trouble and the text at once. An exception here (a signal) stops those that
    have not begun their CRF; the others are finished and counted.
    """

    def report(image: Path, labels: Path) -> Outcome | str:
        # An exception that left here would keep the arrays of its frames until it is reported.
        try:
            return work(image, labels, one_thread)
        except BaseException as error:
            if stopping.is_set():
                raise CancelledError from None
            if isinstance(error, PictureError):
                return str(error)
            return f"LABELS {labels}: {type(error).__name__}: {reason(error)}"

    def count(result: Outcome | str, labels: Path) -> None:
        if isinstance(result, str):
            totals.failed.append(labels.name)
            complain("Error", result)
            return
        for kind, text in result.doubts.items():
            # Once: the rest of a folder is probably the same.
            if not totals.doubted[kind]:
                complain("Warning", text)
        totals.add(result)

    stopping = Event()
    waiting: deque[Future[Outcome | str]] = deque()
    names = iter([labels for _, labels in jobs])
    with ThreadPoolExecutor(1) as one_thread, ThreadPoolExecutor(_workers()) as files:
        try:
            for future in _in_order(files, report, jobs, waiting):
                labels = next(names)
                count(future.result(), labels)
                yield labels
        except BaseException:
            stopping.set()
            one_thread.shutdown(wait=False, cancel_futures=True)
            files.shutdown(wait=True, cancel_futures=True)
            for future, labels in zip(waiting, names, strict=False):
                if not future.cancelled() and future.exception() is None:
                    count(future.result(), labels)
            raise


def _in_order(
    executor: Executor,
    work: Callable[..., T],
    jobs: Iterable[tuple[Path, ...]],
    waiting: deque[Future[T]] | None = None,
) -> Iterator[Future[T]]:
    """Run jobs and yield their finished futures in order; few are in memory at any time.

    `waiting` holds those that are not yielded yet.
    """
    waiting = deque() if waiting is None else waiting
    for job in jobs:
        waiting.append(executor.submit(work, *job))
        if len(waiting) >= 2 * _workers():
            waiting[0].exception()  # waits
            yield waiting.popleft()
    while waiting:
        waiting[0].exception()
        yield waiting.popleft()


def _workers() -> int:
    return min(4, (os.cpu_count() or 1) + 1)
