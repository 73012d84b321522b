"""Peak memory of a call beyond its inputs."""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import multiprocessing.pool
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Prepares the inputs, and returns the call.
Prepare = Callable[..., Callable[[], Any]]

_STATUS = Path("/proc/self/status")


def peak_bytes(prepare: Prepare, *args: Any, device: torch.device) -> int | None:
    """Bytes that `prepare(*args)()` needs at its worst, its result included, its inputs not.

    On CUDA what torch's allocator gave out. On the CPU the growth of the resident set in another
    process, after one call that loads libraries and starts threads; only Linux tells it, None
    elsewhere.

    Args:
        prepare: a function of a module, so that another process can import it.
        args: its arguments.
        device: where the call runs.
    """
    if device.type == "cuda":
        return cuda_peak(prepare(*args), device)
    if sys.platform != "linux":
        return None
    return _worker().apply(_resident_growth, (prepare, args, torch.get_num_threads()))


def cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes of torch's allocator that `call` needs at its worst, beyond what is there before."""
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


@functools.cache
def _worker() -> multiprocessing.pool.Pool:
    """One process for all cases of a run: torch's import would take most of the time."""
    return multiprocessing.get_context("spawn").Pool(1)


def _resident_growth(prepare: Prepare, args: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    call = prepare(*args)
    call()
    gc.collect()
    # What the first call freed must be given back, or the second takes it and seems to need less.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM")
    del result
    return peak - before


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")
