"""Shared test configuration: test selection, the device fixtures and the random seed.

Tests marked `nightly` are deselected unless `--nightly` or `-m` selects them, and tests marked
`gpu` where torch sees no GPU, unless `--gpu` is given. Tests marked `emulated` need a _C built with
the CUDA emulation (tests/emulation), tests marked `interpreted` need Triton's interpreter.
Hypothesis runs 25 fixed examples per property, or 200 random ones in nightly runs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Several threads make small tensors slower, most of all torch's, which spin while they wait. Tests
# about threads set their own number, and torch's sleep then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import emulation
import hypothesis
import pytest
import torch
from emulation import interpreter

import segkernels
from segkernels import _native, _threads

# Inductor caches code for 8 and for 16 vector lanes under the same key, and running one in place of
# the other crashes. So use one cache folder per CPU capability (limited by ATEN_CPU_CAPABILITY).
_folder = f"segkernels-inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _folder))

# Tests use the threads that they set, on a machine with fewer cores too.
_usable_cores = _threads.usable_cores
_threads.usable_cores = lambda: 64

# The first call may compile or warm up, so a deadline per example would be flaky.
hypothesis.settings.register_profile(
    "quick", deadline=None, print_blob=True, max_examples=25, derandomize=True
)
hypothesis.settings.register_profile("nightly", deadline=None, print_blob=True, max_examples=200)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run what is marked nightly as well")
    parser.addoption("--gpu", action="store_true", help="collect the gpu tests without a GPU too")


def _nightly(config: pytest.Config) -> bool:
    return bool(config.getoption("--nightly") or re.search(r"\bnightly\b", config.option.markexpr))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-profile") is None:
        hypothesis.settings.load_profile("nightly" if _nightly(config) else "quick")


def pytest_report_header() -> str:
    built = _native.problem() or json.dumps(_native.C().build_info())
    return f"torch {torch.__version__}, segkernels._C: {built}"


@pytest.hookimpl(tryfirst=True)  # before pytest's own -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = {"nightly"} - ({"nightly"} if _nightly(config) else set())
    # With a GPU, but segkernels built without CUDA, the gpu tests must run and fail.
    if not config.getoption("--gpu") and not torch.cuda.is_available():
        unwanted.add("gpu")
    if not emulation.available():
        unwanted.add("emulated")
    if not interpreter.on():
        unwanted.add("interpreted")
    kept = [item for item in items if not any(map(item.get_closest_marker, unwanted))]
    left_out = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = kept


def pytest_sessionfinish() -> None:
    """Add this run's launch counts to the file that tests/emulation/coverage.py reads."""
    if (counts := os.environ.get("SK_EMULATION_COUNTS")) and emulation.available():
        emulation.library().emulation_count(os.fsencode(counts))


@pytest.fixture(autouse=True)
def _seed_and_threads() -> Iterator[None]:
    """Set the seed before each test, and restore the number of threads after it."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run tests marked `emulated` or `interpreted` with the CUDA code on CPU tensors."""
    with contextlib.ExitStack() as stack:
        if request.node.get_closest_marker("emulated"):
            stack.enter_context(emulation.emulated())
        if request.node.get_closest_marker("interpreted"):
            stack.enter_context(interpreter.interpreted())
        yield


@pytest.fixture(autouse=True)
def _no_status_word_is_left(request: pytest.FixtureRequest, _emulated: None) -> Iterator[None]:
    """Fail a CUDA test that leaves a status word set, so that no later test reports it."""
    if not any(map(request.node.get_closest_marker, ("gpu", "emulated", "interpreted"))):
        yield
        return
    with contextlib.suppress(ValueError):
        segkernels.check()
    yield
    segkernels.check()


@pytest.fixture
def usable_cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The function of that name, in use, and with nothing remembered."""
    monkeypatch.setattr(_threads, "usable_cores", _usable_cores)
    monkeypatch.setattr(_threads, "_refresh_at", -math.inf)
    return _usable_cores


@pytest.fixture
def exact_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make cuDNN's float32 convolutions deterministic, without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    conv: Any = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


@pytest.fixture(params=emulation.DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, CUDA and the CUDA code emulated on the CPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def build_tools() -> ModuleType:
    """The package build_tools, which is not installed."""
    # Only temporarily on sys.path: the repository root would hide the installed package.
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        importlib.import_module("build_tools.cuda")
        importlib.import_module("build_tools.ninja_build")
        return importlib.import_module("build_tools")
    finally:
        sys.path.remove(root)


@pytest.fixture(params=emulation.ON_CUDA)
def hopper_device(request: pytest.FixtureRequest) -> str:
    """The device of a Hopper GPU, or of its model on the CPU."""
    if request.param == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        assert _native.C().has_sm90a, "built without sm_90a on a machine with a Hopper"
    return str(request.param)
