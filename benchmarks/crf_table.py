"""The README's table of the dense CRF: segkernels and pydensecrf2 side by side, in one run.

    python benchmarks/crf_table.py                      prints it
    python benchmarks/crf_table.py --update README.md   and puts it between the file's markers

Each case is checked first, then timed in rounds in which every implementation runs once; the table
has the medians. A round in which other processes used more than a tenth of a core is taken again:
OpenMP's figures mean nothing then. What they used decides that, not the times. Where too few rounds
are quiet, there is no table.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import cases
import checks
import numpy as np
import peers
import torch
import typer
from inputs import crf_inputs
from measure import threads
from shapes import CRF, CrfShape
from tables import milliseconds, table
from timing import as_graph, event_times, others_share, wall_time, warm_up

import segkernels

BEGIN, END = "<!-- crf_table:begin -->", "<!-- crf_table:end -->"
_BUDGET = 30.0  # seconds that the rounds of a case may take
_ROUNDS = (7, 25)
_OTHERS = 0.1  # cores that other processes may use
_PATIENCE = 1800.0  # seconds to wait for quiet rounds of a case
_CPU = torch.device("cpu")


def main(
    update: Annotated[
        Path | None, typer.Option(help="Put the table between the markers of this file.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Leave out the slow cases.")] = False,
) -> None:
    """Measure the dense CRF and print a Markdown table."""
    shapes = [s for s in CRF if s.quick or not quick]
    columns: list[str] = []
    rows, rounds = [], []
    for shape in shapes:
        cells, count = _row(shape)
        columns = list(cells)
        rows.append(list(cells.values()))
        rounds.append(count)
    text = f"{table(columns, rows)}\n\n{_setting(rounds)}"
    print(text)
    if update is not None:
        _put(update, text)


def _row(shape: CrfShape) -> tuple[dict[str, str], int]:
    """The cells of a case, by column, and how many rounds it had."""
    call = cases.crf(shape, _CPU)
    images, probs = crf_inputs(shape, _CPU)
    picture = images[0].permute(1, 2, 0).numpy().astype(np.uint8)
    peer = peers.pydensecrf(shape, picture, probs[0].numpy())
    if peer.run is None:
        raise SystemExit(f"{peer.name} is missing: {peer.missing}")
    result = call()
    checks.crf(shape, result, images, probs, peer)

    count = torch.get_num_threads()
    calls: dict[str, Any] = {f"segkernels, {count} threads": call}
    if count > 1:
        calls["segkernels, 1 thread"] = lambda: _single(call)
    calls["pydensecrf2"] = peer.run
    warm_up(call)
    once = sum(wall_time(c) for c in calls.values())
    least, most = _ROUNDS
    times = _quiet_rounds(calls, min(most, max(least, int(_BUDGET / once))), shape.name)

    cells = {
        "size": f"{shape.width} x {shape.height}",
        "classes": f"{shape.classes}",
        "iterations": f"{shape.iterations}",
    }
    for name, t in times.items():
        cells[f"{name} (ms)"] = milliseconds(statistics.median(t))
        low, _, high = statistics.quantiles(t, n=4)
        _say(f"{shape.name} {name}: middle half {milliseconds(low)} to {milliseconds(high)} ms")
    ours, theirs = (
        statistics.median(times[name]) for name in (f"segkernels, {count} threads", "pydensecrf2")
    )
    cells["ratio"] = f"{theirs / ours:.1f}"
    if torch.cuda.is_available():
        cells |= _cuda(shape, result)
    return cells, len(times["pydensecrf2"])


def _quiet_rounds(calls: dict[str, Any], wanted: int, case: str) -> dict[str, list[float]]:
    """The times of `wanted` rounds in which nothing else ran."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.monotonic() + _PATIENCE
    thrown = 0
    while len(times["pydensecrf2"]) < wanted:
        if time.monotonic() > deadline:
            raise SystemExit(
                f"{case}: other processes kept the machine busy ({thrown} of "
                f"{thrown + len(times['pydensecrf2'])} rounds in {_PATIENCE:.0f} s): no table"
            )
        share = others_share()
        taken = {name: wall_time(c) for name, c in calls.items()}
        if share() > _OTHERS:
            thrown += 1
            continue
        for name, seconds in taken.items():
            times[name].append(seconds)
    _say(f"{case}: {wanted} rounds, and {thrown} thrown away because other processes ran")
    return times


def _single(call: cases.Call) -> torch.Tensor:
    with threads(1):
        return call()


def _cuda(shape: CrfShape, expected: torch.Tensor) -> dict[str, str]:
    """The same on the current CUDA device: each call, and as a graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    call = cases.crf(shape, device)
    checks.close(call()[0].cpu(), expected[0], 1.0, f"{shape.name}: CUDA against the CPU")
    bound = max(cases.crf_vertices(shape, device).values()) * 5 // 4
    replay = as_graph(cases.crf(shape, device, max_vertices=bound), device)
    checks.close(replay()[0].cpu(), expected[0], 1.0, f"{shape.name}: a CUDA graph against the CPU")
    warm_up(call)
    name = torch.cuda.get_device_name(device)
    return {
        f"segkernels, {name} (ms)": milliseconds(statistics.median(event_times(call, device, 30))),
        "as a CUDA graph (ms)": milliseconds(statistics.median(event_times(replay, device, 30))),
    }


def _setting(rounds: list[int]) -> str:
    """What the figures were taken on."""
    few, many = min(rounds), max(rounds)
    policy = os.environ.get("OMP_WAIT_POLICY")
    cpu = f"{_cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    versions = ", ".join(
        [
            f"segkernels {segkernels.__version__}",
            f"pydensecrf2 {importlib.metadata.version('pydensecrf2')}",
            f"torch {torch.__version__}",
            f"Python {platform.python_version()}",
            *([f"OMP_WAIT_POLICY={policy}"] if policy else []),
        ]
    )
    return (
        f"{cpu}; {versions}. Medians of {few if few == many else f'{few} to {many}'} interleaved "
        "rounds in which nothing else ran; ratio: pydensecrf2 (it has one thread) over segkernels."
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _put(path: Path, text: str) -> None:
    old = path.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise SystemExit(f"{path} must have {BEGIN} and {END} once each")
    head, rest = old.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
