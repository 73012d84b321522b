"""Triton's kernels on CPU tensors, by its interpreter: for tests that are marked `interpreted`.

Triton reads TRITON_INTERPRET when it is imported, so they run in a process of their own:
`TRITON_INTERPRET=1 pytest -m interpreted`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch

from segkernels import _native, _status

# For `device` of a test: tests/conftest.py leaves out what cannot run, and turns this on.
ON_TRITON = [
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cpu", id="interpreted", marks=pytest.mark.interpreted),
]
DEVICES = ["cpu", *ON_TRITON]
on_triton = pytest.mark.parametrize("device", ON_TRITON, indirect=True)


def on() -> bool:
    """Whether this process is one for the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def problem() -> str:
    """Why the interpreter cannot run here, or ""."""
    try:
        import triton
    except ImportError:
        return "Triton is for Linux"
    versions = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        return "Triton before 3.7 takes a loop's bounds as numpy before 2.4 allows it"
    return ""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within: Triton's kernels compute what is on the CPU. Native code for CUDA does not run."""
    if problem():
        pytest.skip(problem())
    device = SimpleNamespace(multi_processor_count=2)  # so few that splits of a list are uneven
    seams: dict[tuple[Any, str], Any] = {
        (_native, "on_cuda"): lambda device: device.type in ("cpu", "cuda"),
        (_native, "has_cuda"): lambda: False,  # the status words are torch's then
        (_status, "_words"): {},
        (torch.cuda, "get_device_properties"): lambda _: device,
        (torch.cuda, "synchronize"): lambda _=None: None,
    }
    with contextlib.ExitStack() as stack:
        for (module, name), value in seams.items():
            stack.enter_context(patch.object(module, name, value))
        yield
