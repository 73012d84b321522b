"""Reports of benchmark runs: order, contents, plots, and the comparison of two runs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import compare
import document
import numpy as np
import plots
import pytest
import report
import results
from bench_runs import case, write
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def several(tmp_path: Path) -> results.Run:
    """Two operators: faster, slower and undecided cases, a curve, missing and simpler peers."""
    entries = [
        case("win", 1.0, {"torch": 4.0}, share_of_floor=0.5, floor_by="bytes", floor_ms=0.5),
        case("lose", 2.0, {"torch": 1.0}, peak_bytes={"segkernels": 2e6, "torch": 8e6}),
        case("draw", 1.0, {"torch": 0.98}, width=0.1, peers_missing={"torch.compile": "too slow"}),
        case(
            "crf",
            10.0,
            {"pydensecrf2": 50.0, "crfseg": 5.0, "segkernels, 1 thread": 9.0},
            file="bench_dense_crf.py",
            peers_notes={"crfseg": "less work"},
            others_cores=0.7,
        ),
        *(
            case(
                f"curve {x}",
                x / 1e4,
                {"torch": x / 1e3},
                file="bench_scaling.py",
                curve={"name": "dense CRF over pixels", "over": "pixels", "x": x},
            )
            for x in (16384, 65536, 262144)
        ),
    ]
    return results.load(write(tmp_path / "run.json", *entries))


def test_slower_cases_come_first_and_simpler_peers_do_not_count(several: results.Run) -> None:
    text = document.markdown(report.build(several))
    lost = text[text.index("## Where a peer is faster") : text.index("## By operator")]
    assert text.index("## Where") < text.index("## By operator") < text.index("all cases")
    assert "2 of 4 pairs" in lost
    assert "in 1 of them the interquartile ranges" in lost
    rows = [line for line in lost.splitlines() if line.startswith(("| lose", "| draw"))]
    assert [row.split("|")[5].strip() for row in rows] == ["0.50x", "0.98x"]
    assert [row.split("|")[6].strip() for row in rows] == ["yes", "no"]
    assert "crf" not in lost
    assert "1 thread" not in lost


def test_geometric_means_exclude_curves(several: results.Run) -> None:
    text = document.markdown(report.build(several))
    by_op = text[text.index("## By operator") : text.index("![")]
    (row,) = (line for line in by_op.splitlines() if line.startswith("| max_pool2d"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["max_pool2d", "forward", "3"]
    assert cells[3] == f"{(4 * 0.5 * 0.98) ** (1 / 3):.2f}x"
    assert cells[-1] == "50.0%"
    assert "scaling" not in by_op


def test_report_names_setting_missing_peers_and_noise(several: results.Run) -> None:
    text = document.markdown(report.build(several))
    for said in (
        "Speed of segkernels on A Processor",
        "torch 2.13.0",
        "Commit 0123456789ab, 2026-01-02 03:04 UTC",
        "Command: pytest benchmarks --benchmark-only",
        "copy of 64 MiB, GB/s: 12.3",
        "torch.compile: too slow (1 cases)",
        "crfseg: less work",
        "in 1 of 7 cases other processes used more than 0.1 cores, 0.7 cores at worst",
        "50.0% of bytes",
    ):
        assert said in text


def test_cuda_columns(tmp_path: Path) -> None:
    entry = case(
        "small",
        0.01,
        {"torch": 0.02},
        host_us={"segkernels": 7.25, "torch": 12.0},
        graph_ms={"segkernels": 0.004, "torch": "operation not permitted"},
    )
    facts = {"driver": "580.1", "cuda": "13.0", "cudnn": 91900, "memory_bytes": 80 * 2**30}
    path = write(tmp_path / "run.json", entry, device="A GPU", device_kind="cuda", **facts)
    text = document.markdown(report.build(results.load(path)))
    assert "Driver 580.1, CUDA 13.0, cuDNN 91900, 80 GiB" in text
    for cell in ("7.25", "0.004", "operation not permitted"):
        assert cell in text


def test_html_page_is_self_contained(several: results.Run, tmp_path: Path) -> None:
    report.write(several, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    names = sorted(path.stem for path in (tmp_path / "out" / "plots").glob("*.svg"))
    assert names == ["floors", "memory", "ratios", "scaling-dense-crf-over-pixels"]
    assert page.count("<svg") == page.count("</svg>") == len(names)
    assert not re.search(r"""(src|href)=["'](?!#)""", page)
    assert "<script" not in page
    assert '<td class="n below">0.50x</td>' in page
    markdown = (tmp_path / "out" / "report.md").read_text()
    linked = re.findall(r"\]\((.+?)\)", markdown)
    assert len(linked) == len(names)
    assert all((tmp_path / "out" / path).is_file() for path in linked)


def test_html_is_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", case("<b>&", 1.0, {"torch": 0.5}))
    page = document.page(report.build(results.load(path)))
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page


