"""Synthetic benchmark runs in the format of pytest-benchmark's JSON, for the tests of reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def case(
    name: str,
    ours: float,
    peers: dict[str, float] | None = None,
    width: float = 0.02,
    file: str = "bench_max_pool2d.py",
    test: str = "test_forward",
    **info: Any,
) -> dict[str, Any]:
    """A benchmark entry; times in ms, with quartiles `width` (relative) around the median."""
    times = {"segkernels": ours, **(peers or {})}
    return {
        "fullname": f"benchmarks/{file}::{test}[{name}]",
        "stats": {"rounds": 9, "data": [ours / 1e3] * 9, "median": ours / 1e3},
        "extra_info": {
            "case": name,
            "times_ms": {n: [t * (1 - width), t, t * (1 + width)] for n, t in times.items()},
            "peers_on_device": list(peers or {}),
            "peers_missing": {},
            "others_cores": 0.0,
            "rounds_thrown": 0,
            "source": "a paper",
            "checked_against": "torch, bit for bit",
            **info,
        },
    }


def run(*cases: dict[str, Any], **setting: Any) -> dict[str, Any]:
    """A run of `cases` on a CPU; `setting` overrides the defaults."""
    return {
        "machine_info": {"node": "secret-host", "cpu": {"brand_raw": "x"}},
        "commit_info": {"id": "0" * 40, "author_time": "today"},
        "datetime": "2026-01-02T03:04:05.678901+00:00",
        "benchmarks": list(cases),
        "segkernels": {
            "device": "A Processor",
            "device_kind": "cpu",
            "mode": "quick",
            "command": "pytest benchmarks --benchmark-only",
            "commit": "0123456789ab",
            "versions": {"segkernels": "0.1.0", "torch": "2.13.0"},
            "cpu": "A Processor",
            "cores": 2,
            "threads": 2,
            "cpu_capability": "AVX2",
            "OMP_WAIT_POLICY": None,
            "platform": "Linux 6",
            "date": "2026-01-02T03:04:05.678901+00:00",
            "rates": {"copy of 64 MiB, GB/s": 12.345678},
            **setting,
        },
    }


def write(path: Path, *cases: dict[str, Any], **setting: Any) -> Path:
    """Write `run(...)` to a file."""
    path.write_text(json.dumps(run(*cases, **setting)), encoding="utf-8")
    return path
