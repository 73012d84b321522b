"""``segkernels models``: the reference models as a table."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """The reference models: papers, parameters, operations at 513 x 513, operators."""
    from segkernels.models import _summary  # they take a moment to import

    rows = _summary.rows()
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _summary.render(rows, Console(highlight=False))
