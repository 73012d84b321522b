"""FLOP formulas for `torch.utils.flop_counter.FlopCounterMode`.

The formulas are registered when torch.utils.flop_counter is imported. That module imports Triton,
which takes a third of a second, so `import segkernels` does not import it.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def register(name: str, formula: Callable[..., int]) -> None:
    """Count the operator "segkernels::<name>" by `formula`.

    The formula receives the operator's arguments with shapes in place of tensors, and `out_shape`.
    """
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _register_with(sys.modules[_COUNTER])


def _register_with(counter: Any) -> None:
    while _formulas:
        name, formula = _formulas.popitem()
        counter.register_flop_formula(getattr(torch.ops.segkernels, name))(formula)


class _ImportHook(importlib.abc.MetaPathFinder):
    """Registers the formulas right after torch.utils.flop_counter is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the counter's own spec with an extended loader; None for any other module."""
        if name != _COUNTER:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _register_with(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _ImportHook())
