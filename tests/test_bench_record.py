"""Recording of benchmark results, and their tables in README."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import readme
import results
from bench_runs import case, write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def crf(size: list[int], ours: float, peer: float, others: float = 0.0) -> dict[str, Any]:
    height, width, classes, iterations = size
    return case(
        f"dense_crf {height}x{width}x{classes}-{iterations}it",
        ours,
        {"segkernels, 1 thread": 1.5 * ours, "pydensecrf2": peer},
        file="bench_dense_crf.py",
        test="test_dense_crf",
        crf=size,
        others_cores=others,
    )


def several(path: Path, others: float = 0.0) -> Path:
    return write(
        path,
        crf([240, 320, 2, 5], 15.0, 40.05),
        crf([512, 512, 21, 10], 105.0, 609.0, others),
        case("a", 1.0, {"torch": 4.0}, test="test_max_pool2d"),
        case("b", 2.0, {"torch": 2.0}, test="test_max_pool2d"),
        case("c", 1.0, {"torch": 3.0}, test="test_max_pool2d_backward"),
        case(
            "d",
            1.0,
            {"torch": 9.0},
            file="bench_scaling.py",
            curve={"name": "x", "over": "pixels", "x": 4},
        ),
    )


def record(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    page = tmp_path / "README.md"
    if not page.exists():
        page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    where = ["--results", str(tmp_path / "results"), "--readme", str(page)]
    command = [sys.executable, str(ROOT / "benchmarks" / "record.py"), *arguments, *where]
    return subprocess.run(command, capture_output=True, text=True)


def test_readme_has_the_committed_results() -> None:
    """README has exactly the tables of the committed results."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\(benchmarks/results/([\w-]+)/report\.md\)", text))
    assert named == {path.parent.name for path in readme.committed(RESULTS)}
    assert readme.between(text).count("\n") > 5
    if named:
        again = "run python benchmarks/record.py --from benchmarks/results/cpu/results.json"
        assert readme.between(text) == readme.block(RESULTS), again


def test_committed_results_are_complete() -> None:
    """Each results folder has the report of its JSON and the name of its device.

    A folder without a complete run has a README that lists its files.
    """
    for path in readme.committed(RESULTS):
        run = results.load(path)
        assert readme.slug(run) == path.parent.name
        assert run.setting["commit"] not in ("unknown", "")
        assert "node" not in path.read_text()
        page = (path.parent / "report.html").read_text()
        assert all(str(c.name) in page for c in run.cases if "curve" not in c.info)
    whole = {path.parent for path in readme.committed(RESULTS)}
    for folder in set(RESULTS.glob("*")) - whole:
        said = (folder / "README.md").read_text(encoding="utf-8")
        named = set(re.findall(r"^\| `(.*?)`", said, re.M))
        assert named == {path.name for path in folder.glob("*.json")}


def test_tables(tmp_path: Path) -> None:
    run = results.load(several(tmp_path / "run.json"))
    lines = readme.part(run, "cpu").splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    assert rows[0] == [
        "size",
        "classes",
        "iterations",
        "segkernels, 2 threads (ms)",
        "segkernels, 1 thread (ms)",
        "pydensecrf2 (ms)",
        "ratio",
    ]
    assert rows[2] == ["320 x 240", "2", "5", "15", "22.5", "40", "2.7"]
    assert rows[3] == ["512 x 512", "21", "10", "105", "158", "609", "5.8"]
    assert ["max_pool2d", "", "2", "2.00", "1.00"] in rows
    assert ["max_pool2d", "backward", "1", "3.00", "3.00"] in rows
    assert not any("scaling" in cell for row in rows for cell in row)
    said = lines[-1]
    assert "A Processor, 2 cores, AVX2; segkernels 0.1.0, torch 2.13.0; 2026-01-02" in said
    assert "nothing else ran while the CRF was timed" in said
    assert "(benchmarks/results/cpu/report.md)" in said


@pytest.mark.slow
def test_recording_a_run_writes_results_report_and_readme(tmp_path: Path) -> None:
    done = record(tmp_path, "--from", str(several(tmp_path / "run.json")))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results" / "cpu"
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        "report.md",
        "report.html",
        "plots",
    }
    assert "secret-host" not in (folder / "results.json").read_text()
    page = (tmp_path / "README.md").read_text()
    assert page.startswith(f"before\n{readme.BEGIN}\n")
    assert page.endswith(f"\n{readme.END}\nafter\n")
    assert readme.between(page) == readme.block(tmp_path / "results")
    assert "old" not in page

    # Recording the stored results again gives the same page.
    again = record(tmp_path, "--from", str(folder / "results.json"))
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "README.md").read_text() == page

    # A GPU's results follow the CPU's.
    facts = {"driver": "1", "cuda": "13", "cudnn": 9, "memory_bytes": 2**30}
    gpu = write(
        tmp_path / "gpu.json",
        case("a", 1.0, {"torch": 5.0}, test="test_max_pool2d"),
        device="NVIDIA H100 80GB HBM3",
        device_kind="cuda",
        **facts,
    )
    assert record(tmp_path, "--from", str(gpu)).returncode == 0
    both = (tmp_path / "README.md").read_text()
    assert both.index("results/cpu/") < both.index("results/nvidia-h100-80gb-hbm3/")


@pytest.mark.slow
def test_busy_machine_is_rejected_or_noted(tmp_path: Path) -> None:
    run = str(several(tmp_path / "run.json", others=0.6))
    refused = record(tmp_path, "--from", run)
    assert refused.returncode == 1
    assert "other processes used 0.60 cores while the dense CRF was timed" in refused.stderr
    assert "old" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "results").exists()
    assert record(tmp_path, "--from", run, "--allow-busy").returncode == 0
    assert (
        "**other processes used up to 0.6 cores meanwhile**" in (tmp_path / "README.md").read_text()
    )


def test_invalid_json_is_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"benchmarks": []}))
    done = record(tmp_path, "--from", str(path))
    assert done.returncode == 2
    assert "is not the JSON of a run" in done.stderr


def test_readme_without_markers_is_not_modified(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        readme.put(page, "text")
    assert page.read_text() == "no markers"