@pytest.mark.slow
def test_plots_are_deterministic_and_not_empty(several: results.Run) -> None:
    first, second = plots.all_plots(several), plots.all_plots(several)
    assert [plot.svg for plot in first] == [plot.svg for plot in second]
    for plot in first:
        pixels = np.asarray(Image.open(io.BytesIO(plot.png)).convert("L"))
        assert min(pixels.shape) > 200
        assert 0.01 < (pixels < 250).mean() < 0.5


def test_report_without_peers_or_floors(tmp_path: Path) -> None:
    loaded = results.load(write(tmp_path / "run.json", case("alone", 1.0)))
    assert "0 of 0 pairs" in document.markdown(report.build(loaded))


def test_trimmed_json_is_equivalent_and_anonymous(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", case("a", 1.23456789, {"torch": 2.0}))
    trimmed = results.trim(path)
    text = json.dumps(trimmed)
    assert "secret-host" not in text
    assert "data" not in trimmed["benchmarks"][0]["stats"]
    short = tmp_path / "short.json"
    short.write_text(text)
    before, after = results.load(path), results.load(short)
    assert after.cases[0].ours.median == 1.235
    assert [c.key for c in after.cases] == [c.key for c in before.cases]
    assert after.setting["rates"] == {"copy of 64 MiB, GB/s": 12.35}


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("{", "JSONDecodeError"), ('{"benchmarks": []}', "'segkernels'")],
)
def test_invalid_json_raises(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(results.NotARunError, match=re.escape(said)) as raised:
        results.load(path)
    assert str(path) in str(raised.value)


def compared(tmp_path: Path, old: list[dict], new: list[dict]) -> dict[str, compare.Change]:
    before = results.load(write(tmp_path / "a.json", *old))
    after = results.load(write(tmp_path / "b.json", *new))
    return {change.name: change for change in compare.compare(before, after).changes}


def test_slower_beyond_noise(tmp_path: Path) -> None:
    steady, loose = 0.005, 0.2
    old = [case("a", 1.0, width=steady), case("b", 1.0, width=loose), case("c", 1.0, width=steady)]
    new = [case("a", 1.2, width=steady), case("b", 1.2, width=loose), case("c", 0.8, width=steady)]
    found = compared(tmp_path, old, new)
    assert {name: change.verdict for name, change in found.items()} == {
        "a": "slower",
        "b": "same",
        "c": "faster",
    }
    assert found["a"].noise == 0.10
    assert found["b"].noise == pytest.approx(2 * 0.2 * 2**0.5)


def test_slower_machine_is_not_a_regression(tmp_path: Path) -> None:
    old = [case("a", 1.0, {"torch": 2.0}, width=0.005), case("b", 1.0, {"torch": 2.0}, width=0.005)]
    new = [case("a", 1.5, {"torch": 3.0}, width=0.005), case("b", 1.5, {"torch": 2.0}, width=0.005)]
    found = compared(tmp_path, old, new)
    assert found["a"].drift == pytest.approx(1.5)
    assert found["a"].verdict == "same"
    assert found["b"].verdict == "slower"


def test_busy_machine_gives_no_verdict(tmp_path: Path) -> None:
    old = [case("a", 1.0), case("b", 1.0, others_cores=0.5)]
    new = [case("a", 2.0, others_cores=0.3), case("b", 2.0)]
    assert {c.verdict for c in compared(tmp_path, old, new).values()} == {"busy"}
    facts = {"device_kind": "cuda"}
    before = results.load(write(tmp_path / "a.json", *old, **facts))
    after = results.load(write(tmp_path / "b.json", *new, **facts))
    found = compare.compare(before, after)
    assert [change.verdict for change in found.changes] == ["slower", "slower"]
    assert found.changes[0].noise == pytest.approx(max(0.05, 2 * 0.02 * 2**0.5))


def test_peer_on_another_device_does_not_measure_drift(tmp_path: Path) -> None:
    where = {"peers_on_device": []}
    old = [case("a", 1.0, {"pydensecrf2": 2.0}, **where)]
    new = [case("a", 1.5, {"pydensecrf2": 3.0}, **where)]
    change = compared(tmp_path, old, new)["a"]
    assert change.drift == 1
    assert change.verdict == "slower"


def test_compare_command(tmp_path: Path) -> None:
    a = write(tmp_path / "a.json", case("x", 1.0), case("gone", 1.0), case("y", 1.0))
    b = write(tmp_path / "b.json", case("x", 2.0), case("new", 1.0), case("y", 1.0), threads=4)
    gpu = write(tmp_path / "gpu.json", case("x", 1.0), device="A GPU")
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "--compare"]

    def run_with(*paths: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)

    worse = run_with(a, b)
    assert worse.returncode == 1
    assert "1 slower, 0 faster, 1 the same within noise, of 2 cases" in worse.stdout
    assert "2.00x" in worse.stdout
    assert "Only before: gone" in worse.stdout
    assert "Only after: new" in worse.stdout
    assert "threads: 2 before, 4 after" in worse.stdout
    assert run_with(a, a).returncode == 0
    refused = run_with(a, gpu)
    assert refused.returncode == 2
    assert "differ in device: 'A Processor' and 'A GPU'" in refused.stderr
