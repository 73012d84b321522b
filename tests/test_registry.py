"""Every operator has a reference, a fake kernel, tests and a benchmark under its own name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch._library.simple_registry import singleton

import segkernels
import segkernels.ops
from segkernels.ops import _registry
from segkernels.ops._registry import Op

ROOT = Path(__file__).resolve().parent.parent


def has_fake(name: str) -> bool:
    """Whether the torch.library operator `name` has a fake kernel."""
    if singleton.find(name).fake_impl.kernel is not None:
        return True
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        for key in ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    )


def lacks(op: Op) -> list[str]:
    """Names of the parts that `op` lacks."""
    found = []
    if importlib.util.find_spec(f"segkernels.ops.{op.name}.reference") is None:
        found.append(f"segkernels/ops/{op.name}/reference.py")
    for needed in (f"tests/ops/test_{op.name}.py", f"benchmarks/bench_{op.name}.py"):
        if not (ROOT / needed).is_file():
            found.append(needed)
    for device, how in op.backends:
        sources = (ROOT / "csrc" / op.name, *(ROOT / "csrc").glob(f"*/{op.name}*.[ch]*"))
        if how.startswith("c++") and not any(path.exists() for path in sources):
            found.append(f"csrc/{op.name} or csrc/*/{op.name}* (for {device})")
        triton = f"segkernels.ops.{op.name}.triton_kernels"
        if how.startswith("triton") and importlib.util.find_spec(triton) is None:
            found.append(f"segkernels/ops/{op.name}/triton_kernels.py")
    found += [f"segkernels.{name}" for name in op.functions if not hasattr(segkernels, name)]
    if op.differentiable and not op.library_ops:
        found.append("a torch.library operator, though it is differentiable")
    found += [f"a fake kernel of {name}" for name in op.library_ops if not has_fake(name)]
    found += [f"torch.{name}" for name in op.dtypes if not hasattr(torch, name)]
    return found


def test_every_folder_is_a_registered_operator() -> None:
    folders = {
        path.name
        for root in segkernels.ops.__path__
        for path in Path(root).iterdir()
        if path.is_dir() and not path.name.startswith("__")
    }
    registered = {op.name for op in _registry.ops()}
    assert registered
    assert folders == registered


@pytest.mark.parametrize("op", _registry.ops(), ids=lambda op: op.name)
def test_operator_is_complete(op: Op) -> None:
    assert lacks(op) == []
    assert "cpu" in dict(op.backends)
    assert "cuda" in dict(op.backends)


def test_incomplete_operator_is_detected() -> None:
    with torch.library._scoped_library("segkernels_test", "DEF") as library:
        library.define("without_fake(Tensor x) -> Tensor")
        library.define("with_fake(Tensor x) -> Tensor")
        torch.library.register_fake("segkernels_test::with_fake", torch.empty_like, lib=library)
        op = Op(
            name="no_such_operator",
            functions=("no_such_function",),
            backends=(("cpu", "c++"), ("cuda", "triton")),
            dtypes=("float32",),
            layouts=("contiguous",),
            deterministic=True,
            differentiable=("x",),
            library_ops=("segkernels_test::without_fake", "segkernels_test::with_fake"),
        )
        # find_spec imports the parent package, which does not exist for this name.
        with pytest.raises(ModuleNotFoundError):
            lacks(op)
        known = Op(**{**vars(op), "name": _registry.ops()[0].name})
        found = lacks(known)
    assert "segkernels.no_such_function" in found
    assert "a fake kernel of segkernels_test::without_fake" in found
    assert "a fake kernel of segkernels_test::with_fake" not in found


def test_a_name_is_registered_once() -> None:
    op = _registry.ops()[0]
    with pytest.raises(ValueError, match=f"must not be registered already, got '{op.name}'"):
        _registry.register(op)
