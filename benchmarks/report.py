"""Writes the report of a run from pytest-benchmark's JSON, or compares two runs.

    python benchmarks/report.py run.json -o report           report.md, report.html, plots/
    python benchmarks/report.py --compare before.json after.json

The comparison ends with status 1 if a case became slower by more than the noise (see compare.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

import compare as comparing
from document import Block, Document, Heading, Listing, Table, Text, markdown, page
from results import OURS, Case, NotARunError, Run, load
from tables import digits, geometric_mean

_MAX_SLOWER = 60  # rows


def main(
    run: Annotated[Path | None, typer.Argument(help="JSON file of a run.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the report.")] = Path(
        "benchmark-report"
    ),
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two JSON files: before and after.")
    ] = None,
) -> None:
    """Write the report of a run, or compare two."""
    if compare is not None:
        raise typer.Exit(print_comparison(*compare))
    if run is None:
        raise typer.BadParameter("expected the JSON file of a run, or two with --compare")
    try:
        loaded = load(run)
    except NotARunError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    for path in write(loaded, output):
        print(path)


def print_comparison(before: Path, after: Path) -> int:
    """Print the changes between two runs.

    Returns:
        the exit status: 1 if a case became slower, 2 if the runs cannot be compared.
    """
    try:
        found = comparing.compare(load(before), load(after))
    except (NotARunError, comparing.NotComparableError) as error:
        print(error, file=sys.stderr)
        return 2
    print(comparing.text(found))
    return 1 if found.slower else 0


def write(run: Run, folder: Path) -> list[Path]:
    """Write report.md, report.html and the plots; return the paths of the two reports."""
    document = build(run)
    drawings = folder / "plots"
    drawings.mkdir(parents=True, exist_ok=True)
    for plot in document.plots:
        (drawings / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
        (drawings / f"{plot.name}.png").write_bytes(plot.png)
    pages = [folder / "report.md", folder / "report.html"]
    pages[0].write_text(markdown(document), encoding="utf-8")
    pages[1].write_text(page(document), encoding="utf-8")
    return pages


def build(run: Run) -> Document:
    """Build the report of a run."""
    import plots  # importing matplotlib takes seconds, and a comparison does not need it

    drawn = {plot.name: plot for plot in plots.all_plots(run)}
    blocks: list[Block] = [Listing(_setting(run)), *_warnings(run), *_slower_cases(run)]
    blocks += [Heading("By operator: geometric means of the ratios"), *_by_op(run)]
    blocks += [drawn.pop(name) for name in ("ratios", "floors", "memory") if name in drawn]
    if drawn:
        blocks += [Heading("Scaling"), *drawn.values()]
    for op, cases in run.ops().items():
        blocks += [Heading(f"{op}: all cases"), _cases(cases, f"{len(cases)} cases")]
    blocks += [*_missing(run), Heading("How this was measured"), Text(_HOW)]
    return Document(f"Speed of segkernels on {run.setting['device']}", blocks)


_HOW = (
    "Each result is first checked against another implementation; a case with a wrong result is "
    "not timed. Then segkernels and all peers run alternately. Times are medians over the rounds. "
    "A ratio is a peer's median divided by segkernels' median: above 1, segkernels is faster. On "
    "CUDA, times are measured by events around queued calls, with a cold L2 cache; on the CPU by "
    "the wall clock, with warm caches. The floor is a lower bound of the time: the larger of the "
    "necessary bytes (each input read once, each output written once) divided by the copy rate, "
    "and the necessary FLOPs divided by the matmul rate; both rates were measured in this run. "
    "See benchmarks/README.md for details."
)


def _setting(run: Run) -> list[str]:
    facts = run.setting
    lines = [f"Device: {facts['device']}"]
    if facts["device_kind"] == "cuda":
        lines.append(
            f"Driver {facts['driver']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}, "
            f"{facts['memory_bytes'] / 2**30:.0f} GiB; host: {facts['cpu']}, {facts['cores']} cores"
        )
    else:
        policy = facts.get("OMP_WAIT_POLICY")
        lines.append(
            f"{facts['cores']} cores, {facts['threads']} threads, {facts['cpu_capability']}"
            + (f", OMP_WAIT_POLICY={policy}" if policy else "")
        )
    lines += [
        "Versions: " + ", ".join(f"{name} {v}" for name, v in facts["versions"].items()),
        f"Commit {facts['commit']}, {facts['date'][:16].replace('T', ' ')} UTC, "
        f"{facts['platform']}, {facts['mode']} mode",
        f"Command: {facts['command']}",
    ]
    if facts["rates"]:
        rates = (f"{name}: {digits(rate)}" for name, rate in facts["rates"].items())
        lines.append(f"Measured in this run: {'; '.join(rates)}")
    return lines


def _warnings(run: Run) -> list[Block]:
    """A warning if other processes used the machine."""
    busy = [case for case in run.cases if case.info.get("others_cores", 0) > 0.1]
    if not busy or run.setting["device_kind"] == "cuda":
        return []
    worst = max(case.info["others_cores"] for case in busy)
    return [
        Text(
            f"The machine was not idle: in {len(busy)} of {len(run.cases)} cases other processes "
            f"used more than 0.1 cores, {worst:.1f} cores at worst. Times with several OpenMP "
            "threads are then unreliable, and so are ratios to peers with one thread."
        )
    ]


def _slower_cases(run: Run) -> list[Block]:
    """The cases in which a peer is faster, the lowest ratio first."""
    notes = _notes(run)
    pairs = [
        (case, name)
        for cases in run.ops().values()
        for case in cases
        for name in case.peer_times
        if name not in notes
    ]
    slower = sorted(
        ((c, n) for c, n in pairs if c.ratio(n) < 1), key=lambda pair: pair[0].ratio(pair[1])
    )
    clear = sum(case.separated(name) for case, name in slower)
    blocks: list[Block] = [
        Heading("Where a peer is faster"),
        Text(
            f"In {len(slower)} of {len(pairs)} pairs of a case and a peer that does the same work, "
            f"the peer is faster; in {clear} of them the interquartile ranges do not overlap."
        ),
    ]
    if slower:
        header = ["case", "segkernels ms", "peer", "peer ms", "ratio", "beyond noise"]
        rows = [
            [
                case.name,
                digits(case.ours.median),
                name,
                digits(case.times[name].median),
                _ratio(case.ratio(name)),
                "yes" if case.separated(name) else "no",
            ]
            for case, name in slower[:_MAX_SLOWER]
        ]
        blocks.append(Table(header, rows, left=(0, 2, 5)))
    if len(slower) > _MAX_SLOWER:
        blocks.append(Text(f"... and {len(slower) - _MAX_SLOWER} more, with ratios nearer to 1."))
    return blocks


def _by_op(run: Run) -> list[Block]:
    ops = run.ops()
    notes = _notes(run)
    names = run.peers([case for cases in ops.values() for case in cases])
    rows = []
    for op, cases in ops.items():
        for test in dict.fromkeys(case.test for case in cases):
            some = [case for case in cases if case.test == test]
            shares = [s for case in some if (s := case.info.get("share_of_floor"))]
            cells = [op, variant(op, test), str(len(some))]
            for name in names:
                there = [case.ratio(name) for case in some if name in case.times]
                cells.append(_ratio(geometric_mean(there)) if there else "")
            cells.append(f"{geometric_mean(shares):.1%}" if shares else "")
            rows.append(cells)
    marked = [f"{name} *" if name in notes else name for name in names]
    blocks: list[Block] = [
        Table(["benchmark", "variant", "cases", *marked, "share of floor"], rows, left=(0, 1))
    ]
    if notes:
        blocks.append(Text("* The work of this peer differs, see below."))
    return blocks


def variant(op: str, test: str) -> str:
    """The part of an operator that a test measures, such as "backward"; "" for its forward."""
    return "" if test == op else test.removeprefix(f"{op}_").replace("_", " ")


def _notes(run: Run) -> dict[str, str]:
    """Peers whose work differs, with the difference."""
    return {
        name: note for case in run.cases for name, note in case.info.get("peers_notes", {}).items()
    }


def _cases(cases: Sequence[Case], title: str) -> Table:
    """Table of all figures of the cases of an operator, without empty columns."""
    names = list(dict.fromkeys(name for case in cases for name in case.times if name != OURS))
    columns: dict[str, list[str]] = {"case": [case.name for case in cases]}
    columns["segkernels ms"] = [digits(case.ours.median) for case in cases]
    columns["quartiles"] = [f"{digits(c.ours.low)}-{digits(c.ours.high)}" for c in cases]
    for name in names:
        columns[f"{name} ms"] = [_milliseconds(case, name) for case in cases]
        columns[f"ratio to {name}"] = [
            _ratio(case.ratio(name)) if name in case.times else "" for case in cases
        ]
    columns["share of floor"] = [_floor(case) for case in cases]
    for key, unit, scale in (("peak_bytes", "peak MB", 1e6), ("host_us", "host us", 1.0)):
        for name in [OURS, *names]:
            found = [(case.info.get(key) or {}).get(name) for case in cases]
            columns[f"{name}: {unit}"] = ["" if v is None else digits(v / scale) for v in found]
    for name in [OURS, *names]:
        graphs = [(case.info.get("graph_ms") or {}).get(name) for case in cases]
        columns[f"{name} as a CUDA graph, ms"] = [
            digits(g) if isinstance(g, float) else (g or "") for g in graphs
        ]
    columns["rounds"] = [str(case.rounds) for case in cases]
    columns["cores used by others"] = [f"{case.info.get('others_cores', 0):.2f}" for case in cases]
    columns["checked against"] = [case.info.get("checked_against", "") for case in cases]
    columns["source of the size"] = [case.info.get("source", "") for case in cases]
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    left = [
        i
        for i, name in enumerate(kept)
        if name in ("case", "checked against", "source of the size")
    ]
    rows = list(zip(*kept.values(), strict=True))
    return Table(list(kept), rows, left=left, folded=title)


def _milliseconds(case: Case, name: str) -> str:
    return digits(case.times[name].median) if name in case.times else ""


def _floor(case: Case) -> str:
    share = case.info.get("share_of_floor")
    return "" if share is None else f"{share:.1%} of {case.info['floor_by']}"


def _ratio(value: float) -> str:
    """Format a ratio; two decimals below ten, so that 0.996 is not shown as 1.0."""
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def _missing(run: Run) -> list[Block]:
    """Peers that were not timed, and peers whose work differs."""
    why: dict[str, int] = {}
    for case in run.cases:
        for name, reason in case.info.get("peers_missing", {}).items():
            line = f"{name}: {reason}"
            why[line] = why.get(line, 0) + 1
    notes = [f"{name}: {note}" for name, note in _notes(run).items()]
    blocks: list[Block] = []
    if why:
        lines = [f"{line} ({count} cases)" for line, count in sorted(why.items())]
        blocks += [Heading("Missing peers"), Listing(lines)]
    if notes:
        blocks += [Heading("Peers whose work differs"), Listing(sorted(notes))]
    return blocks


if __name__ == "__main__":
    typer.run(main)
