"""Generates README's speed tables from the committed results."""

from __future__ import annotations

import re
from pathlib import Path

from report import variant
from results import OURS, Case, Run, load
from tables import digits, geometric_mean, table

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_SINGLE = f"{OURS}, 1 thread"
_QUIET = 0.1  # cores used by other processes


def slug(run: Run) -> str:
    """Name of the results folder of a run's device: "cpu", or derived from the GPU's name."""
    if run.setting["device_kind"] != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", run.setting["device"].lower()).strip("-")


def committed(results: Path) -> list[Path]:
    """All results.json files in the results folder, the CPU's first."""
    found = sorted(results.glob("*/results.json"))
    return sorted(found, key=lambda path: path.parent.name != "cpu")


def block(results: Path) -> str:
    """The text between the markers: the tables of all committed runs."""
    return "\n\n".join(part(load(path), path.parent.name) for path in committed(results))


def part(run: Run, folder: str) -> str:
    """The tables of one run."""
    pieces = []
    if crf := crf_cases(run):
        pieces += [
            "`dense_crf` compared with pydensecrf2. `ratio` is pydensecrf2's time divided by "
            "segkernels' time in the first time column:",
            _crf_table(run, crf),
        ]
    pieces += [
        "All operators compared with torch. `torch / segkernels` is torch's time divided by "
        "segkernels' time, as the geometric mean over the cases (above 1: segkernels is faster); "
        "`worst` is the lowest of these ratios:",
        _op_table(run),
        _setting(run, folder),
    ]
    return "\n\n".join(pieces)


def crf_cases(run: Run) -> list[Case]:
    """The cases of the CRF table."""
    return [
        case
        for case in run.cases
        if (case.op, case.test) == ("dense_crf", "dense_crf") and "pydensecrf2" in case.times
    ]


def _crf_table(run: Run, cases: list[Case]) -> str:
    cuda = run.setting["device_kind"] == "cuda"
    ours = "segkernels (ms)" if cuda else f"segkernels, {run.setting['threads']} threads (ms)"
    single = any(_SINGLE in case.times for case in cases)
    header = ["size", "classes", "iterations", ours]
    header += [f"{_SINGLE} (ms)"] if single else []
    header += ["pydensecrf2 (ms)", "ratio"]
    rows = []
    for case in cases:
        height, width, classes, iterations = case.info["crf"]
        cells = [f"{width} x {height}", str(classes), str(iterations), digits(case.ours.median)]
        if single:
            cells.append(digits(case.times[_SINGLE].median) if _SINGLE in case.times else "")
        peer = case.times["pydensecrf2"].median
        rows.append([*cells, digits(peer), f"{case.ratio('pydensecrf2'):.1f}"])
    return table(header, rows)


def _op_table(run: Run) -> str:
    rows = []
    for op, cases in run.ops().items():
        for test in dict.fromkeys(case.test for case in cases):
            ratios = [c.ratio("torch") for c in cases if c.test == test and "torch" in c.times]
            if ratios:
                mean, worst = geometric_mean(ratios), min(ratios)
                rows.append(
                    [op, variant(op, test), str(len(ratios)), f"{mean:.2f}", f"{worst:.2f}"]
                )
    return table(
        ["benchmark", "variant", "cases", "torch / segkernels", "worst"], rows, left=(0, 1)
    )


def _setting(run: Run, folder: str) -> str:
    facts = run.setting
    versions = {k: v for k, v in facts["versions"].items() if k in _NAMED}
    busy = max((case.info["others_cores"] for case in crf_cases(run)), default=0.0)
    if facts["device_kind"] == "cuda":
        device = f"{facts['device']}, driver {facts['driver']}"
        quiet = ""
    else:
        device = f"{facts['device']}, {facts['cores']} cores, {facts['cpu_capability']}"
        policy = facts.get("OMP_WAIT_POLICY")
        device += f", OMP_WAIT_POLICY={policy}" if policy else ""
        quiet = (
            "; nothing else ran while the CRF was timed"
            if busy <= _QUIET
            else f"; **other processes used up to {busy:.1f} cores meanwhile**"
        )
    rounds = [case.rounds for case in run.cases]
    return (
        f"{device}; {', '.join(f'{k} {v}' for k, v in versions.items())}; {facts['date'][:10]}, "
        f"{facts['mode']} mode. Medians of {min(rounds)} to {max(rounds)} interleaved "
        f"rounds{quiet}. pydensecrf2 uses one thread. Full report: "
        f"[benchmarks/results/{folder}/report.md](benchmarks/results/{folder}/report.md)."
    )


_NAMED = ("segkernels", "Python", "torch", "pydensecrf2")


def between(text: str) -> str:
    """The text between the markers of a README."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README must have {BEGIN} and {END} once each")
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def put(path: Path, text: str) -> None:
    """Write `text` between the markers of a file."""
    old = path.read_text(encoding="utf-8")
    between(old)
    head, rest = old.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
