"""The command ``segkernels``, with one module for each subcommand."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from segkernels._version import __version__
from segkernels.cli import bench, demo, evaluate, info, models, refine
from segkernels.cli.console import STOPPING

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


app.command("info")(info.command)
app.command("models")(models.command)
app.command("refine")(refine.command)
app.command("evaluate")(evaluate.command)
app.command("demo")(demo.command)
app.command("bench")(bench.command)


def main() -> None:
    """The entry point of the command ``segkernels``."""
    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:
            for number in STOPPING:  # another signal would disturb the exit
                signal.signal(number, signal.SIG_IGN)
        raise
