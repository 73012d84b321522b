"""The floating dtypes that native functions take, as they number them."""

from __future__ import annotations

import torch

# enum class ScalarType in csrc/common/scalar.h
FLOATING = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def names() -> tuple[str, ...]:
    """The dtypes of `FLOATING` by their names in torch."""
    return tuple(str(dtype).removeprefix("torch.") for dtype in FLOATING)
