"""CPU operators alone and beside busy processes, with one thread and with two.

    python benchmarks/busy.py                                  this checkout
    python benchmarks/busy.py --before ../other                compared with another built checkout
    python benchmarks/busy.py --only "dense_crf.*" --json busy.json

Two cores are used (on Linux). The neighbours are processes that compute without pause; they are
stopped while a call is timed alone. All settings of a case are timed in turn, in each round, in
processes that sleep while others are timed; the figures are medians over the rounds. `CPU` is the
CPU time of all threads of the process. `passive` is the other checkout with
OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import inputs
import peers
import torch
import torch.nn.functional as F
import typer
from shapes import CrfShape
from tables import milliseconds, table

Call = Callable[[], Any]

_HERE = Path(__file__).resolve().parent
_CORES = 2
_WARM_UP_SECONDS = 0.02
_SAMPLE_SECONDS = 0.06  # least duration of a sample on an idle core
_SPIN = "while True: pass"
# Whether glibc gives freed pages back to the system depends on chance, and doubles some times.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


class Setting(NamedTuple):
    """Where a case is timed: the name of a process, threads, whether neighbours compute."""

    process: str
    threads: int
    busy: bool


def crf(height: int, width: int, classes: int, iterations: int) -> Call:
    """dense_crf of a landscape."""
    import segkernels

    shape = CrfShape(height, width, classes, iterations, "")
    images, probs = inputs.crf_inputs(shape, torch.device("cpu"))
    return lambda: segkernels.dense_crf(images, probs, iterations=iterations)


def pydensecrf(height: int, width: int, classes: int, iterations: int) -> Call:
    """The same with pydensecrf2, on one thread."""
    shape = CrfShape(height, width, classes, iterations, "")
    image, probs = inputs.landscape(height, width), inputs.probabilities(height, width, classes)
    peer = peers.pydensecrf(shape, image, probs)
    assert peer.run is not None, peer.missing
    return peer.run


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Call:
    """Forward and backward."""
    leaf = x.detach().requires_grad_()
    grad = torch.ones_like(function(leaf))
    return lambda: torch.autograd.grad(function(leaf), leaf, grad)


def cases() -> dict[str, Callable[[], Call]]:
    """Names of cases, and the functions that prepare their inputs and return the call."""
    import segkernels as sk

    def values(*shape: int) -> torch.Tensor:
        return inputs.normal(shape, torch.device("cpu"))

    x, low, labels = values(1, 64, 256, 256), values(1, 21, 65, 65), torch.zeros(1, 513, 513).long()
    labels.random_(0, 21, generator=torch.Generator().manual_seed(0))
    pooled, codes = sk.max_pool2d(x, 2, return_codes=True)
    _, indices = F.max_pool2d(x, 2, return_indices=True)
    deep, kernel = values(1, 128, 65, 65), values(128, 128, 3, 3) / 34
    filtered, features = (
        values(1, 21, 256, 256),
        torch.from_numpy(inputs.feature_planes(256, 256, 5)).unsqueeze(0),
    )
    some = features[:, :, ::4, ::4].contiguous()
    logits = filtered[:, :, ::4, ::4].contiguous()

    def torch_loss() -> torch.Tensor:
        up = F.interpolate(low, size=(513, 513), mode="bilinear", align_corners=False)
        return F.cross_entropy(up, labels)

    found: dict[str, Callable[[], Call]] = {
        f"dense_crf {h}x{w}x{c}, {n} iterations": lambda a=(h, w, c, n): crf(*a)
        for h, w, c, n in ((60, 80, 2, 5), (240, 320, 2, 5), (64, 64, 21, 10), (512, 512, 21, 10))
    }
    if importlib.util.find_spec("pydensecrf") is not None:
        found["pydensecrf2 240x320x2, 5 iterations"] = lambda: pydensecrf(240, 320, 2, 5)
    plain: dict[str, Call] = {
        "permutohedral_filter 256x256x21": lambda: sk.permutohedral_filter(filtered, features),
        "gaussian_filter 64x64x21": lambda: sk.gaussian_filter(logits, some),
        "max_pool2d 64x256x256": lambda: sk.max_pool2d(x, 2),
        "max_unpool2d codes": lambda: sk.max_unpool2d(pooled, codes, 2),
        "max_unpool2d indices": lambda: sk.max_unpool2d(pooled, indices, 2),
        "max_pool2d 64x256x256 with backward": gradient(lambda y: sk.max_pool2d(y, 2), x),
        "unpool_nearest": lambda: sk.unpool_nearest(pooled, 2),
        "unpool_bed_of_nails": lambda: sk.unpool_bed_of_nails(pooled, 2),
        "interpolate bilinear": lambda: sk.interpolate(low, size=(513, 513), mode="bilinear"),
        "interpolate bicubic": lambda: sk.interpolate(low, size=(513, 513), mode="bicubic"),
        "interpolate nearest": lambda: sk.interpolate(low, size=(513, 513)),
        "interpolate bilinear with backward": gradient(
            lambda y: sk.interpolate(y, size=(513, 513), mode="bilinear"), low
        ),
        "upsample_argmax": lambda: sk.upsample_argmax(low, size=(513, 513)),
        "upsample_cross_entropy": lambda: sk.upsample_cross_entropy(low, labels),
        "upsample_cross_entropy with backward": gradient(
            lambda y: sk.upsample_cross_entropy(y, labels), low
        ),
        "dilated_conv2d": lambda: sk.dilated_conv2d(deep, kernel, padding=12, dilation=12),
        "torch: conv2d": lambda: F.conv2d(deep, kernel, padding=12, dilation=12),
        "torch: interpolate bilinear, cross_entropy": torch_loss,
    }
    return found | {name: lambda call=call: call for name, call in plain.items()}


def main(
    only: Annotated[str, typer.Option(help="Regular expression for the name of a case.")] = ".*",
    before: Annotated[Path | None, typer.Option(help="Another checkout, built.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds per case.")] = 15,
    neighbours: Annotated[int, typer.Option(help="Number of busy processes.")] = 3,
    to: Annotated[Path | None, typer.Option("--json", help="File for all times.")] = None,
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Time the cases and print tables of medians in milliseconds."""
    if worker:
        return serve()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])
    settings = [Setting("now", n, busy) for n in (1, 2) for busy in (False, True)]
    checkouts = {"now": (_HERE.parent, {})}
    if before is not None:
        checkouts["before"] = (before.resolve(), {})
        checkouts["passive"] = (before.resolve(), {"OMP_WAIT_POLICY": "passive"})
        settings += [Setting("before", 2, busy) for busy in (False, True)]
        settings += [Setting("before", 1, True), Setting("passive", 2, True)]
    settings.sort(key=lambda setting: setting.busy)
    pattern = re.compile(only)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with Neighbours(neighbours) as beside, processes(checkouts) as ask:
        names = [name for name in ask["now"]({"list": True})["cases"] if pattern.fullmatch(name)]
        for name in names:
            times = results[name] = {}
            for line in samples(name, settings, rounds, beside, ask):
                times.setdefault(key_of(line[0]), []).append(line[1])
            print(row_of(name, times), file=sys.stderr, flush=True)
    print(report(results))
    if to is not None:
        to.write_text(json.dumps(results) + "\n")


