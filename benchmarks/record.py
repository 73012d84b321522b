"""Measures what is committed: benchmarks/results/<device>/ and the tables in README.md.

    python benchmarks/record.py                   runs all, on the GPU or, in quick mode, on the CPU
    python benchmarks/record.py --from run.json   takes a run that was made before

Writes results.json (pytest-benchmark's JSON, trimmed), report.md, report.html and plots/ to the
device's folder, and README's part between its markers from every committed results.json. On the CPU
it refuses a run in which other processes kept the cores busy while the dense CRF was timed, unless
it is told to take it: then README says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent))

import readme
import report
from results import NotARunError, Run, load, trim

HERE = Path(__file__).resolve().parent
_QUIET = 0.1  # cores


def main(
    made: Annotated[
        Path | None, typer.Option("--from", help="pytest-benchmark's JSON of a run.")
    ] = None,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="Take a run though other processes ran.")
    ] = False,
    patience: Annotated[
        float, typer.Option(help="Seconds to spend on waiting for quiet rounds.")
    ] = 60.0,
    results: Annotated[Path, typer.Option(help="The folder of results.")] = HERE / "results",
    page: Annotated[Path, typer.Option("--readme", help="The README to update.")] = HERE.parent
    / "README.md",
) -> None:
    """Measure, and write the results, their report and README's tables."""
    run_json = made if made is not None else _measure(patience)
    try:
        run = load(run_json)
    except NotARunError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    busy = busiest(run)
    if busy > _QUIET and not allow_busy:
        print(
            f"Not recorded: other processes used {busy:.2f} cores while the dense CRF was timed. "
            f"Run it again on a quiet machine, or take it with --allow-busy --from {run_json}",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    folder = results / readme.slug(run)
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "results.json"
    kept.write_text(json.dumps(trim(run_json), indent=1) + "\n", encoding="utf-8")
    for plot in folder.glob("plots/*"):
        plot.unlink()
    for path in (kept, *report.write(load(kept), folder)):
        print(path)
    for plot in folder.glob("plots/*.png"):  # the pages use the SVGs
        plot.unlink()
    readme.put(page, readme.block(results))
    print(page)


def busiest(run: Run) -> float:
    """Cores that other processes used while the cases of README's table of the CRF were timed."""
    if run.setting["device_kind"] == "cuda":
        return 0.0
    return max((case.info["others_cores"] for case in readme.crf_cases(run)), default=0.0)


def _measure(patience: float) -> Path:
    """Run every benchmark; the JSON's path."""
    target = Path(tempfile.mkdtemp(prefix="segkernels-bench-")) / "run.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        f"--benchmark-json={target}",
        f"--patience={patience:g}",
        "-q",
    ]
    # OpenMP as a user has it who sets nothing.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment)
    if done.returncode != 0:
        print(f"Not recorded: a benchmark failed; what there is is in {target}", file=sys.stderr)
        raise typer.Exit(done.returncode)
    return target


if __name__ == "__main__":
    typer.run(main)
