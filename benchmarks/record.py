"""Records the committed results: benchmarks/results/<device>/ and the speed tables of README.md.

    python benchmarks/record.py                   run all benchmarks (on a CPU in quick mode)
    python benchmarks/record.py --from run.json   use an existing run

Writes results.json (pytest-benchmark's JSON, trimmed), report.md, report.html and plots/ to the
device's folder. Then writes README's tables from all committed results.json files. On the CPU, a
run is refused if other processes used more than 0.1 cores while the dense CRF was timed. With
--allow-busy it is recorded, and README states the load.
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
_QUIET = 0.1  # cores used by other processes


def main(
    made: Annotated[
        Path | None, typer.Option("--from", help="JSON file of an existing run.")
    ] = None,
    allow_busy: Annotated[
        bool,
        typer.Option("--allow-busy", help="Record the run even if other processes used the cores."),
    ] = False,
    patience: Annotated[
        float, typer.Option(help="Seconds to spend on repeating disturbed rounds.")
    ] = 60.0,
    results: Annotated[Path, typer.Option(help="The results folder.")] = HERE / "results",
    page: Annotated[Path, typer.Option("--readme", help="The README to update.")] = HERE.parent
    / "README.md",
) -> None:
    """Run the benchmarks; write results, report and README's tables."""
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
            f"Run again on an idle machine, or record it with --allow-busy --from {run_json}",
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
    for plot in folder.glob("plots/*.png"):  # both reports use the SVGs
        plot.unlink()
    readme.put(page, readme.block(results))
    print(page)


def busiest(run: Run) -> float:
    """Most cores that other processes used while a case of README's CRF table was timed."""
    if run.setting["device_kind"] == "cuda":
        return 0.0
    return max((case.info["others_cores"] for case in readme.crf_cases(run)), default=0.0)


def _measure(patience: float) -> Path:
    """Run all benchmarks; return the path of the JSON."""
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
    # Measure torch with OpenMP's defaults.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment)
    if done.returncode != 0:
        print(
            f"Not recorded: a benchmark failed. The partial results are in {target}",
            file=sys.stderr,
        )
        raise typer.Exit(done.returncode)
    return target


if __name__ == "__main__":
    typer.run(main)
