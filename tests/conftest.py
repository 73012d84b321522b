"""Shared by every test: which run, devices, seeds, and what the run's header says.

`pytest` leaves out what is marked `nightly`, unless `--nightly` or `-m` names it, what is marked
`gpu` where torch sees no GPU, unless `--gpu` is given, what is marked `emulated` where _C has
not the emulation of CUDA (tests/emulation), and what is marked `interpreted` where Triton does not
interpret. Hypothesis tries 25 examples, the same each time, and under `nightly` 200 new ones.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Small tensors on two threads cost three times the time of the processor: the threads wait by
# spinning. Tests that are about threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import emulation
import hypothesis
import pytest
import torch
from emulation import interpreter

import segkernels
from segkernels import _native

# Inductor keeps code for 8 and for 16 lanes under one key, and the one run as the other crashes: so
# a folder for each capability, which ATEN_CPU_CAPABILITY limits.
_folder = f"segkernels-inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _folder))

# A first call compiles or warms up something, so a per-example deadline would only flake.
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


@pytest.hookimpl(tryfirst=True)  # -m comes after it, and hides what it leaves out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = {"nightly"} - ({"nightly"} if _nightly(config) else set())
    # With a GPU but segkernels built without CUDA the gpu tests run, and must fail.
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
    """Add to the counts of launches that tests/emulation/coverage.py reads."""
    if (counts := os.environ.get("SK_EMULATION_COUNTS")) and emulation.available():
        emulation.library().emulation_count(os.fsencode(counts))


@pytest.fixture(autouse=True)
def _as_at_first() -> Iterator[None]:
    """The seed, and after a test the number of threads."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is marked `emulated` or `interpreted` computes on the CPU with the code for CUDA."""
    with contextlib.ExitStack() as stack:
        if request.node.get_closest_marker("emulated"):
            stack.enter_context(emulation.emulated())
        if request.node.get_closest_marker("interpreted"):
            stack.enter_context(interpreter.interpreted())
        yield


@pytest.fixture(autouse=True)
def _no_status_word_is_left(request: pytest.FixtureRequest, _emulated: None) -> Iterator[None]:
    """A fault that a test on CUDA leaves untold fails that test, and not a later one."""
    if not any(map(request.node.get_closest_marker, ("gpu", "emulated", "interpreted"))):
        yield
        return
    with contextlib.suppress(ValueError):
        segkernels.check()
    yield
    segkernels.check()


@pytest.fixture
def exact_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuDNN's convolutions of float32 multiply float32, by the same algorithm every time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    conv: Any = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


@pytest.fixture(params=emulation.DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that segkernels runs on, and the CUDA code on the CPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def build_tools() -> ModuleType:
    """The build's own package, which is not installed."""
    # Not through sys.path for good: the root would hide the installed package.
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    try:
        importlib.import_module("build_tools.cuda")
        importlib.import_module("build_tools.ninja_build")
        return importlib.import_module("build_tools")
    finally:
        sys.path.remove(root)


@pytest.fixture(params=emulation.ON_CUDA)
def hopper(request: pytest.FixtureRequest) -> str:
    """The device of a Hopper, and of its model on the CPU."""
    if request.param == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        assert _native.C().has_sm90a, "built without sm_90a on a machine with a Hopper"
    return str(request.param)