def samples(
    name: str,
    settings: list[Setting],
    rounds: int,
    beside: Neighbours,
    ask: dict[str, Callable[[dict[str, Any]], dict[str, Any]]],
) -> Iterator[tuple[Setting, dict[str, float]]]:
    """Time a case in each setting in turn, `rounds` times."""
    beside.stop()
    about = ask["now"]({"case": name, "threads": 1, "repeats": 1})["seconds"]
    repeats = max(1, round(_SAMPLE_SECONDS / about))
    for i in range(rounds + 1):
        for setting in settings if i % 2 == 0 else reversed(settings):
            beside.go() if setting.busy else beside.stop()
            request = {"case": name, "threads": setting.threads, "repeats": repeats}
            line = ask[setting.process](request)
            if i > 0:  # the first round warms up
                yield setting, line
    beside.stop()


def serve() -> None:
    """Answer requests from standard input, one a line: {"case", "threads", "repeats"}."""
    prepare = cases()
    name, call = "", None
    for line in sys.stdin:
        request = json.loads(line)
        if "list" in request:
            answer: dict[str, Any] = {"cases": list(prepare)}
        else:
            torch.set_num_threads(request["threads"])
            if request["case"] != name:
                name = request["case"]
                call = prepare[name]()
            assert call is not None
            warm = time.perf_counter() + _WARM_UP_SECONDS
            while call() is not None and time.perf_counter() < warm:
                pass
            cpu, start = time.process_time(), time.perf_counter()
            for _ in range(request["repeats"]):
                call()
            answer = {
                "seconds": (time.perf_counter() - start) / request["repeats"],
                "cpu": (time.process_time() - cpu) / request["repeats"],
            }
        print(json.dumps(answer), flush=True)


