"""Formulas for `torch.utils.flop_counter.FlopCounterMode`.

They are registered when that module is imported: it imports Triton, which takes a third of a second
that `import segkernels` should not.
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
    """Count "segkernels::<name>" by `formula`, of its arguments with shapes for tensors."""
    _formulas[name] = formula
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])


def _hand_over(counter: Any) -> None:
    while _formulas:
        name, formula = _formulas.popitem()
        counter.register_flop_formula(getattr(torch.ops.segkernels, name))(formula)


class _Watch(importlib.abc.MetaPathFinder):
    """Hands the formulas over behind the import of the counter."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The counter's own spec, whose loader then hands over; None for any other module."""
        if name != _COUNTER:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _hand_over(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Watch())
