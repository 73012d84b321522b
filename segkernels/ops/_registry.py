"""Registry of the operators.

`segkernels info` prints it, and tests check every operator against its entry.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from segkernels.ops import _dtypes


@dataclass(frozen=True, kw_only=True)
class Op:
    """The registry entry of an operator, made by its package segkernels/ops/<name>/__init__.py.

    Attributes:
        name: name of its folder or file in csrc/, segkernels/ops/, tests/ops/ and benchmarks/.
        functions: public names in segkernels that call it.
        backends: pairs of device and implementation: ("cpu", "c++ simd"), ("cuda", "c++"),
            ("cuda", "triton").
        dtypes: names of the supported dtypes in torch, such as "float32".
        layouts: memory layouts that are read without a copy: "contiguous", "channels_last",
            "strided".
        deterministic: whether equal calls give equal bits, forward and backward.
        differentiable: arguments that receive gradients.
        library_ops: torch.library operators that it defines ("segkernels::name"). Each has a fake
            kernel.
        note: limits and behaviour that the other fields do not cover.
    """

    name: str
    functions: tuple[str, ...]
    backends: tuple[tuple[str, str], ...]
    dtypes: tuple[str, ...] = _dtypes.names()
    layouts: tuple[str, ...]
    deterministic: bool = True
    differentiable: tuple[str, ...] = ()
    library_ops: tuple[str, ...] = ()
    note: str = ""


_ops: dict[str, Op] = {}


def register(op: Op) -> None:
    """Add `op` to the registry.

    Raises:
        ValueError: an operator of that name is registered.
    """
    if op.name in _ops:
        raise ValueError(f"register: name must not be registered already, got {op.name!r}")
    _ops[op.name] = op


def packages() -> list[str]:
    """Return the sorted names of the packages under segkernels/ops/, imported or not."""
    modules = pkgutil.iter_modules(importlib.import_module("segkernels.ops").__path__)
    return sorted(module.name for module in modules if module.ispkg)


def ops() -> list[Op]:
    """Return every operator, sorted by name. Imports packages that are not imported yet."""
    for name in packages():
        importlib.import_module(f"segkernels.ops.{name}")
    return [_ops[name] for name in sorted(_ops)]
