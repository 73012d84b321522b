"""Prints the public names of the installed segkernels: signatures and defaults without annotations.

    python .ci/public_names.py > after.txt

Compare the outputs of two versions to see whether a change keeps the interface.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import typer

import segkernels
import segkernels.nn
from segkernels import models
from segkernels.cli import app


def signature(function: Any) -> str:
    """The parameters and defaults of a function or class, or "" if Python does not know them."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return re.sub(r" at 0x\w+", "", str(inspect.Signature(bare)))


def show(name: str, value: Any) -> None:
    """Print a function, or a class with its public members, inherited ones of ours included."""
    print(name, signature(value) if callable(value) else repr(value))
    if not inspect.isclass(value):
        return
    ours = [c for c in value.__mro__ if c.__module__.startswith("segkernels")]
    members = {key: member for c in reversed(ours) for key, member in vars(c).items()}
    for key in sorted(key for key in members if not key.startswith("_")):
        member = getattr(members[key], "__func__", members[key])
        print(f"  .{key}", signature(member) if callable(member) else type(member).__name__)


for module in (segkernels, segkernels.nn, models):
    for key, value in sorted(vars(module).items()):
        if not (key.startswith("_") or inspect.ismodule(value) or key == "annotations"):
            show(f"{module.__name__}.{key}", value)
print("models", *models.list_models())
for key, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
    print("command", key)
    for option in command.params:
        print("  ", *option.opts, *option.secondary_opts, repr(option.default))
