"""Clocks of the benchmarks, interleaved rounds, lower bounds (floors) and problem sizes."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import budget
import floors
import measure as measuring
import peers
import pytest
import shapes
import timing
import torch

from segkernels import models
from segkernels.ops import _registry

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "clock", timing.Clock())
    monkeypatch.setattr(floors, "clock", timing.clock)


def quiet(monkeypatch: pytest.MonkeyPatch, shares: Iterator[float]) -> None:
    """Mock the load of other processes: `shares` gives it per block, and a block is one round."""
    monkeypatch.setattr(timing, "_BLOCK", 0.0)
    monkeypatch.setattr(timing, "_WATCHED", 0.0)
    monkeypatch.setattr(timing, "others_share", lambda: lambda: next(shares))


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch, itertools.repeat(0.0))
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    rounds, _ = timing.interleave({n: lambda n=n: run(n) for n in "abc"}, 3)
    assert "".join(order) == "abccbaabc"
    assert rounds.times == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}
    assert rounds.thrown == 0


def test_busy_rounds_are_repeated_within_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quiet(monkeypatch, iter([0.0, 0.5, 0.05, 0.9, 0.0]))
    counter = itertools.count()
    rounds, patience = timing.interleave({"a": lambda: float(next(counter))}, 3, patience=10.0)
    assert rounds.times == {"a": [0, 2, 4]}
    assert rounds.thrown == 2
    assert rounds.others < timing.QUIET
    assert 9 < patience < 10

    quiet(monkeypatch, iter([0.5, 0.5]))
    rounds, _ = timing.interleave({"a": lambda: 1.0}, 2)
    assert rounds.times == {"a": [1, 1]}
    assert rounds.thrown == 0
    assert rounds.others == pytest.approx(0.5)


def test_load_is_measured_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[float] = []

    def watch() -> Callable[[], float]:
        start = time.perf_counter()
        return lambda: watched.append(time.perf_counter() - start) or 0.0

    monkeypatch.setattr(timing, "others_share", watch)
    timing.interleave({"a": lambda: 1e-6}, 3)
    assert len(watched) == 1  # three rounds are one block
    assert watched[0] >= 0.2


def test_load_of_others_excludes_our_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat, now, own = tmp_path / "stat", [100.0], [0.0]
    monkeypatch.setattr(timing, "_STAT", stat)
    monkeypatch.setattr(timing.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(timing.os, "times", lambda: type("T", (), {"user": own[0], "system": 0.0}))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    stat.write_text("cpu  1000 0 500 9999 50 0 0 0 0 0\ncpu0 1 2 3\n")
    share = timing.others_share()
    # Over two seconds: 1.5 s of user and 0.3 s of system time in all, of which 0.8 s are our own.
    now[0], own[0] = 102.0, 0.8
    stat.write_text("cpu  1150 0 530 9999 90 0 0 0 0 0\n")
    assert share() == pytest.approx((1.5 + 0.3 - 0.8) / 2)


def test_events_surround_calls_after_a_cache_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.at = len(log)

        def elapsed_time(self, end: Event) -> float:
            log.append("read")
            return float(end.at - self.at)

    class Flush:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(timing.torch, "empty", lambda *_, **__: Flush())
    device = torch.device("cuda", 0)
    found = timing.event_times(lambda: log.append("call"), device, 2)
    one = ["flush", "record", "call", "record"]
    assert log == ["wait", *one, *one, "wait", "read", "read"]
    assert found == [2e-3, 2e-3]  # events count milliseconds

    timing.clock.device = device
    log.clear()
    assert timing.device_time(lambda: log.append("call"), about=1.0) == 2e-3
    assert log.count("call") == 1  # long calls are not queued ten at once
    log.clear()
    timing.device_time(lambda: log.append("call"), about=1e-5)
    assert log.count("call") == 10


def test_wall_clock_repeats_short_calls() -> None:
    best = min(timing.device_time(lambda: time.sleep(0.02)) for _ in range(5))
    assert 0.02 <= best < 0.03
    calls = []
    timing.device_time(lambda: calls.append(1), about=1e-5)
    assert len(calls) == 20
    assert timing.cost(1e-5) == pytest.approx(2e-4)
    assert timing.cost(1.0) == 1.0


def test_budget_gives_the_number_of_rounds() -> None:
    limits = budget.Budget()
    limits.choose(quick=True, cuda=False, patience=0)
    least, most = limits.rounds
    assert limits.count(1e-6) == most
    assert limits.count(limits.seconds) == least
    assert limits.count(limits.seconds / (least + 2)) == least + 2


def test_late_run_gets_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    limits = budget.Budget()
    limits.choose(quick=False, cuda=True, patience=0)
    assert limits.limit < 8 * 60
    limits.start()
    usual = limits.count(1e-3)
    now[0] = 0.5 * limits.limit
    limits.reached(0.5)
    assert limits.count(1e-3) == usual
    now[0] += 60
    limits.reached(0.5)
    assert limits.count(1e-3) == 3 < usual
    limits.reached(0.9)
    assert limits.count(1e-3) == usual
    assert limits.count(10.0) == 3  # long rounds are always few


def test_floor_is_the_larger_of_bytes_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "copy_rate", lambda device, moved: 1e9)
    monkeypatch.setattr(floors, "matmul_rate", lambda device, dtype: {"bfloat16": 1e12}[dtype])
    assert floors.floor() is None
    assert floors.floor(moved=10**6) == floors.Floor(1e-3, "bytes")
    assert floors.floor(10**6, 10**10, "bfloat16") == floors.Floor(1e-2, "flops")
    assert floors.floor(10**8, 10**10, "bfloat16") == floors.Floor(1e-1, "bytes")


def test_rates_are_measured_once_per_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_copies", {})
    monkeypatch.setattr(floors, "_matmuls", {})
    cpu = torch.device("cpu")
    rate = floors.copy_rate(cpu, 3 * 2**20)
    assert 1e8 < rate < 1e13
    assert floors.copy_rate(cpu, 4 * 2**20) == rate
    assert floors.matmul_rate(cpu, "float32") > 1e8
    assert sorted(floors.measured()) == ["copy of 4 MiB, GB/s", "matmul float32, TFLOP/s"]


def test_useful_flops_are_those_inside_the_image() -> None:
    for height, width, kernel, dilation in ((5, 7, 3, 1), (5, 7, 3, 4), (9, 4, 3, 6), (6, 6, 1, 1)):
        shape = shapes.ConvShape(2, 3, 4, height, width, dilation, "", kernel)
        ones = torch.ones(1, 1, height, width, dtype=torch.float64)
        window = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
        taps = torch.nn.functional.conv2d(ones, window, padding=shape.padding, dilation=dilation)
        assert taps.shape == ones.shape
        assert shape.useful_flops() == 2 * 2 * 3 * 4 * int(taps.sum())


@pytest.mark.parametrize("cuda", [False, True])
def test_every_shape_has_a_source_and_a_unique_name(cuda: bool) -> None:
    tables = [list(shapes.of_kinds(t, cuda)) for t in (shapes.POOL, shapes.UPSAMPLE, shapes.TAIL)]
    tables.append(list(shapes.convs(cuda)))
    laid = [shape for table in tables for shape in table]
    for group in (laid, shapes.CRF + shapes.CRF_BATCHED, shapes.FILTER):
        assert all(shape.source for shape in group)
    for found in tables:
        assert len({shape.name for shape in found}) == len(found)
        assert any(shape.quick for shape in found)
        assert {shape.kind.dtype for shape in found} == {"float32", "bfloat16", "float16"}
        assert {shape.kind.layout for shape in found} == {"NCHW", "NHWC"}
    if cuda:
        assert {shape.batch for shape in laid} >= {1, 8}


def test_models_accept_their_benchmark_sizes() -> None:
    for shape in shapes.model_shapes(cuda=True):
        model = models.create_model(shape.model, shape.classes, shape.channels, width=0.0625)
        model.eval().check_input(
            torch.empty(shape.batch, shape.channels, shape.height, shape.columns, device="meta")
        )


@pytest.mark.slow
def test_every_operator_has_cases_in_quick_mode() -> None:
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "--collect-only", "-q"]
    done = subprocess.run(
        [*command, "--quick", "--device", "cpu"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {
        Path(line.partition("::")[0]).stem for line in done.stdout.splitlines() if "::" in line
    }
    assert files >= {f"bench_{op.name}" for op in _registry.ops()}


@pytest.mark.huge
@pytest.mark.gpu
@pytest.mark.parametrize("what", ["copy", "matmul", "small"])
def test_times_agree_with_triton(what: str) -> None:
    from triton.testing import do_bench

    device = torch.device("cuda", torch.cuda.current_device())
    timing.clock.device = device
    x = torch.randn(2**26 if what == "copy" else 2**23, device=device)
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    call = {
        "copy": lambda: x.clone(),
        "matmul": lambda: a @ a,
        "small": lambda: x.add_(1),
    }[what]
    theirs = do_bench(call, warmup=100, rep=300, return_mode="median") / 1e3
    ours = statistics.median(timing.device_time(call) for _ in range(21))
    assert ours == pytest.approx(theirs, rel=0.05, abs=2e-6)  # events have a resolution of 0.5 us


@pytest.mark.slow
def test_json_times_equal_the_measured_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`timing.Clock` passes the measured times to pytest-benchmark unchanged."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # a worker would not take times
    bench = tmp_path / "bench_sleep.py"
    bench.write_text(
        "import time\nimport pytest\nfrom measure import measure\nfrom peers import eager\n"
        "from timing import clock\n"
        "pytestmark = pytest.mark.benchmark(timer=clock)\n"
        "def test_sleep(benchmark):\n"
        "    measure(benchmark, 'sleep', lambda: time.sleep(0.01), checked='nothing',\n"
        "            moved=8 * 2**20, peers=[eager(lambda: time.sleep(0.02))], source='here')\n"
    )
    for name in ("conftest.py",):
        text = (ROOT / "benchmarks" / name).read_text()
        here = repr(str(ROOT / "benchmarks"))
        (tmp_path / name).write_text(text.replace("str(Path(__file__).resolve().parent)", here))
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", str(bench), "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, "--benchmark-only", f"--benchmark-json={path}", "--quick", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads(path.read_text())["benchmarks"]
    info = entry["extra_info"]
    assert entry["stats"]["median"] == pytest.approx(info["times_ms"]["segkernels"][1] / 1e3)
    assert entry["stats"]["min"] >= 0.01
    assert 1.2 < info["ratio"]["torch"] < 3
    assert info["share_of_floor"] == pytest.approx(
        info["floor_ms"] / info["times_ms"]["segkernels"][1]
    )
    assert "sleep" in done.stdout


class Fixture:
    """Mock of pytest-benchmark's fixture: reads the clock around each round."""

    def __init__(self) -> None:
        self.stats = None
        self.extra_info: dict[str, Any] = {}
        self.rounds: list[float] = []

    def pedantic(self, run: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            start = timing.clock()
            run()
            self.rounds.append(timing.clock() - start)
        self.stats = object()


def test_cuda_case_records_host_graph_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure` with torch.cuda mocked.

    Our call takes 5 ms on the host and 1 ms on the device (2 ms as a graph); the peer's takes
    0.1 ms on the host and 2 ms on the device.
    """
    device = torch.device("cuda", 0)
    timing.clock.device = device
    monkeypatch.setattr(measuring, "clock", timing.clock)
    monkeypatch.setattr(measuring, "rows", [])
    monkeypatch.setattr(measuring.budget, "rounds", (3, 3))
    monkeypatch.setattr(measuring, "floor", lambda *_: floors.Floor(5e-4, "bytes"))
    monkeypatch.setattr(measuring, "host_time", lambda call, _: {ours: 5e-3, theirs: 1e-4}[call])
    monkeypatch.setattr(
        timing, "event_times", lambda call, _, count: [{ours: 1e-3, theirs: 2e-3}[call]] * count
    )
    monkeypatch.setattr(measuring, "as_graph", lambda call, _: theirs if call is ours else ours)
    monkeypatch.setattr(measuring, "cuda_peak", lambda call, _: {ours: 100, theirs: 300}[call])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")

    def ours() -> None: ...
    def theirs() -> None: ...

    fixture = Fixture()
    measuring.measure(
        fixture,  # type: ignore[arg-type]
        "case",
        ours,
        checked="torch",
        peers=[peers.eager(theirs), peers.Peer("gone", "here", missing="why")],
        source="here",
    )
    assert fixture.rounds == pytest.approx([1e-3] * 3)
    info = fixture.extra_info
    assert info["times_ms"]["torch"] == pytest.approx([2.0, 2.0, 2.0])
    assert info["ratio"] == pytest.approx({"torch": 2.0})
    assert info["share_of_floor"] == pytest.approx(0.5)
    assert info["host_us"] == pytest.approx({"segkernels": 5000, "torch": 100})
    assert info["graph_ms"] == pytest.approx({"segkernels": 2.0})  # only ours is host-bound
    assert info["peak_bytes"] == {"segkernels": 100, "torch": 300}
    assert info["peers_missing"] == {"gone": "why"}
    assert measuring.rows[0].peak == 100


def test_failed_graph_capture_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted\nwhen capturing")

    timing.clock.device = torch.device("cuda", 0)
    monkeypatch.setattr(measuring, "clock", timing.clock)
    monkeypatch.setattr(measuring, "host_time", lambda *_: 1.0)
    monkeypatch.setattr(measuring, "as_graph", refuse)
    noted = measuring._host_times({"segkernels": lambda: None}, {"segkernels": 1e-3})
    assert noted["graph_ms"] == {"segkernels": "operation not permitted"}


@pytest.mark.slow
def test_cuda_cases_are_collected_without_a_gpu() -> None:
    """Every case of a CUDA run can be collected without a GPU, and their number is limited."""
    code = (
        "import sys, torch, pytest\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.current_device = lambda: 0\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    options = ["--collect-only", "-q", "--device", "cuda"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "benchmarks"), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [line for line in done.stdout.splitlines() if "::" in line]
    files = {Path(line.partition("::")[0]).stem for line in cases}
    assert files >= {f"bench_{op.name}" for op in _registry.ops()}
    assert 300 < len(cases) < 1000
    assert all(f"bfloat16-{layout}" in done.stdout for layout in ("NHWC", "NCHW"))
