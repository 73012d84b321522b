"""Clocks. On the CPU the wall clock; on CUDA events around each call, with a cold L2 cache."""

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

_QUEUED = 10  # calls between two synchronisations, so that launches are not waited for
_QUEUE_SECONDS = 0.02  # unless they take longer than this together
_WARM_UP = 3
_SLOW = 1.0  # seconds: a call that takes longer is warm after one
_STAT = Path("/proc/stat")
_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
_FLUSH_SECONDS = 2e-4  # about what overwriting that takes, and queueing it
_SHORTEST = 2e-4  # seconds: faster calls are repeated within one reading of the wall clock
_BLOCK = 0.5  # seconds: the counts of busy time are in hundredths,
_WATCHED = 0.2  # and over less than this they tell nothing
#: Cores that other processes may use while times are taken that are to be published.
QUIET = 0.1


class Clock:
    """The timer that pytest-benchmark reads, in seconds.

    It stands still but for `forward`: a round's time is taken by `device_time`, among the peers'
    times, and then handed to pytest-benchmark.
    """

    __name__ = "timing.clock"  # what pytest-benchmark writes of a timer

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def forward(self, seconds: float) -> None:
        """Let that much time pass."""
        self._now += seconds


clock = Clock()


@dataclass
class Rounds:
    """Times in which every implementation ran once a round.

    Attributes:
        times: seconds of each kept round, by name.
        others: cores that other processes used meanwhile.
        thrown: rounds that were not kept, because others used more than `QUIET` cores.
    """

    times: dict[str, list[float]]
    others: float = 0.0
    thrown: int = 0
    _watched: float = field(default=0.0, repr=False)


def interleave(
    runs: Mapping[str, Callable[[], float]], rounds: int, patience: float = 0.0
) -> tuple[Rounds, float]:
    """Takes `rounds` times of each of `runs`, in turns, the order turned round each time.

    What other processes used is judged over blocks of rounds of half a second at least. While
    there is patience, a block in which they used more than `QUIET` cores is taken again.

    Args:
        runs: by name, what takes one time of an implementation, in seconds.
        rounds: how many of each.
        patience: seconds that may be spent on rounds that are thrown away.

    Returns:
        The rounds, and the patience that is left.
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
    """Seconds of each of `count` calls on the current stream of a CUDA device.

    As in `triton.testing.do_bench`: all calls are queued, a large buffer is overwritten before each
    one, so that it finds none of its data in the L2 cache, and nothing is read before the end. A
    call that synchronises waits for the queue, and its time then includes that of the host.
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
    """Seconds of one call on the device of this run.

    On CUDA the median of several that are queued, on the CPU by the wall clock.

    Args:
        call: what is timed.
        about: about how long it takes, by which long calls are queued fewer at a time, and short
            ones on the CPU repeated.
    """
    if clock.device.type != "cuda":
        return wall_time(call, _count(about))
    return statistics.median(event_times(call, clock.device, _count(about)))


def cost(about: float) -> float:
    """What `device_time` takes, of a call that takes about so long."""
    if clock.device.type != "cuda":
        return about * _count(about)
    return _count(about) * (about + _FLUSH_SECONDS)


def _count(about: float) -> int:
    """Calls within one reading of the clock."""
    if clock.device.type != "cuda":
        return max(1, int(_SHORTEST / about)) if about else 1
    return max(1, min(_QUEUED, int(_QUEUE_SECONDS / about))) if about else _QUEUED


def wall_time(call: Call, repeat: int = 1) -> float:
    """Seconds of one call by the wall clock, the mean of `repeat` in a row."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def host_time(call: Call, device: torch.device, count: int = 10) -> float:
    """Seconds that the host is busy with one call: the time to queue it on a CUDA device.

    The best of three times `count` calls, nothing else in the queue. A call that synchronises also
    waits for the device.
    """
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize(device)
        best = min(best, wall_time(call, count))
    torch.cuda.synchronize(device)
    return best


def others_share() -> Callable[[], float]:
    """Starts to watch the machine; the function returned tells how many cores others used since.

    From Linux's count of busy time, less this process's own; 0 elsewhere.
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
    """Run `call` until nothing is done for the first time; about how long it takes then."""
    for _ in range(_WARM_UP - 1):
        if _finished(call) > _SLOW:
            break
    return _finished(call)


def _finished(call: Call) -> float:
    """Seconds of one call by the wall clock until the device has done it."""
    if clock.device.type != "cuda":
        return wall_time(call)
    torch.cuda.synchronize(clock.device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(clock.device)
    return time.perf_counter() - start


def as_graph(call: Call, device: torch.device) -> Call:
    """`call` captured as a CUDA graph; calling the result replays it on the same inputs."""
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
