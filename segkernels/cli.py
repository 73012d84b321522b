"""The command ``segkernels``. Each subcommand lives in its own module and is registered here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from segkernels import info as info_module
from segkernels._version import __version__
from segkernels.bench_command import bench
from segkernels.demo import demo
from segkernels.refine_command import refine

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Kernels for semantic segmentation in PyTorch."""


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Versions, how the native code was built, devices and operators: paste it in a bug report."""
    collected = info_module.collect()
    if as_json:
        typer.echo(json.dumps(collected, indent=2))
    else:
        info_module.render(collected, Console(highlight=False))


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """The reference models: papers, parameters, operations at 513 x 513, operators."""
    from segkernels.models import _summary  # they take a moment to import

    rows = _summary.rows()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _summary.render(rows, Console(highlight=False))


app.command()(refine)
app.command()(demo)
app.command()(bench)


def main() -> None:
    """The entry point of the command ``segkernels``."""
    app()
