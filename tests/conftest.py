"""Shared by every test: devices, seeds, and what the run's header says."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

import segkernels
from segkernels import _native

# Inductor keeps code for 8 and for 16 lanes under one key, and the one run as the other crashes: so
# a folder for each capability, which ATEN_CPU_CAPABILITY limits.
_folder = f"segkernels-inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), _folder))

# A first call compiles or warms up something, so a per-example deadline would only flake.
hypothesis.settings.register_profile("segkernels", deadline=None, print_blob=True)
hypothesis.settings.load_profile("segkernels")


def pytest_report_header() -> str:
    built = _native.problem() or json.dumps(_native.C().build_info())
    return f"torch {torch.__version__}, segkernels._C: {built}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Not skipped where torch sees a GPU and segkernels was built without CUDA: that must fail.
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_status_word_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fault that a test on CUDA leaves untold fails that test, and not a later one."""
    if request.node.get_closest_marker("gpu") is None:
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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that segkernels runs on."""
    return torch.device(request.param)
