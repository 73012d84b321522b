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

#: A function that prepares the inputs and returns the call.
Prepare = Callable[..., Callable[[], Any]]

_STATUS = Path("/proc/self/status")


def peak_bytes(prepare: Prepare, *args: Any, device: torch.device) -> int | None:
    """Peak memory of `prepare(*args)()` in bytes, including its result, without its inputs.

    On CUDA: allocations by torch's allocator. On the CPU: growth of the resident set in another
    process during a second call (the first one loads libraries and starts threads); only measured
    on Linux, None elsewhere.

    Args:
        prepare: a module-level function, which another process can import.
        args: arguments of `prepare`.
        device: device of the call.
    """
    if device.type == "cuda":
        return cuda_peak(prepare(*args), device)
    if sys.platform != "linux":
        return None
    return _worker().apply(_resident_growth, (prepare, args, torch.get_num_threads()))


def cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes that `call` allocates with torch's allocator."""
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
    """One process for all cases of a run, because importing torch takes long."""
    return multiprocessing.get_context("spawn").Pool(1)


def _resident_growth(prepare: Prepare, args: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    call = prepare(*args)
    call()
    gc.collect()
    # Return freed memory to the system. Otherwise the second call reuses it and grows too little.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident set
    before = _resident("VmRSS")
    result = call()
    peak = _resident("VmHWM")
    del result
    return peak - before


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}")
