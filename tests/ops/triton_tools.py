"""Helpers for the Triton tests: compile ahead of time, run ptxas, record compile keys."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

triton: Any = pytest.importorskip("triton", reason="Triton is for Linux")

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def compiled(
    kernel: Any,
    types: dict[str, Any],
    constants: dict[str, Any],
    arch: int,
    warps: int,
    stages: int = 3,
) -> Any:
    """Compile `kernel` ahead of time.

    Pointers, and the integers that Triton specialises, are taken as divisible by 16, as for tensors
    from torch's allocator.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }

    def aligned(name: str) -> bool:
        kind = signature[name]
        return str(kind).startswith("*") or (kind == "i32" and name not in kernel.do_not_specialize)

    hints = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if aligned(name)
    }
    source = ASTSource(kernel, signature, constants, hints)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


class Report(NamedTuple):
    """Output of `ptxas -v`: registers per thread, bytes of stack, spill stores and spill loads."""

    registers: int
    stack: int
    stores: int
    loads: int

    @property
    def spilled(self) -> int:
        return max(self.stack, self.stores, self.loads)


def ptxas(ptx: str, folder: Path) -> Report:
    """Assemble `ptx` and return ptxas's report on the kernel."""
    (folder / "kernel.ptx").write_text(ptx)
    # The newest ptxas, which sorts last, accepts every PTX version that Triton writes.
    tool = max(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    done = subprocess.run(
        [tool, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    registers = re.search(r"Used (\d+) registers", done.stderr)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) .*stores, (\d+)", done.stderr)
    assert registers is not None
    assert frame is not None
    return Report(int(registers[1]), *map(int, frame.groups()))


def note_compiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record the name and the specialisation key of each Triton launch, for an H100.

    Launches accept CPU tensors then, and compute nothing.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: list[tuple[str, str]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialization, rest = bind(*args, **options)
        found.append((self.__name__, f"{specialization} {rest}"))

    monkeypatch.setattr(JITFunction, "run", run)
    h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    return found
