"""``segkernels bench``: runs the benchmarks of a source checkout, or compares two runs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

_NEEDED = ("pytest", "pytest_benchmark", "matplotlib")
_INSTALL = 'pip install "segkernels[bench]"'


def command(
    op: Annotated[
        list[str] | None,
        typer.Option("--op", help="Only this operator's cases; may be repeated."),
    ] = None,
    quick: Annotated[
        bool | None,
        typer.Option(
            "--quick/--full",
            help="Few small cases, or every case at the size in its paper. Default: full on a GPU, "
            "quick on a CPU.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: CUDA where there is a device.")
    ] = "auto",
    json: Annotated[
        Path | None, typer.Option("--json", help="Write pytest-benchmark's JSON here.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a report here: Markdown, HTML and plots. Needs --json."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Run nothing: list what is slower in the second JSON."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="The benchmarks' folder, if it is not found.")
    ] = None,
) -> None:
    """Measure every operator against its peers, or compare two runs.

    The benchmarks are not part of the installed package: run this in a source checkout, or with an
    editable install.
    """
    try:
        _check_installed()
        benchmarks = find_benchmarks(folder)
        if compare is not None:
            raise typer.Exit(_reports(benchmarks).print_comparison(*compare))
        if device not in ("auto", "cpu", "cuda"):
            raise _UnusableError(f"--device must be auto, cpu or cuda, got {device!r}")
        if report is not None and json is None:
            raise _UnusableError("--report needs --json, from which the report is made")
        files = _files(benchmarks, op or [])
    except _UnusableError as error:
        typer.echo(f"segkernels bench: {error}", err=True)
        raise typer.Exit(2) from error

    arguments = [*map(str, files), "--benchmark-only", "--device", device]
    arguments += [] if quick is None else ["--quick" if quick else "--full"]
    arguments += [] if json is None else [f"--benchmark-json={json}"]
    # Ignore the pytest configuration of the current folder.
    arguments += ["-c", str(benchmarks.parent / "pyproject.toml"), "-q"]
    pytest: Any = importlib.import_module("pytest")
    status = int(pytest.main(arguments))
    if status == 0 and report is not None and json is not None:
        reports = _reports(benchmarks)
        for path in reports.write(reports.load(json), report):
            typer.echo(path)
    raise typer.Exit(status)


class _UnusableError(Exception):
    """The command cannot run; the message is the reason."""


def find_benchmarks(named: Path | None) -> Path:
    """The folder ``benchmarks`` of a source checkout: `named`, or beside the package, or here."""
    places = [named] if named is not None else []
    if named is None:
        places = [Path(__file__).resolve().parents[2] / "benchmarks", Path("benchmarks")]
    for place in places:
        if (place / "conftest.py").is_file() and (place / "shapes.py").is_file():
            return place.resolve()
    raise _UnusableError(
        f"no benchmarks in {' nor in '.join(str(place) for place in places)}. They are not part of "
        "the installed package: run this in a checkout of segkernels' source, or name its "
        "benchmarks with --folder"
    )


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise _UnusableError(f"{', '.join(missing)} not installed; {_INSTALL}")


def _files(benchmarks: Path, ops: list[str]) -> list[Path]:
    """The bench files of `ops`, or the folder for none."""
    known = {path.stem.removeprefix("bench_"): path for path in benchmarks.glob("bench_*.py")}
    unknown = [op for op in ops if op not in known]
    if unknown:
        raise _UnusableError(
            f"no benchmarks of {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    return [known[op] for op in ops] or [benchmarks]


def _reports(benchmarks: Path) -> Any:
    """The module benchmarks/report.py."""
    if str(benchmarks) not in sys.path:
        sys.path.insert(0, str(benchmarks))
    return importlib.import_module("report")
