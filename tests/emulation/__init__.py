"""The CUDA code on CPU tensors, by a _C that was built with SEGKERNELS_CUDA=emulated: README.md."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from segkernels import _native, _status
from segkernels.ops.dilated_conv2d import cudnn, hopper

# What every launch must be on: neither is what a launch has that forgets it.
DEVICE, STREAM = 3, 0x5EC0DE0
MULTIPROCESSORS = 6  # of the Hopper model: few, so that small convolutions have several rounds


# For `device` of a test: tests/conftest.py leaves out what cannot run, and turns the emulation on.
EMULATED = pytest.param("cpu", id="emulated", marks=pytest.mark.emulated)
ON_CUDA = [pytest.param("cuda", marks=pytest.mark.gpu), EMULATED]
DEVICES = ["cpu", *ON_CUDA]


def available() -> bool:
    """Whether _C has the emulation."""
    return not _native.problem() and str(_native.C().build_info()["cuda"]).startswith("emulated")


def library() -> ctypes.CDLL:
    """What scheduler.cpp exports."""
    return ctypes.CDLL(_native.C().__file__)


_captures = False
_where, _device_words = _native.where, _status._device_words


def _emulated_where(tensor: torch.Tensor) -> tuple[int, int, int]:
    return (DEVICE, STREAM, 0) if tensor.is_cpu else _where(tensor)


def _emulated_words(device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return _device_words(device)
    if device not in _status._words:
        address = _native.C().status_words(DEVICE)
        memory = (ctypes.c_int32 * len(_status._MESSAGES)).from_address(address)
        _status._words[device] = torch.frombuffer(memory, dtype=torch.int32)
    return _status._words[device]


@contextlib.contextmanager
def emulated(on: bool = True, cooperative: bool = True) -> Iterator[None]:
    """Within: the CUDA code computes what is on the CPU; or, `on=False`, the CPU's does again.

    Args:
        on: whether.
        cooperative: whether the device has cooperative launches.
    """
    emulation = {
        (_native, "where"): _emulated_where,
        (_native, "on_cuda"): lambda device: device.type in ("cpu", "cuda"),
        (_native, "capturing"): lambda device: _captures,
        (_status, "_device_words"): _emulated_words,
        (hopper, "_capability"): lambda index: (9, 0),
        (hopper, "_multiprocessors"): lambda index: MULTIPROCESSORS,
        (hopper, "_table"): functools.lru_cache(hopper._table.__wrapped__),
        (hopper, "_captured"): {},
        (torch.cuda, "synchronize"): lambda device=None: None,
        (cudnn, "_fused_epilogue"): lambda: None,  # Triton's: interpreter.py
    }
    with contextlib.ExitStack() as stack:
        for (module, name), value in (emulation if on else _CPU).items():
            stack.enter_context(patch.object(module, name, value))
        if on:
            native = library()
            stack.enter_context(patch.object(_status, "_words", dict(_status._words)))
            native.emulation_expect(DEVICE, ctypes.c_void_p(STREAM))
            native.emulation_cooperative(int(cooperative))
            stack.callback(native.emulation_cooperative, 1)
        yield


_CPU: dict[tuple[Any, str], Any] = {
    (_native, "where"): _where,
    (_native, "on_cuda"): _native.on_cuda,
    (_native, "capturing"): _native.capturing,
}


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """Within: as while a CUDA graph is captured. What waits for the device is refused."""
    global _captures
    native = library()
    _captures = True
    native.emulation_capture(1)
    try:
        yield
    finally:
        _captures = False
        native.emulation_capture(0)
