"""Clocks. On the CPU the wall clock; on CUDA events around each call, with a cold L2 cache."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

_QUEUED = 10  # calls between two synchronisations, so that launches are not waited for
_WARM_UP = 3
_STAT = Path("/proc/stat")
_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


class Clock:
    """The timer that pytest-benchmark reads, in seconds, for the device of this run.

    On the CPU it is `time.perf_counter`. On CUDA it stands still but for `run`, which puts it
    forward by the time that one call takes on the device.
    """

    __name__ = "timing.clock"  # what pytest-benchmark writes of a timer

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._now = 0.0

    def __call__(self) -> float:
        return self._now if self.device.type == "cuda" else time.perf_counter()

    def run(self, call: Call) -> Any:
        """What is to be timed: `call` once on the CPU, the median of several queued on CUDA."""
        if self.device.type != "cuda":
            return call()
        self._now += statistics.median(event_times(call, self.device, _QUEUED))
        return None


clock = Clock()


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


def device_time(call: Call) -> float:
    """Seconds of one call on the device of this run, as `clock` takes ours."""
    if clock.device.type != "cuda":
        return wall_time(call)
    return statistics.median(event_times(call, clock.device, _QUEUED))


def wall_time(call: Call) -> float:
    """Seconds of one call by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


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
    return lambda: (busy() - before) / (time.perf_counter() - start)


def warm_up(call: Call) -> None:
    """Run `call` until nothing is done for the first time."""
    for _ in range(_WARM_UP):
        call()


def as_graph(call: Call, device: torch.device) -> Call:
    """`call` captured as a CUDA graph; calling the result replays it on the same inputs."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        warm_up(call)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a CUDA device copies, read and written ones counted."""
    source = torch.empty(2**28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copies = event_times(lambda: target.copy_(source), device, 20)
    return 2 * source.numel() * source.element_size() / statistics.median(copies)
