"""Exports a module to ONNX and runs it in onnxruntime. Tests that do so are skipped without it."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(
    module: nn.Module, args: Sequence[torch.Tensor], *, dynamo: bool = True, shapes: Any = None
) -> Any:
    """Return a session of onnxruntime; `shapes` are the dynamic_shapes of torch.export."""
    for package in PACKAGES:
        pytest.importorskip(package, reason="pip install '.[onnx]'")
    file, more = io.BytesIO(), {"dynamic_shapes": shapes} if dynamo else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated
        torch.onnx.export(module, tuple(args), file, dynamo=dynamo, verbose=False, **more)
    return load(file.getvalue())


def load(model: bytes | str) -> Any:
    onnxruntime = importlib.import_module("onnxruntime")
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def run(session: Any, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    names = [given.name for given in session.get_inputs()]
    # The TorchScript exporter leaves out last arguments of which only the size is read.
    found = session.run(None, {n: t.numpy() for n, t in zip(names, args, strict=False)})
    return [torch.from_numpy(out) for out in found]
