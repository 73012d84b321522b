"""Compares two runs: which cases became slower or faster by more than the noise.

`change` is the median time of segkernels in the second run divided by that in the first. `drift` is
the geometric mean of the same quotient for the peers on the same device (such as torch) that both
runs timed: it measures a change of the machine. Without such peers it is 1. `noise` is twice the
root of the sum of squares of the relative half interquartile ranges of all times in change / drift,
and at least 5% on CUDA and 10% on the CPU. A case is slower if change / drift > 1 + noise, and
faster if change / drift < 1 / (1 + noise). On the CPU, a case is not judged if other processes used
more than 0.1 cores in either run. Runs on different devices or in different modes cannot be
compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from results import OURS, Case, Run
from tables import digits, geometric_mean, table

_MIN_NOISE = {"cuda": 0.05, "cpu": 0.10}
_QUIET = 0.1  # cores used by other processes
_NOISE_FACTOR = 2.0


@dataclass(frozen=True)
class Change:
    """The change of a case between two runs: times in milliseconds, drift, noise."""

    name: str
    before: float
    after: float
    drift: float
    noise: float
    busy: bool = False

    @property
    def factor(self) -> float:
        """change / drift; above 1 if the case became slower."""
        return self.after / self.before / self.drift

    @property
    def verdict(self) -> str:
        """One of "slower", "faster", "same" and "busy" (not judged)."""
        if self.busy:
            return "busy"
        if self.factor > 1 + self.noise:
            return "slower"
        return "faster" if self.factor < 1 / (1 + self.noise) else "same"


@dataclass(frozen=True)
class Comparison:
    """Changes of the cases in both runs, and the names of cases in only one of them."""

    changes: Sequence[Change]
    only_before: Sequence[str]
    only_after: Sequence[str]
    warnings: Sequence[str]

    @property
    def slower(self) -> list[Change]:
        """Cases that became slower, the largest factor first."""
        found = [change for change in self.changes if change.verdict == "slower"]
        return sorted(found, key=lambda change: -change.factor)


class NotComparableError(Exception):
    """Two runs differ in device or mode."""


def compare(before: Run, after: Run) -> Comparison:
    """Compare two runs."""
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
    on_device = new.info.get("peers_on_device", [])
    peers = [name for name in new.peer_times if name in old.peer_times and name in on_device]
    quotients = [new.times[name].median / old.times[name].median for name in peers]
    drift = geometric_mean(quotients) if peers else 1.0
    parts = [case.times[OURS].noise for case in (old, new)]
    parts += [case.times[name].noise / len(peers) for name in peers for case in (old, new)]
    noise = max(_MIN_NOISE[kind], _NOISE_FACTOR * math.sqrt(sum(part * part for part in parts)))
    others = max(case.info.get("others_cores", 0.0) for case in (old, new))
    busy = kind == "cpu" and others > _QUIET
    return Change(new.name, old.ours.median, new.ours.median, drift, noise, busy)


def text(found: Comparison) -> str:
    """The comparison as Markdown, slower cases first."""
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
        parts.append(f"{busy} not judged: other processes used more than 0.1 cores")
    for title, changes in (("Slower", slower), ("Faster", faster)):
        if changes:
            header = ["case", "before (ms)", "after (ms)", "drift", "change / drift", "noise"]
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
    parts += [f"The runs differ in {warning}" for warning in found.warnings]
    for title, names in (("before", found.only_before), ("after", found.only_after)):
        if names:
            parts.append(f"Only {title}: {', '.join(names)}")
    return "\n\n".join(parts)
