"""Load the compiled module `segkernels._C`, and record the reason when it cannot be loaded.

Importing this module never raises and never compiles. Code that needs native functions calls `C()`,
which raises RuntimeError with the reason and the remedy when they are not available.
"""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from segkernels._threads import num_threads
from segkernels._version import __version__

_REBUILD = "pip install --force-reinstall --no-deps . (in segkernels' source folder)"


def _load() -> tuple[ModuleType | None, str]:
    package = Path(__file__).resolve().parent
    if not any((package / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES):
        if (package.parent / "setup.py").is_file():
            return None, (
                f"Python imported segkernels from its source folder, {package.parent}, where it is "
                "not built. Start Python from another folder to use the installed package, or run "
                "`pip install -e .` there"
            )
        return None, f"{package} has no _C for this Python. Reinstall it: {_REBUILD}"
    try:
        module = importlib.import_module("segkernels._C")
    except ImportError as error:
        return None, f"{error}. Build it again for this Python: {_REBUILD}"
    built = module.build_info()["version"]
    if built != __version__:
        return None, (
            f"_C was built from segkernels {built}, the Python code is {__version__}. Build it "
            f"again: {_REBUILD}"
        )
    return module, ""


_module, _problem = _load()
_has_cuda = _module is not None and _module.build_info()["cuda"] is not None


def C() -> ModuleType:  # noqa: N802 - named after the module that it returns
    """Return the compiled module.

    Raises:
        RuntimeError: the module is missing or cannot be loaded. The message has the reason and the
            remedy.
    """
    if _module is None:
        raise RuntimeError(f"segkernels' native code is not available: {_problem}")
    return _module


def problem() -> str:
    """Return the reason why `C()` raises, or "" if it does not."""
    return _problem


def where(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return (device index, raw CUDA stream, CPU threads) for a native call on `tensor`.

    These are (-1, 0, `num_threads()`) for a CPU tensor, and (index of its device, current stream of
    that device, 0) for a CUDA tensor.

    Raises:
        RuntimeError: the tensor is neither on the CPU nor on CUDA, torch is a ROCm build, or the
            tensor is on CUDA and segkernels was built without CUDA.
    """
    if tensor.is_cpu:
        return -1, 0, num_threads()
    if tensor.is_cuda and _has_cuda and torch.version.hip is None:
        index = tensor.get_device()
        return index, torch._C._cuda_getCurrentRawStream(index), 0
    raise RuntimeError(_unsupported(tensor.device))


def on_cuda(device: torch.device) -> bool:
    """Whether tensors on `device` are computed by CUDA code (native or Triton)."""
    return device.type == "cuda"


def has_cuda() -> bool:
    """Whether the native code was built with CUDA."""
    return _has_cuda


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` captures a CUDA graph; False off CUDA."""
    if device.type != "cuda":
        return False
    # is_current_stream_capturing() looks at the current device only.
    if torch.cuda.current_device() == device.index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _unsupported(device: torch.device) -> str:
    if device.type != "cuda":
        return (
            f"segkernels runs on CPU and CUDA devices, got a tensor on {str(device)!r}; move it "
            "with .cpu() or .cuda()"
        )
    if torch.version.hip is not None:
        return (
            "segkernels runs on CPU and on NVIDIA GPUs; this torch is a ROCm build "
            f"({torch.__version__}), so move the tensor to the CPU with .cpu()"
        )
    if _module is None:
        return f"segkernels' native code is not available: {_problem}"
    return (
        "segkernels was built without CUDA, got a CUDA tensor. Build it again with a CUDA toolkit: "
        "SEGKERNELS_CUDA=1 pip install --force-reinstall --no-deps . (in its source folder), or "
        f"move the tensor to the CPU. At its build: {_module.build_info()['cuda_missing']}"
    )
