"""Processes the pairs of a folder: in threads, or in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import (
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image

from segkernels.cli.console import STOPPING, ignore_warnings, signals_ignored
from segkernels.cli.files import OptionError, PictureError, Reading, reason
from segkernels.cli.label_maps import read_stored
from segkernels.cli.metrics import Metrics, Score
from segkernels.cli.pairing import Job, split_ending
from segkernels.cli.unknown import BLACK, Format, Meaning, Unknown, judge

J = TypeVar("J")
T = TypeVar("T")
Run = Callable[..., Any]

_FILE_THREADS = min(4, (os.cpu_count() or 1) + 1)


@dataclass(frozen=True)
class Outcome:
    """One result without its arrays, for the summary.

    `doubts` are warnings by their kind, `scores` the agreement with the truth by its name.
    """

    doubts: dict[str, str]
    scores: dict[str, Score] = field(default_factory=dict)
    filled: int = 0
    changed: int = 0
    pixels: int = 0
    missing: int = 0
    seconds: float = 0.0


@dataclass
class Totals:
    """Sums over all results; `failed` has the names of files.

    `metrics` has the names of `Outcome.scores`.
    """

    metrics: dict[str, Metrics] = field(default_factory=dict)
    done: int = 0
    filled: int = 0
    changed: int = 0
    pixels: int = 0
    missing: int = 0
    crf_seconds: float = 0.0
    doubted: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one more result.

        Raises:
            PictureError: its classes are colours and those of the others indices, or the converse.
        """
        for name, score in outcome.scores.items():
            self.metrics[name].add(score)
        self.done += 1
        self.filled += outcome.filled
        self.changed += outcome.changed
        self.pixels += outcome.pixels
        self.missing += outcome.missing
        self.crf_seconds += outcome.seconds
        self.doubted.update(outcome.doubts.keys())


