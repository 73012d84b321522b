"""The rows of `segkernels models`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from segkernels.models._base import SegmentationModel
from segkernels.models._registry import Spec, specs

SIZE = 513


@dataclass(frozen=True)
class Row:
    """One model, with 3 channels and 21 classes.

    Attributes:
        name: that `create_model` knows.
        paper: authors and year.
        parameters: their number.
        output_stride: pixels of the input to one of the encoder's last map.
        size: height and width that `flops` is for: 513, or the next smaller that fits.
        flops: of one image: of its convolutions, two for each multiplication and addition.
        ops: segkernels' operators that it runs through.
    """

    name: str
    paper: str
    parameters: int
    output_stride: int
    size: int
    flops: int
    ops: tuple[str, ...]


def parameters(model: torch.nn.Module) -> int:
    """How many numbers a model learns."""
    return sum(p.numel() for p in model.parameters())


def flops(model: SegmentationModel, height: int, width: int) -> int:
    """Floating-point operations of a forward pass on one image of a model on the meta device."""
    image = torch.empty(1, model.in_channels, height, width, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops())


def row(spec: Spec) -> Row:
    """Build a model on the meta device, and count."""
    with torch.device("meta"):
        # The same layers as convolutions of torch's, which the counter knows.
        model = spec.build(backend="torch").eval()
    size = SIZE - (SIZE - model.min_size) % model.size_step
    return Row(
        spec.name,
        spec.paper,
        parameters(model),
        spec.output_stride,
        size,
        flops(model, size, size),
        spec.ops,
    )


@functools.cache
def rows() -> tuple[Row, ...]:
    """Every model's."""
    return tuple(row(spec) for spec in specs())


def render(rows: Iterable[Row], console: Console) -> None:
    """Print them as a table."""
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
