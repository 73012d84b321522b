"""Collects bench_*.py, chooses device and mode, and extends pytest-benchmark's JSON and output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# pytest's --import-mode=importlib does not put this folder on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import floors
import measure
import setting
import summary
from budget import budget
from timing import clock


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("segkernels benchmarks")
    group.addoption(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="device of the benchmarks; auto: CUDA if available",
    )
    group.addoption(
        "--quick",
        action="store_true",
        default=None,
        dest="quick",
        help="fewer and smaller cases, fewer rounds (default on a CPU)",
    )
    group.addoption(
        "--full",
        action="store_false",
        default=None,
        dest="quick",
        help="all cases at the papers' sizes (default on a GPU)",
    )
    group.addoption(
        "--patience",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="total time to spend on repeating rounds in which other processes used more than "
        "0.1 cores",
    )


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--device")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    cuda = wanted == "cuda"
    clock.device = (
        torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    )
    quick = config.getoption("quick")
    budget.choose(not cuda if quick is None else quick, cuda, config.getoption("--patience"))
    if cuda:
        torch.backends.cudnn.benchmark = True  # as users with fixed sizes set it


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # pytest itself collects files named as arguments
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not budget.quick:
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_collection_finish(session: pytest.Session) -> None:
    budget.start()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    items = item.session.items
    budget.reached(items.index(item) / len(items))


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    output_json["segkernels"] = {
        **setting.collect(clock.device, budget.quick),
        "date": output_json["datetime"],
        "rates": floors.measured(),
    }


@pytest.fixture
def device() -> torch.device:
    return clock.device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if measure.rows:
        mode = "quick" if budget.quick else "full"
        terminalreporter.section(f"segkernels on {measure.device_name()}, {mode} mode: medians")
        terminalreporter.write_line(summary.summary(measure.rows))
