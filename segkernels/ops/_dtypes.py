"""The floating dtypes that native functions support, and their numbers in the native code."""

from __future__ import annotations

import torch

# enum class ScalarType in csrc/common/scalar.h
FLOATING = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that `dtype` is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def names() -> tuple[str, ...]:
    """Return the names of the dtypes in `FLOATING`, such as "float32"."""
    return tuple(str(dtype).removeprefix("torch.") for dtype in FLOATING)
