"""``segkernels models``: the reference models as a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from segkernels.models._registry import specs


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """The reference models: paper, parameters, output stride, operations at 513 x 513.

    --json also has the exact image size and the operators.
    """
    if as_json:
        typer.echo(json.dumps([asdict(spec) for spec in specs()], indent=2))
    else:
        render(Console(highlight=False))


def render(console: Console) -> None:
    """Print the figures of every model as a table of 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("paper", max_width=26)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("stride", justify="right", no_wrap=True)
    table.add_column("GFLOPs", justify="right", no_wrap=True)
    for spec in specs():
        table.add_row(
            spec.name,
            spec.paper,
            f"{spec.parameters:,}",
            str(spec.output_stride),
            f"{spec.flops / 1e9:,.1f}",
        )
    console.print(table)
