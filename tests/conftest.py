"""Shared by every test: devices, seeds, and what the run's header says."""

from __future__ import annotations

import json

import hypothesis
import pytest
import torch

from segkernels import _native

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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that segkernels runs on."""
    return torch.device(request.param)
