"""The table of `segkernels models`."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from segkernels.models._registry import Spec, specs


def rows() -> tuple[Spec, ...]:
    """The figures of every model; no model is built."""
    return tuple(specs())


def render(rows: Iterable[Spec], console: Console) -> None:
    """Print the rows as a table."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("paper")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("stride", justify="right")
    table.add_column("GFLOPs", justify="right", no_wrap=True)
    table.add_column("size", justify="right")
    table.add_column("operators")
    for row in rows:
        table.add_row(
            row.name,
            row.paper,
            f"{row.parameters:,}",
            str(row.output_stride),
            f"{row.flops / 1e9:,.1f}",
            str(row.size),
            " ".join(row.ops),
        )
    console.print(table)
