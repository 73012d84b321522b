"""Lower bounds of run times, from the copy rate and matmul rate measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
    """A lower bound of the time of a call, and what determines it: "bytes" or "flops"."""

    seconds: float
    by: str


def floor(moved: int = 0, flops: int = 0, dtype: str = "float32") -> Floor | None:
    """Lower bound of the time of a call on the device of this run; None if nothing is given.

    Args:
        moved: bytes to read each input once and write each output once.
        flops: necessary FLOPs; a multiply-add counts as two.
        dtype: dtype of the multiplications: "float32", "tf32", "bfloat16", "float16".
    """
    found = []
    if moved:
        found.append(Floor(moved / copy_rate(clock.device, moved), "bytes"))
    if flops:
        found.append(Floor(flops / matmul_rate(clock.device, dtype), "flops"))
    return max(found, key=lambda floor: floor.seconds, default=None)


def convolution_flops(flops: int, dtype: str) -> dict[str, Any]:
    """Arguments of `measure` for a convolution in `dtype`; on CUDA torch uses TF32 for float32."""
    tf32 = dtype == "float32" and clock.device.type == "cuda"
    return {"flops": flops, "flops_dtype": "tf32" if tf32 else dtype}


def copy_rate(device: torch.device, moved: int = 2 * _GIB) -> float:
    """Copy rate of the device in bytes per second; bytes read and bytes written both count.

    On CUDA: a copy between two 1 GiB buffers. On the CPU: a copy by torch, with its threads, of as
    many bytes as the case moves (rounded up to a power of two), with warm caches as in the call.
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
    """FLOPs per second of a matmul: size 8192 on CUDA (4096 in float32), 1024 on the CPU."""
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
    """All rates measured in this run, by name, for the report."""
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
