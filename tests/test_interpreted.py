"""Runs the tests marked `interpreted` in a subprocess with Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import interpreter

HERE = Path(__file__).resolve().parent

# Files with such tests, and the minimum number of tests that pass in each.
LEAST = {
    "ops/test_dilated_conv2d_epilogue.py": 55,
    "ops/test_gaussian_filter.py": 160,
    "ops/test_gaussian_filter_triton.py": 5,
    "test_crf_exact.py": 20,
}
SLOW = {"ops/test_gaussian_filter.py"}


def test_every_interpreted_file_is_listed() -> None:
    line = "\nfrom emulation import interpreter\n"
    found = {file for file in HERE.rglob("test_*.py") if line in file.read_text()}
    assert found == {Path(__file__).resolve(), *(HERE / name for name in LEAST)}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LEAST]
)
def test_interpreted(name: str) -> None:
    if interpreter.problem():
        pytest.skip(interpreter.problem())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted", name],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    passed = re.match(r"(\d+) passed", last)
    assert passed is not None, last
    assert "skipped" not in last
    assert int(passed[1]) >= LEAST[name]
