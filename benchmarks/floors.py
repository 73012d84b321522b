"""What a device can do at best, measured in the run itself: its copy rate and its matmul rate."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timing import clock, event_times, wall_time

_GIB = 2**30
_SMALLEST, _LARGEST = 2**20, 2**28  # bytes copied on the CPU
_CUDA_COPIES, _CPU_COPIES = 20, 7
_MATMULS = 10

_copies: dict[tuple[torch.device, int], float] = {}
_matmuls: dict[tuple[torch.device, str], float] = {}


@dataclass(frozen=True)
class Floor:
    """The least time that a call could take, and what sets it: "bytes" or "flops"."""

    seconds: float
    by: str


def floor(moved: int = 0, flops: int = 0, dtype: str = "float32") -> Floor | None:
    """The floor of a call on the device of this run.

    Args:
        moved: bytes; each input read once, each output written once.
        flops: useful ones, a multiplication and an addition counted as two.
        dtype: of the products: "float32", "tf32", "bfloat16", "float16".
    """
    found = []
    if moved:
        found.append(Floor(moved / copy_rate(clock.device, moved), "bytes"))
    if flops:
        found.append(Floor(flops / matmul_rate(clock.device, dtype), "flops"))
    return max(found, key=lambda floor: floor.seconds, default=None)


def copy_rate(device: torch.device, moved: int = 2 * _GIB) -> float:
    """Bytes a second that the device copies, read and written ones counted.

    On CUDA from a 1 GiB buffer to another. On the CPU by torch, with its threads, as many bytes as
    the case moves (to a power of two) and with warm caches: what the call finds too.
    """
    if device.type == "cuda":
        size = 2 * _GIB
    else:
        size = min(_LARGEST, max(_SMALLEST, 1 << (max(1, moved) - 1).bit_length()))
    key = device, size
    if key not in _copies:
        source = torch.empty(size // 8, dtype=torch.float32, device=device).normal_()
        target = torch.empty_like(source)

        def copy() -> torch.Tensor:
            return target.copy_(source)

        copy()
        if device.type == "cuda":
            taken = statistics.median(event_times(copy, device, _CUDA_COPIES))
        else:
            repeat = max(1, 2**24 // size)
            taken = min(wall_time(copy, repeat) for _ in range(_CPU_COPIES))
        _copies[key] = 2 * source.nbytes / taken
    return _copies[key]


def matmul_rate(device: torch.device, dtype: str) -> float:
    """FLOPs a second of a large square matmul: 8192 on CUDA (4096 in float32), 1024 on the CPU."""
    key = device, dtype
    if key not in _matmuls:
        size = 1024 if device.type == "cpu" else 4096 if dtype == "float32" else 8192
        kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        a = torch.randn(size, size, device=device).to(kind)
        b = torch.randn(size, size, device=device).to(kind)
        out = torch.empty_like(a)

        def multiply() -> torch.Tensor:
            return torch.mm(a, b, out=out)

        with _tf32(dtype == "tf32"):
            multiply()
            if device.type == "cuda":
                taken = statistics.median(event_times(multiply, device, _MATMULS))
            else:
                taken = min(wall_time(multiply) for _ in range(_MATMULS))
        _matmuls[key] = 2 * size**3 / taken
    return _matmuls[key]


def measured() -> dict[str, float]:
    """Every rate that this run measured, by name, for its report."""
    copies = sorted(_copies.items(), key=lambda entry: entry[0][1])
    rates = {f"copy of {size // 2**20} MiB, GB/s": rate / 1e9 for (_, size), rate in copies}
    rates |= {f"matmul {dtype}, TFLOP/s": rate / 1e12 for (_, dtype), rate in _matmuls.items()}
    return rates


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
