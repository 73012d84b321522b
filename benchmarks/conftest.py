"""Collects bench_*.py, chooses the device, and prints what pytest-benchmark's own table has not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# pytest imports with --import-mode=importlib, which leaves this folder off the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
import report
from timing import clock


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="what the benchmarks run on; auto: CUDA where there is a device",
    )


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--device")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    clock.device = (
        torch.device("cuda", torch.cuda.current_device())
        if wanted == "cuda"
        else torch.device("cpu")
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # then pytest collects it itself
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture
def device() -> torch.device:
    return clock.device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if measure.rows:
        terminalreporter.section(f"segkernels on {measure.device_name()}: medians")
        terminalreporter.write_line(report.summary(measure.rows))
