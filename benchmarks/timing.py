"""Timing: the wall clock on the CPU; on CUDA, events around each call, with a cold L2 cache."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

_QUEUED = 10  # calls between two synchronisations, which hides launch latency
_QUEUE_SECONDS = 0.02  # queue fewer calls if together they take longer
_WARM_UP = 3
_SLOW = 1.0  # seconds: longer calls are warmed up by one call
_STAT = Path("/proc/stat")
_FLUSH_BYTES = 256 * 2**20  # larger than any L2 cache
_FLUSH_SECONDS = 2e-4  # approximate time to overwrite that buffer
_SHORTEST = 2e-4  # seconds: shorter calls are repeated within one wall-clock reading
# Linux counts busy time in units of 10 ms, so the load of other processes is only evaluated over
# blocks of rounds (_BLOCK seconds) and at least over _WATCHED seconds.
_BLOCK = 0.5
_WATCHED = 0.2
#: Most cores that other processes may use during a measurement that is published.
QUIET = 0.1


class Clock:
    """The timer of pytest-benchmark, in seconds.

    It only changes through `advance`. `device_time` measures each round, alternating with the
    peers; afterwards `advance` passes the measured times to pytest-benchmark.
    """

    __name__ = "timing.clock"  # shown by pytest-benchmark

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Advance the clock."""
        self._now += seconds


clock = Clock()


@dataclass
class Rounds:
    """Times of rounds in which every implementation ran once.

    Attributes:
        times: seconds of each round, by implementation.
        others: cores that other processes used during these rounds.
        thrown: number of discarded rounds, in which others used more than `QUIET` cores.
    """

    times: dict[str, list[float]]
    others: float = 0.0
    thrown: int = 0
    _watched: float = field(default=0.0, repr=False)


def interleave(
    runs: Mapping[str, Callable[[], float]], rounds: int, patience: float = 0.0
) -> tuple[Rounds, float]:
    """Measure `rounds` rounds of all `runs`; the order is reversed after each round.

    The load of other processes is evaluated over blocks of rounds. As long as there is patience, a
    block in which they used more than `QUIET` cores is discarded and repeated.

    Args:
        runs: by name, a function that measures one call of an implementation, in seconds.
        rounds: number of rounds.
        patience: seconds that may be spent on discarded rounds.

    Returns:
        the rounds, and the remaining patience.
    """
    kept = Rounds({name: [] for name in runs})
    order = list(runs)
    while (missing := rounds - len(kept.times[order[0]])) > 0:
        block: dict[str, list[float]] = {name: [] for name in runs}
        share, start = others_share(), time.perf_counter()
        count = 0
        while count < missing and (count == 0 or time.perf_counter() - start < _BLOCK):
            for name in order:
                block[name].append(runs[name]())
            order.reverse()
            count += 1
        time.sleep(max(0.0, _WATCHED - (time.perf_counter() - start)))
        busy, took = share(), time.perf_counter() - start
        if busy > QUIET and patience > 0:
            patience -= took
            kept.thrown += count
            continue
        for name, taken in block.items():
            kept.times[name] += taken
        kept.others = (kept.others * kept._watched + busy * took) / (kept._watched + took)
        kept._watched += took
    return kept, patience


def event_times(call: Call, device: torch.device, count: int) -> list[float]:
    """Time of each of `count` calls on the current stream of a CUDA device, in seconds.

    As in `triton.testing.do_bench`, all calls are queued; before each one a large buffer is
    overwritten, so that the L2 cache is cold; and events are read at the end. A call that
    synchronises waits for the queue, so its time includes host time.
    """
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    torch.cuda.synchronize(device)
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]


def device_time(call: Call, about: float = 0.0) -> float:
    """Time of one call on the device of this run, in seconds.

    On CUDA the median of several queued calls; on the CPU by the wall clock.

    Args:
        call: the call to time.
        about: estimate of its time in seconds, which determines how many calls are queued on CUDA
            or repeated on the CPU.
    """
    if clock.device.type != "cuda":
        return wall_time(call, _count(about))
    return statistics.median(event_times(call, clock.device, _count(about)))


def cost(about: float) -> float:
    """Time that `device_time` needs for a call that takes `about` seconds."""
    if clock.device.type != "cuda":
        return about * _count(about)
    return _count(about) * (about + _FLUSH_SECONDS)


def _count(about: float) -> int:
    """Number of calls in one measurement."""
    if clock.device.type != "cuda":
        return max(1, int(_SHORTEST / about)) if about else 1
    return max(1, min(_QUEUED, int(_QUEUE_SECONDS / about))) if about else _QUEUED


def wall_time(call: Call, repeat: int = 1) -> float:
    """Time of one call by the wall clock in seconds, as the mean of `repeat` calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def host_time(call: Call, device: torch.device, count: int = 10) -> float:
    """Time that the host needs to queue one call on a CUDA device, in seconds.

    The minimum of three measurements of `count` calls, each starting with an empty queue. A call
    that synchronises also waits for the device.
    """
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize(device)
        best = min(best, wall_time(call, count))
    torch.cuda.synchronize(device)
    return best


def others_share() -> Callable[[], float]:
    """Start measuring the load; the returned function gives the cores that others used since.

    The load is Linux's count of busy time minus that of this process; 0 on other systems.
    """
    if not _STAT.is_file():
        return lambda: 0.0

    def busy() -> float:
        user, nice, system, _, _, irq, softirq, steal = map(
            int, _STAT.read_text().split("\n", 1)[0].split()[1:9]
        )
        own = os.times()
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system

    start, before = time.perf_counter(), busy()
    return lambda: max(0.0, (busy() - before) / (time.perf_counter() - start))


def warm_up(call: Call) -> float:
    """Warm up `call`; return an estimate of its time in seconds."""
    for _ in range(_WARM_UP - 1):
        if _blocking_time(call) > _SLOW:
            break
    return _blocking_time(call)


def _blocking_time(call: Call) -> float:
    """Time of one call by the wall clock until the device has finished, in seconds."""
    if clock.device.type != "cuda":
        return wall_time(call)
    torch.cuda.synchronize(clock.device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(clock.device)
    return time.perf_counter() - start


def as_graph(call: Call, device: torch.device) -> Call:
    """Capture `call` as a CUDA graph; the returned call replays it on the same inputs."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
