"""Tables of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from measure import Row


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table; the columns in `left` are text, the others numbers, to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def milliseconds(seconds: float) -> str:
    """Three digits, without an exponent."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def summary(rows: Sequence[Row]) -> str:
    """One line a case: ours, each peer with its ratio, the share of the floor, the peak memory."""
    names = list(dict.fromkeys(name for row in rows for name in row.peers))
    header = ["case", "segkernels ms"]
    for name in names:
        header += [f"{name} ms", "ratio"]
    header += ["share of floor", "peak MB", "checked against"]
    lines = []
    for row in rows:
        cells = [row.case, milliseconds(row.seconds)]
        for name in names:
            there = row.peers.get(name)
            cells += (
                ["", ""] if there is None else [milliseconds(there), f"{there / row.seconds:.1f}x"]
            )
        cells.append("" if row.floor is None else f"{row.floor / row.seconds:.1%}")
        cells.append("" if row.peak is None else f"{row.peak / 1e6:.0f}")
        lines.append([*cells, row.checked])
    missing = sorted({f"{name}: {why}" for row in rows for name, why in row.missing.items()})
    return "\n".join(
        [table(header, lines, left=(0, len(header) - 1)), *(f"missing: {line}" for line in missing)]
    )
