"""The list of operators: what `segkernels info` prints and what tests hold every operator to."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """One operator, as its package segkernels/ops/<name>/__init__.py registers it.

    Attributes:
        name: its name in csrc/, segkernels/ops/, tests/ops/ and benchmarks/.
        functions: the public names, in segkernels, that it is reached by.
        backends: pairs of device and implementation, such as ("cpu", "c++ simd"), ("cuda", "c++")
            or ("cuda", "triton").
        dtypes: dtypes taken, by their names in torch ("float32").
        layouts: memory layouts taken without a copy ("contiguous", "channels_last", "strided").
        deterministic: whether the same call gives the same bits, forward and backward.
        differentiable: the arguments that gradients reach.
        library_ops: the torch.library operators it defines ("segkernels::name"); each has a fake.
        note: what a user should know and the fields above do not say.
    """

    name: str
    functions: tuple[str, ...]
    backends: tuple[tuple[str, str], ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    deterministic: bool
    differentiable: tuple[str, ...] = ()
    library_ops: tuple[str, ...] = ()
    note: str = ""


_ops: dict[str, Op] = {}


def register(op: Op) -> None:
    """Add `op` to the list. Raises ValueError when its name is taken."""
    if op.name in _ops:
        raise ValueError(f"an operator named {op.name!r} is registered already")
    _ops[op.name] = op


def packages() -> list[str]:
    """The operators that have a package under segkernels/ops/, registered or not, by name."""
    ops = importlib.import_module("segkernels.ops")
    found = pkgutil.iter_modules(ops.__path__)
    return sorted(module.name for module in found if module.ispkg)


def ops() -> list[Op]:
    """Every operator, by name; imports the packages that are not imported yet."""
    for name in packages():
        importlib.import_module(f"segkernels.ops.{name}")
    return [_ops[name] for name in sorted(_ops)]
