"""Two runs against each other: what became slower or faster, beyond noise.

The rule. Of a case, `change` is our median in B over that in A. Where torch, or another peer on
the same device, was timed in both runs, `drift` is the geometric mean of how those changed: the
machine, not us; otherwise it is 1. Noise is the root of the summed squares of the relative
half-widths of the middle halves of all the times in that quotient, doubled, and at least 5% on
CUDA, 10% on the CPU. A case is slower where change / drift > 1 + noise, faster where it is
< 1 / (1 + noise). On the CPU a case in which other processes used more than a tenth of a core, in
either run, is not judged. Runs on different devices or in different modes are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from results import OURS, Case, Run
from tables import digits, geometric_mean, table

_LEAST = {"cuda": 0.05, "cpu": 0.10}
_QUIET = 0.1  # cores
_WIDTHS = 2.0


@dataclass(frozen=True)
class Change:
    """How a case changed from A to B; above 1 where it takes longer."""

    name: str
    before: float
    after: float
    drift: float
    noise: float
    busy: bool = False

    @property
    def factor(self) -> float:
        """The change less the machine's."""
        return self.after / self.before / self.drift

    @property
    def verdict(self) -> str:
        """One of "slower", "faster", "same", and "busy" where the machine was."""
        if self.busy:
            return "busy"
        if self.factor > 1 + self.noise:
            return "slower"
        return "faster" if self.factor < 1 / (1 + self.noise) else "same"


@dataclass(frozen=True)
class Comparison:
    """Of two runs: the cases of both, and what only one has."""

    changes: Sequence[Change]
    only_before: Sequence[str]
    only_after: Sequence[str]
    warnings: Sequence[str]

    @property
    def slower(self) -> list[Change]:
        """Regressions, the worst first."""
        found = [change for change in self.changes if change.verdict == "slower"]
        return sorted(found, key=lambda change: -change.factor)


class NotComparableError(Exception):
    """Two runs that are not of one device and mode."""


def compare(before: Run, after: Run) -> Comparison:
    """Apply the rule to two runs."""
    for fact in ("device", "device_kind", "mode"):
        a, b = before.setting.get(fact), after.setting.get(fact)
        if a != b:
            raise NotComparableError(f"the runs differ in {fact}: {a!r} and {b!r}")
    kind = after.setting["device_kind"]
    olds = {case.key: case for case in before.cases}
    news = {case.key: case for case in after.cases}
    warnings = [
        f"{fact}: {before.setting.get(fact)} before, {after.setting.get(fact)} after"
        for fact in ("threads", "OMP_WAIT_POLICY", "driver", "versions")
        if before.setting.get(fact) != after.setting.get(fact)
    ]
    return Comparison(
        [_change(olds[key], new, kind) for key, new in news.items() if key in olds],
        [case.name for key, case in olds.items() if key not in news],
        [case.name for key, case in news.items() if key not in olds],
        warnings,
    )


def _change(old: Case, new: Case, kind: str) -> Change:
    here = new.info.get("peers_on_device", [])
    same = [name for name in new.rivals if name in old.rivals and name in here]
    drift = geometric_mean(new.times[n].median / old.times[n].median for n in same) if same else 1.0
    ours = [old.times[OURS].noise, new.times[OURS].noise]
    theirs = [case.times[name].noise / len(same) for name in same for case in (old, new)]
    noise = max(_LEAST[kind], _WIDTHS * math.sqrt(sum(n * n for n in ours + theirs)))
    others = max(case.info.get("others_cores", 0.0) for case in (old, new))
    busy = kind == "cpu" and others > _QUIET
    return Change(new.name, old.ours.median, new.ours.median, drift, noise, busy)


def text(found: Comparison) -> str:
    """The comparison as Markdown: regressions first."""
    slower = found.slower
    faster = sorted(
        (change for change in found.changes if change.verdict == "faster"), key=lambda c: c.factor
    )
    busy = sum(change.verdict == "busy" for change in found.changes)
    same = len(found.changes) - len(slower) - len(faster) - busy
    parts = [
        f"{len(slower)} slower, {len(faster)} faster, {same} the same within noise, "
        f"of {len(found.changes)} cases in both runs"
    ]
    if busy:
        parts.append(f"{busy} not judged: other processes used more than a tenth of a core")
    for title, changes in (("Slower", slower), ("Faster", faster)):
        if changes:
            header = ["case", "before ms", "after ms", "machine", "change", "noise"]
            rows = [
                [
                    change.name,
                    digits(change.before),
                    digits(change.after),
                    f"{change.drift:.2f}x",
                    f"{change.factor:.2f}x",
                    f"{change.noise:.0%}",
                ]
                for change in changes
            ]
            parts.append(f"{title}:\n\n{table(header, rows)}")
    parts += [f"Differs: {warning}" for warning in found.warnings]
    for title, names in (("before", found.only_before), ("after", found.only_after)):
        if names:
            parts.append(f"Only {title}: {', '.join(names)}")
    return "\n\n".join(parts)
