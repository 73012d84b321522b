"""Times one case against its peers, and records the figures in pytest-benchmark's JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from budget import budget
from floors import Floor, floor
from memory import cuda_peak
from peers import Peer
from pytest_benchmark.fixture import BenchmarkFixture
from timing import (
    Call,
    as_graph,
    clock,
    cost,
    device_time,
    host_time,
    interleave,
    wall_time,
    warm_up,
)

OURS = "segkernels"
# If the host needs at least this share of a call's time, the device waits for the host.
_HOST_BOUND = 0.8


@dataclass
class Row:
    """The measurements of a case, for the table at the end of a run."""

    case: str
    seconds: float
    peers: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    checked: str = ""
    floor: Floor | None = None
    peak: int | None = None


rows: list[Row] = []


def measure(
    benchmark: BenchmarkFixture,
    case: str,
    call: Callable[[], Any],
    *,
    checked: str,
    peers: Sequence[Peer] = (),
    moved: int = 0,
    flops: int = 0,
    flops_dtype: str = "float32",
    peak: Callable[[], int | None] | None = None,
    weight: float = 1.0,
    **facts: Any,
) -> None:
    """Time `call` and its peers, each once per round.

    On CUDA, for `call` and for peers on the device, the host time to queue a call is measured too
    and, where the host limits the call, the time as a CUDA graph.

    Args:
        benchmark: pytest-benchmark's fixture; all results are stored in its `extra_info`.
        case: name of the case in the report.
        call: the call to time on `clock.device`.
        checked: what the result was checked against.
        peers: other implementations; timed by the wall clock unless they run on the device.
        moved: bytes that must be read and written, for the floor at the measured copy rate.
        flops: necessary FLOPs, for the floor at the measured matmul rate of `flops_dtype`.
        flops_dtype: "float32", "tf32", "bfloat16" or "float16".
        peak: returns the peak memory beyond the inputs on the CPU; on CUDA it is measured from
            `call` itself.
        weight: factor on the time that the rounds of this case may take.
        facts: further entries of `extra_info`.
    """
    available = {peer.name: peer for peer in peers if peer.run is not None}
    calls: dict[str, Call] = {OURS: call}
    calls |= {name: peer.run for name, peer in available.items() if peer.run is not None}
    about = {
        name: warm_up(run) if name == OURS or available[name].on_device else wall_time(run)
        for name, run in calls.items()
    }

    slow = [name for name in available if about[name] > budget.slow]
    every_round = [name for name in calls if name not in slow]

    def timed(name: str) -> Callable[[], float]:
        run = calls[name]
        if name == OURS or available[name].on_device:
            return lambda: device_time(run, about[name])
        return lambda: wall_time(run)

    rounds, budget.patience = interleave(
        {name: timed(name) for name in every_round},
        budget.count(sum(cost(about[name]) for name in every_round) / weight),
        budget.patience,
    )
    rounds.times |= {name: [about[name]] for name in slow}
    ours = rounds.times[OURS]
    replayed = iter(ours)
    benchmark.pedantic(lambda: clock.advance(next(replayed)), rounds=len(ours))
    if benchmark.stats is None:  # --benchmark-disable
        return

    medians = {name: statistics.median(times) for name, times in rounds.times.items()}
    on_device = {
        name: run for name, run in calls.items() if name == OURS or available[name].on_device
    }
    row = Row(
        case,
        medians[OURS],
        {name: medians[name] for name in available},
        {peer.name: peer.missing for peer in peers if peer.run is None},
        checked,
        floor(moved, flops, flops_dtype),
    )
    peaks: dict[str, int] = {}
    if clock.device.type == "cuda":
        peaks = {name: cuda_peak(run, clock.device) for name, run in on_device.items()}
    elif peak is not None and (own := peak()) is not None:
        peaks = {OURS: own}
    for name, peer in available.items():
        if clock.device.type != "cuda" and peer.peak is not None:
            found = peer.peak()
            peaks |= {} if found is None else {name: found}
    row.peak = peaks.get(OURS)
    rows.append(row)
    benchmark.extra_info.update(
        case=case,
        device=device_name(),
        threads=torch.get_num_threads() if clock.device.type == "cpu" else None,
        quick=budget.quick,
        checked_against=checked,
        times_ms={name: _quartiles(times) for name, times in rounds.times.items()},
        others_cores=rounds.others,
        rounds_thrown=rounds.thrown,
        peers_on_device=[name for name, peer in available.items() if peer.on_device],
        peers_ran_on={name: peer.where for name, peer in available.items()},
        peers_notes={name: peer.note for name, peer in available.items() if peer.note},
        peers_missing=row.missing,
        ratio={name: t / row.seconds for name, t in row.peers.items()},
        floor_ms=None if row.floor is None else 1e3 * row.floor.seconds,
        floor_by=None if row.floor is None else row.floor.by,
        share_of_floor=None if row.floor is None else row.floor.seconds / row.seconds,
        peak_bytes=peaks,
        **_host_times(on_device, medians),
        **facts,
    )


def _quartiles(times: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile, in milliseconds."""
    quartiles = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    )
    return [1e3 * t for t in quartiles]


def _host_times(calls: dict[str, Call], medians: dict[str, float]) -> dict[str, Any]:
    """On CUDA: host time per call, and the time as a CUDA graph where the host limits the call."""
    if clock.device.type != "cuda":
        return {}
    host = {name: host_time(call, clock.device) for name, call in calls.items()}
    graphs: dict[str, Any] = {}
    for name, call in calls.items():
        if host[name] < _HOST_BOUND * medians[name]:
            continue
        try:
            graphs[name] = 1e3 * device_time(as_graph(call, clock.device))
        except RuntimeError as error:  # the call synchronises or runs on the host
            graphs[name] = str(error).split("\n", 1)[0]
    return {
        "host_us": {name: 1e6 * seconds for name, seconds in host.items()},
        "graph_ms": graphs,
    }


def device_name() -> str:
    """Name of the device of this run."""
    if clock.device.type == "cuda":
        return torch.cuda.get_device_name(clock.device)
    return f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Context that sets torch's number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
