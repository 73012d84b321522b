"""`segkernels bench`: arguments passed to pytest, reports, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_runs import case, write
from typer.testing import CliRunner

from segkernels.cli import app
from segkernels.cli import bench as bench_command

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ["--folder", str(ROOT / "benchmarks")]


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def pytest_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Arguments of each call of pytest.main, which is mocked."""
    calls: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(pytest, "main", main)
    return calls


def test_options_reach_pytest(pytest_calls: list[list[str]], tmp_path: Path) -> None:
    ran = bench(*FOLDER, "--quick", "--device", "cpu", "--op", "unpool2d", "--op", "max_pool2d")
    assert ran.exit_code == 0, ran.output
    (arguments,) = pytest_calls
    names = [Path(argument).name for argument in arguments if argument.endswith(".py")]
    assert names == ["bench_unpool2d.py", "bench_max_pool2d.py"]
    assert "--benchmark-only" in arguments
    assert "--quick" in arguments
    assert arguments[arguments.index("--device") + 1] == "cpu"

    bench(*FOLDER, "--full", "--json", str(tmp_path / "x.json"))
    assert "--full" in pytest_calls[1]
    assert f"--benchmark-json={tmp_path / 'x.json'}" in pytest_calls[1]
    assert str(ROOT / "benchmarks") in pytest_calls[1]

    bench(*FOLDER)
    assert not {"--quick", "--full"} & set(pytest_calls[2])


def test_report_from_json(pytest_calls: list[list[str]], tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", case("a", 1.0, {"torch": 2.0}))
    ran = bench(*FOLDER, "--json", str(path), "--report", str(tmp_path / "out"))
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "out" / "report.html").is_file()
    assert str(tmp_path / "out" / "report.md") in ran.output


def test_compare_two_runs(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", case("x", 1.0))
    b = write(tmp_path / "b.json", case("x", 2.0))
    worse = bench(*FOLDER, "--compare", str(a), str(b))
    assert worse.exit_code == 1
    assert "1 slower" in worse.output
    assert bench(*FOLDER, "--compare", str(a), str(a)).exit_code == 0
    assert bench(*FOLDER, "--compare", str(a), str(tmp_path / "none")).exit_code == 2


def test_benchmarks_are_found_beside_the_package_or_in_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_command, "__file__", str(ROOT / "segkernels" / "cli" / "bench.py"))
    assert bench_command.find_benchmarks(None) == ROOT / "benchmarks"
    monkeypatch.setattr(
        bench_command, "__file__", str(tmp_path / "site" / "segkernels" / "cli" / "bench.py")
    )
    monkeypatch.chdir(ROOT)
    assert bench_command.find_benchmarks(None) == ROOT / "benchmarks"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*FOLDER, "--op", "pool"], "no benchmarks of pool; there are aspp, dense_crf, "),
        ([*FOLDER, "--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
        ([*FOLDER, "--report", "x"], "--report needs --json"),
        (["--folder", "nowhere"], "no benchmarks in nowhere. They are not part of the installed"),
    ],
)
def test_invalid_options(pytest_calls: list[list[str]], arguments: list[str], said: str) -> None:
    ran = bench(*arguments)
    assert ran.exit_code == 2
    assert said in ran.output
    assert pytest_calls == []


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_command, "_NEEDED", ("pytest", "no_such_package"))
    ran = bench(*FOLDER)
    assert ran.exit_code == 2
    assert 'no_such_package not installed; pip install "segkernels[bench]"' in ran.output


def test_command_does_not_import_heavy_packages() -> None:
    source = Path(bench_command.__file__).read_text()
    top = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not any(name in line for line in top for name in ("pytest", "matplotlib"))