@contextmanager
def processes(
    checkouts: dict[str, tuple[Path, dict[str, str]]],
) -> Iterator[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]]:
    """Processes that time calls of the checkouts; each is asked with a function."""
    started = {}
    for name, (root, variables) in checkouts.items():
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
        environment |= {"PYTHONPATH": str(root), **_KEEP_MEMORY, **variables}
        command = [sys.executable, str(_HERE / "busy.py"), "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started[name] = subprocess.Popen(command, env=environment, text=True, **pipes)

    def ask(process: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    try:
        yield {name: (lambda r, p=process: ask(p, r)) for name, process in started.items()}
    finally:
        for process in started.values():
            process.kill()


class Neighbours:
    """Busy processes, which are stopped and continued."""

    def __init__(self, count: int) -> None:
        self._started = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
        self._running = True

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()

    def go(self) -> None:
        """Continue them, and let the scheduler get used to it."""
        self._signal(True, signal.SIGCONT)

    def stop(self) -> None:
        """Stop them."""
        self._signal(False, signal.SIGSTOP)

    def _signal(self, running: bool, number: signal.Signals) -> None:
        if self._running == running:
            return
        for process in self._started:
            process.send_signal(number)
        self._running = running
        time.sleep(0.05)


def key_of(setting: Setting) -> str:
    """A name of a setting."""
    where = "busy" if setting.busy else "alone"
    return f"{setting.process} {where} {setting.threads}"


def row_of(name: str, times: dict[str, list[dict[str, float]]]) -> list[str]:
    """One row of the table."""

    def median(key: str, what: str = "seconds") -> float:
        return statistics.median(line[what] for line in times[key])

    row = [name]
    if "before alone 2" in times:
        row += [milliseconds(median("before alone 2"))]
    row += [milliseconds(median(f"now alone {n}")) for n in (2, 1)]
    if "before busy 2" in times:
        row += [
            milliseconds(median(k)) for k in ("before busy 2", "before busy 1", "passive busy 2")
        ]
    row += [milliseconds(median(f"now busy {n}")) for n in (2, 1)]
    ratio = median("now busy 2") / median("now busy 1")
    cpu = median("now busy 2", "cpu") / median("now alone 2", "cpu")
    cpu_of_one = median("now busy 1", "cpu") / median("now alone 1", "cpu")
    return [*row, f"{ratio:.2f}", f"{cpu:.2f}", f"{cpu_of_one:.2f}"]


def report(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """The table of all cases."""
    compared = any("before busy 2" in times for times in results.values())
    header = ["case, median ms"]
    header += ["alone, before"] if compared else []
    header += ["alone", "1 thread"]
    header += ["busy, before", "1 thread", "passive"] if compared else []
    header += ["busy", "1 thread", "2 threads / 1", "CPU busy / alone", "the same, 1 thread"]
    return table(header, [row_of(name, times) for name, times in results.items()])


if __name__ == "__main__":
    typer.run(main)
