"""One case: ours by pytest-benchmark, the peers between its rounds, and a row for the report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peers import Peer
from pytest_benchmark.fixture import BenchmarkFixture
from timing import clock, copy_bandwidth, device_time, wall_time, warm_up

_BUDGET = 15.0  # seconds that the rounds of a case may take
_ROUNDS = (3, 30)


@dataclass
class Row:
    """What was measured of a case."""

    case: str
    seconds: float
    peers: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    checked: str = ""
    floor: float | None = None
    peak: int | None = None


rows: list[Row] = []
_bandwidth: dict[torch.device, float] = {}


def measure(
    benchmark: BenchmarkFixture,
    case: str,
    call: Callable[[], Any],
    *,
    checked: str,
    peers: Sequence[Peer] = (),
    moved: int = 0,
    peak: Callable[[], int | None] | None = None,
    **facts: Any,
) -> None:
    """Times `call` and, before each of its rounds, each peer once.

    Args:
        benchmark: pytest-benchmark's fixture; `extra_info` gets everything below.
        case: the name in the report.
        call: what is timed on `clock.device`.
        checked: what the result was held against.
        peers: others that do the same, by the wall clock unless they run on the device.
        moved: bytes that must be read and written; with the copy rate of a CUDA device measured in
            this run they give the floor.
        peak: tells the peak memory beyond the inputs.
        facts: more for `extra_info`.
    """
    there = [peer for peer in peers if peer.run is not None]
    for run in (call, *(peer.run for peer in there if peer.on_device and peer.run)):
        warm_up(run)
    once = wall_time(call) + sum(wall_time(peer.run) for peer in there if peer.run)
    least, most = _ROUNDS
    times: dict[str, list[float]] = {peer.name: [] for peer in there}

    def run_peers() -> None:
        for peer in there:
            assert peer.run is not None
            times[peer.name].append(
                device_time(peer.run) if peer.on_device else wall_time(peer.run)
            )

    rounds = min(most, max(least, int(_BUDGET / once)))
    benchmark.pedantic(clock.run, args=(call,), setup=run_peers, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable: run, not timed
        return
    row = Row(
        case,
        benchmark.stats.stats.median,
        {name: statistics.median(t) for name, t in times.items()},
        {peer.name: peer.missing for peer in peers if peer.run is None},
        checked,
        moved / bandwidth() if moved and clock.device.type == "cuda" else None,
        peak() if peak is not None else None,
    )
    rows.append(row)
    benchmark.extra_info.update(
        device=device_name(),
        threads=torch.get_num_threads() if clock.device.type == "cpu" else None,
        checked_against=checked,
        peers_ms={name: 1e3 * t for name, t in row.peers.items()},
        peers_ran_on={peer.name: peer.where for peer in there},
        peers_missing=row.missing,
        ratio={name: t / row.seconds for name, t in row.peers.items()},
        floor_ms=None if row.floor is None else 1e3 * row.floor,
        share_of_floor=None if row.floor is None else row.floor / row.seconds,
        peak_bytes=row.peak,
        **facts,
    )


def bandwidth() -> float:
    """The copy rate of the device of this run, measured once."""
    if clock.device not in _bandwidth:
        _bandwidth[clock.device] = copy_bandwidth(clock.device)
    return _bandwidth[clock.device]


def device_name() -> str:
    """The device of this run, in words."""
    if clock.device.type == "cuda":
        return torch.cuda.get_device_name(clock.device)
    return f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's number of CPU threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