def judge_folder(
    role: str,
    paths: list[Path],
    folder: Path,
    meaning: Meaning,
    reading: Reading,
    track: Callable[[Iterable[object]], Iterable[object]],
) -> dict[Format, Unknown]:
    """Decide on unknown pixels with the values of all label maps together, by format.

    `role`, LABELS or TRUTH, starts the messages. Label maps that cannot be read have no say:
    `process` reports them.

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

    names = iter([path.name for path in paths])
    with ThreadPoolExecutor(_FILE_THREADS) as files:
        for future in track(_in_order(files, look, paths, 2 * _FILE_THREADS)):
            assert isinstance(future, Future)
            name, seen = next(names), future.result()
            if seen is not None:
                format, values = seen
                counts.setdefault(format, Counter()).update(values)
                if len(values) == 2:
                    pairs_of.setdefault(format, {})[name] = set(values)
    judged = {}
    for format, total in counts.items():
        unknown = judge(f"{role} {folder}", format, dict(total), meaning, len(counts) == 1)
        marks = {value for value in unknown.values if value >= 0}
        lonely = [n for n, two in pairs_of.get(format, {}).items() if two & marks]
        if lonely and not (unknown.doubt or unknown.error):
            unknown = replace(unknown, doubt=_one_class(f"{role} {folder}", format, marks, lonely))
        judged[format] = unknown
    return _compare_palettes(f"{role} {folder}", judged, counts)


def _compare_palettes(
    where: str, judged: dict[Format, Unknown], counts: Mapping[Format, Collection[int]]
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
            f"{where}: the palettes differ: black is a class in some maps, as in PASCAL "
            "VOC's palette, and unknown in others; pass --unknown none or --unknown black"
        )
        judged[lost[0]] = replace(judged[lost[0]], doubt=doubt)
    return judged


def _one_class(where: str, format: Format, values: set[int], names: list[str]) -> str:
    """A warning on maps that would be masks of two classes if there were no others."""
    marks = " or ".join(format.show(value) for value in sorted(values))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{where}: {len(names)} maps ({shown}) have just one class beside {marks}, which "
        "is read as unknown because other maps have more values; pass --unknown none if it is a "
        "class"
    )


class Work(Protocol):
    """What is done for a pair; worker processes receive a copy."""

    def __call__(self, job: Job, run: Run) -> Outcome:
        """Read the files of a job, compute, and write the results.

        What is parallel itself is called with `run(function, *arguments)`.
        """


def process(
    jobs: list[Job],
    work: Work,
    workers: int,
    complain: Callable[[str, str], None],
    totals: Totals,
) -> Generator[Job, None, None]:
    """Run all jobs, count them in `totals`, and yield each finished one, in order.

    With `workers` 0 threads of this process read and write files, and one thread computes; else
    there are that many processes with one thread each. A bad file does not stop the others:
    `complain` gets the kind of trouble and the text at once. An exception here (a signal) stops the
    jobs that have not begun to compute; the others are finished and counted.

    Raises:
        PictureError: a worker process ended.
    """

    def count(result: Outcome | str, job: Job) -> None:
        try:
            if isinstance(result, str):
                raise PictureError(result)
            known = +totals.doubted
            totals.add(result)
        except PictureError as error:
            totals.failed.append(job.name + split_ending(job.labels.name)[1])
            complain("Error", str(error))
            return
        for kind, text in result.doubts.items():
            # Once: the rest of a folder is probably the same.
            if not known[kind]:
                complain("Warning", text)

    waiting: deque[Future[Outcome | str]] = deque()
    names = iter(jobs)
    with _executor(work, workers) as (executor, do, stop):
        try:
            for future in _in_order(executor, do, jobs, 2 * (workers or _FILE_THREADS), waiting):
                job = next(names)
                try:
                    count(future.result(), job)
                except BrokenProcessPool as error:
                    raise PictureError(
                        "a worker process was killed, perhaps for lack of memory; pass fewer "
                        "--workers, and --skip-existing to go on"
                    ) from error
                yield job
        except BaseException:
            with signals_ignored():
                stop()
                for future, job in zip(waiting, names, strict=False):
                    if not future.cancelled() and future.exception() is None:
                        count(future.result(), job)
            raise


@contextmanager
def _executor(
    work: Work, workers: int
) -> Iterator[tuple[Executor, Callable[[Job], Outcome | str], Callable[[], None]]]:
    """An executor, the function for it, and a function that stops it."""
    if workers:
        if multiprocessing.current_process().daemon:
            raise OptionError(
                "--workers: this process is daemonic and cannot start others; pass --workers 0"
            )
        context = multiprocessing.get_context("spawn")
        with _starting():  # also the process that tracks semaphores
            pool = ProcessPoolExecutor(workers, context, _start, (work, Image.MAX_IMAGE_PIXELS))
        with pool:
            yield pool, _in_worker, lambda: pool.shutdown(wait=True, cancel_futures=True)
        return
    with ThreadPoolExecutor(1) as one_thread, ThreadPoolExecutor(_FILE_THREADS) as files:

        def run(function: Callable[..., T], *arguments: Any) -> T:
            try:
                future = one_thread.submit(function, *arguments)
            except RuntimeError:  # it is shut down
                raise CancelledError from None
            return future.result()

        def stop() -> None:
            one_thread.shutdown(wait=False, cancel_futures=True)
            files.shutdown(wait=True, cancel_futures=True)

        yield files, lambda job: _report(work, job, run), stop


def _report(work: Work, job: Job, run: Run) -> Outcome | str:
    """The outcome of a job, or what is wrong with its files."""
    # An exception that left here would keep the arrays of its frames until it is reported.
    try:
        return work(job, run)
    except CancelledError:
        raise
    except PictureError as error:
        return str(error)
    except BaseException as error:
        return f"LABELS {job.labels}: {type(error).__name__}: {reason(error)}"


# --- worker processes

_work: Work


def _start(work: Work, max_image_pixels: int | None) -> None:
    """Prepare a worker process."""
    global _work
    _work = work
    Image.MAX_IMAGE_PIXELS = max_image_pixels
    torch.set_num_threads(1)
    ignore_warnings()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    # Else it would wait for ever for the next job if the parent is killed.
    Thread(target=follow, daemon=True).start()


def _in_worker(job: Job) -> Outcome | str:
    return _report(_work, job, lambda function, *arguments: function(*arguments))


def _in_order(
    executor: Executor,
    work: Callable[[J], T],
    jobs: Iterable[J],
    ahead: int,
    waiting: deque[Future[T]] | None = None,
) -> Iterator[Future[T]]:
    """Run jobs and yield their finished futures in order; at most `ahead` are in memory.

    `waiting` holds those that are not yielded yet.
    """
    waiting = deque() if waiting is None else waiting
    for job in jobs:
        with _starting():
            waiting.append(executor.submit(work, job))
        if len(waiting) >= ahead:
            waiting[0].exception()  # waits
            yield waiting.popleft()
    while waiting:
        waiting[0].exception()
        yield waiting.popleft()


@contextmanager
def _starting() -> Iterator[None]:
    """Let processes that start here ignore the signals that ask this one to stop.

    They finish their files when this process stops. Nor do they run this program's main module
    again, which may be a script without a guard, or come from standard input.
    """
    main = sys.modules["__main__"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
