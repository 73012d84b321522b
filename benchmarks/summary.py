"""The table printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

from measure import Row
from tables import milliseconds, table


def summary(rows: Sequence[Row]) -> str:
    """One line per case: times, ratios to the peers, share of the floor, peak memory."""
    names = list(dict.fromkeys(name for row in rows for name in row.peers))
    header = ["case", "segkernels ms"]
    for name in names:
        header += [f"{name} ms", "ratio"]
    header += ["share of floor", "peak MB", "checked against"]
    lines = []
    for row in rows:
        cells = [row.case, milliseconds(row.seconds)]
        for name in names:
            peer = row.peers.get(name)
            cells += (
                ["", ""] if peer is None else [milliseconds(peer), f"{peer / row.seconds:.1f}x"]
            )
        cells.append("" if row.floor is None else f"{row.floor.seconds / row.seconds:.1%}")
        cells.append("" if row.peak is None else f"{row.peak / 1e6:.0f}")
        lines.append([*cells, row.checked])
    missing = sorted({f"{name}: {why}" for row in rows for name, why in row.missing.items()})
    return "\n".join(
        [table(header, lines, left=(0, len(header) - 1)), *(f"missing: {line}" for line in missing)]
    )
