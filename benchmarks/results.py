"""What pytest-benchmark's JSON says of a run, made ready for reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "segkernels"
_DIGITS = 4


@dataclass(frozen=True)
class Time:
    """Of one implementation, in milliseconds: first quartile, median, third quartile."""

    low: float
    median: float
    high: float

    @property
    def noise(self) -> float:
        """Half of the middle half's width, over the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Attributes:
        key: pytest's name of it, the same in every run.
        op: of which bench file.
        test: of which test function in it.
        name: in words.
        times: by implementation; ours is `OURS`.
        info: all else that `measure` noted.
    """

    key: str
    op: str
    test: str
    name: str
    times: dict[str, Time]
    rounds: int
    info: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def ours(self) -> Time:
        """The time of ours."""
        return self.times[OURS]

    @property
    def rivals(self) -> dict[str, Time]:
        """The times of others: not of ours with another setting."""
        return {name: t for name, t in self.times.items() if not name.startswith(OURS)}

    def ratio(self, name: str) -> float:
        """How many times as long as ours an implementation takes."""
        return self.times[name].median / self.ours.median

    def told_apart(self, name: str) -> bool:
        """Whether the middle halves of its times and of ours do not meet."""
        return self.times[name].low > self.ours.high or self.times[name].high < self.ours.low


@dataclass(frozen=True)
class Run:
    """A run: what it was made on, and its cases."""

    setting: dict[str, Any]
    cases: list[Case]

    def ops(self) -> dict[str, list[Case]]:
        """Cases by operator, but for those that only draw a curve."""
        found: dict[str, list[Case]] = {}
        for case in self.cases:
            if "curve" not in case.info:
                found.setdefault(case.op, []).append(case)
        return found

    def peers(self, cases: list[Case] | None = None) -> list[str]:
        """Names of the other implementations, in the order in which they come."""
        among = self.cases if cases is None else cases
        return list(dict.fromkeys(name for case in among for name in case.times if name != OURS))


class NotARunError(Exception):
    """A file is not the JSON of a run of these benchmarks."""


def load(path: Path) -> Run:
    """Read pytest-benchmark's JSON, or what `trim` left of it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Run(data["segkernels"], [_case(entry) for entry in data["benchmarks"]])
    except OSError as error:
        raise NotARunError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NotARunError(
            f"{path} is not the JSON of a run of these benchmarks ({_said(error)}); "
            "pytest benchmarks --benchmark-only --benchmark-json=FILE writes one"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _case(entry: dict[str, Any]) -> Case:
    info = dict(entry["extra_info"])
    path, _, test = entry["fullname"].partition("::")
    times = {name: Time(*spread) for name, spread in info.pop("times_ms").items()}
    return Case(
        key=f"{Path(path).name}::{test}",
        op=Path(path).stem.removeprefix("bench_"),
        test=test.partition("[")[0].removeprefix("test_"),
        name=info.pop("case"),
        times=times,
        rounds=entry["stats"]["rounds"],
        info=info,
    )


def trim(path: Path) -> dict[str, Any]:
    """What of pytest-benchmark's JSON is worth keeping: no names of machines, no single rounds."""
    data = json.loads(path.read_text(encoding="utf-8"))
    entries = [
        {
            "fullname": entry["fullname"],
            "stats": {"rounds": entry["stats"]["rounds"]},
            "extra_info": entry["extra_info"],
        }
        for entry in data["benchmarks"]
    ]
    kept: dict[str, Any] = _rounded({"segkernels": data["segkernels"], "benchmarks": entries})
    return kept


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
