"""One case: ours and its peers in turns, and what pytest-benchmark's JSON keeps of it."""

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
# The host takes this share of a call's time or more: then the device waits for it.
_HOST_BOUND = 0.8


@dataclass
class Row:
    """What was measured of a case."""

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
    """Times `call` and its peers, each once a round.

    On CUDA the host's time to queue a call is taken too, and where the host is the slower one, the
    time as a CUDA graph; ours and that of peers on the device.

    Args:
        benchmark: pytest-benchmark's fixture; `extra_info` gets everything below.
        case: the name in the report.
        call: what is timed on `clock.device`.
        checked: what the result was held against.
        peers: others that do the same, by the wall clock unless they run on the device.
        moved: bytes that must be read and written; over the copy rate measured in this run.
        flops: FLOPs that must be done; over the matmul rate of `flops_dtype` measured in this run.
        flops_dtype: "float32", "tf32", "bfloat16" or "float16".
        peak: tells the peak memory beyond the inputs; on CUDA it is taken from `call` without.
        weight: by how much more time than others the rounds of this case may take.
        facts: more for `extra_info`.
    """
    there = {peer.name: peer for peer in peers if peer.run is not None}
    calls: dict[str, Call] = {OURS: call}
    calls |= {name: peer.run for name, peer in there.items() if peer.run is not None}
    about = {
        name: warm_up(run) if name == OURS or there[name].on_device else wall_time(run)
        for name, run in calls.items()
    }

    slow = [name for name in there if about[name] > budget.slow]
    every_round = [name for name in calls if name not in slow]

    def timed(name: str) -> Callable[[], float]:
        run = calls[name]
        if name == OURS or there[name].on_device:
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
    benchmark.pedantic(lambda: clock.forward(next(replayed)), rounds=len(ours))
    if benchmark.stats is None:  # --benchmark-disable: run, not timed
        return

    medians = {name: statistics.median(times) for name, times in rounds.times.items()}
    on_device = {name: run for name, run in calls.items() if name == OURS or there[name].on_device}
    row = Row(
        case,
        medians[OURS],
        {name: medians[name] for name in there},
        {peer.name: peer.missing for peer in peers if peer.run is None},
        checked,
        floor(moved, flops, flops_dtype),
    )
    peaks: dict[str, int] = {}
    if clock.device.type == "cuda":
        peaks = {name: cuda_peak(run, clock.device) for name, run in on_device.items()}
    elif peak is not None and (own := peak()) is not None:
        peaks = {OURS: own}
    for name, peer in there.items():
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
        times_ms={name: _spread(times) for name, times in rounds.times.items()},
        others_cores=rounds.others,
        rounds_thrown=rounds.thrown,
        peers_on_device=[name for name, peer in there.items() if peer.on_device],
        peers_ran_on={name: peer.where for name, peer in there.items()},
        peers_notes={name: peer.note for name, peer in there.items() if peer.note},
        peers_missing=row.missing,
        ratio={name: t / row.seconds for name, t in row.peers.items()},
        floor_ms=None if row.floor is None else 1e3 * row.floor.seconds,
        floor_by=None if row.floor is None else row.floor.by,
        share_of_floor=None if row.floor is None else row.floor.seconds / row.seconds,
        peak_bytes=peaks,
        **_queueing(on_device, medians),
        **facts,
    )


def _spread(times: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile, in milliseconds."""
    quartiles = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    )
    return [1e3 * t for t in quartiles]


def _queueing(calls: dict[str, Call], medians: dict[str, float]) -> dict[str, Any]:
    """The host's time a call, and as a graph where that is what limits it; CUDA only."""
    if clock.device.type != "cuda":
        return {}
    host = {name: host_time(call, clock.device) for name, call in calls.items()}
    graphs: dict[str, Any] = {}
    for name, call in calls.items():
        if host[name] < _HOST_BOUND * medians[name]:
            continue
        try:
            graphs[name] = 1e3 * device_time(as_graph(call, clock.device))
        except RuntimeError as error:  # it synchronises, or allocates, or runs on the host
            graphs[name] = str(error).split("\n", 1)[0]
    return {
        "host_us": {name: 1e6 * seconds for name, seconds in host.items()},
        "graph_ms": graphs,
    }


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
