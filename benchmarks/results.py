"""Reads runs from pytest-benchmark's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "segkernels"
_DIGITS = 4


@dataclass(frozen=True)
class Time:
    """Times of one implementation in milliseconds: first quartile, median, third quartile."""

    low: float
    median: float
    high: float

    @property
    def noise(self) -> float:
        """Half of the interquartile range divided by the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Attributes:
        key: pytest's test id, the same in every run.
        op: name of the bench file, without "bench_".
        test: name of the test function, without "test_".
        name: name in reports.
        times: by implementation; `OURS` is segkernels.
        rounds: number of rounds.
        info: all other entries of `extra_info`.
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
        """The time of segkernels."""
        return self.times[OURS]

    @property
    def peer_times(self) -> dict[str, Time]:
        """The times of other implementations, without segkernels in other settings."""
        return {name: t for name, t in self.times.items() if not name.startswith(OURS)}

    def ratio(self, name: str) -> float:
        """Median time of an implementation divided by that of segkernels."""
        return self.times[name].median / self.ours.median

    def separated(self, name: str) -> bool:
        """Whether its interquartile range and that of segkernels do not overlap."""
        return self.times[name].low > self.ours.high or self.times[name].high < self.ours.low


@dataclass(frozen=True)
class Run:
    """A run: its setting (device, versions, command) and its cases."""

    setting: dict[str, Any]
    cases: list[Case]

    def ops(self) -> dict[str, list[Case]]:
        """Cases by operator, without the points of scaling curves."""
        found: dict[str, list[Case]] = {}
        for case in self.cases:
            if "curve" not in case.info:
                found.setdefault(case.op, []).append(case)
        return found

    def peers(self, cases: list[Case] | None = None) -> list[str]:
        """Names of the other implementations, in order of appearance."""
        cases = self.cases if cases is None else cases
        return list(dict.fromkeys(name for case in cases for name in case.times if name != OURS))


class NotARunError(Exception):
    """A file is not the JSON of a run of these benchmarks."""


def load(path: Path) -> Run:
    """Read pytest-benchmark's JSON, complete or reduced by `trim`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Run(data["segkernels"], [_case(entry) for entry in data["benchmarks"]])
    except OSError as error:
        raise NotARunError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NotARunError(
            f"{path} is not the JSON of a run of these benchmarks ({type(error).__name__}: "
            f"{error}); pytest benchmarks --benchmark-only --benchmark-json=FILE writes one"
        ) from error


def _case(entry: dict[str, Any]) -> Case:
    info = dict(entry["extra_info"])
    path, _, test = entry["fullname"].partition("::")
    times = {name: Time(*quartiles) for name, quartiles in info.pop("times_ms").items()}
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
    """Reduce pytest-benchmark's JSON to what is committed: no host names, no single rounds."""
    data = json.loads(path.read_text(encoding="utf-8"))
    entries = [
        {
            "fullname": entry["fullname"],
            "stats": {"rounds": entry["stats"]["rounds"]},
            "extra_info": entry["extra_info"],
        }
        for entry in data["benchmarks"]
    ]
    trimmed: dict[str, Any] = _rounded({"segkernels": data["segkernels"], "benchmarks": entries})
    return trimmed


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
