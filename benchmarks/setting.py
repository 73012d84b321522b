"""The setting of a run: device, driver, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import segkernels
from segkernels.cli import info

_PACKAGES = ("triton", "numpy", "pydensecrf2", "monai", "crfseg", "pykeops", "pytest-benchmark")
_HERE = Path(__file__).resolve().parent


def collect(device: torch.device, quick: bool) -> dict[str, Any]:
    """The setting at the top of a report, as JSON types."""
    cuda = device.type == "cuda"
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "device_kind": device.type,
        "mode": "quick" if quick else "full",
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "platform": f"{platform.system()} {platform.release().partition('-')[0]}",
    }
    if cuda:
        facts |= {
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        }
    return facts


def versions() -> dict[str, str]:
    """Versions of segkernels, Python, torch and the installed peers."""
    found = {
        "segkernels": segkernels.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command of this process, as run from the repository's root."""
    name, *rest = sys.argv
    path = Path(name)
    if path.name == "__main__.py":
        start = f"python -m {path.parent.name}"
    else:
        start = path.name if path.suffix != ".py" else f"python {path.parent.name}/{path.name}"
    # Remove paths of this machine.
    rest = [re.sub(r"=/.*/", "=", argument) for argument in rest]
    return " ".join([start, *map(shlex.quote, rest)])


def commit() -> str:
    """The current commit, with " + changes" if files differ from it; "unknown" outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        # Ignore the files that a run itself writes.
        changed = _git("status", "--porcelain", "--", "..", ":!results", ":!../README.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head[:12] + (" + changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_HERE), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def driver() -> str:
    """The NVIDIA driver's version; "unknown" without nvidia-smi."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split("\n", 1)[0].strip()


def cpu_name() -> str:
    """Name of the CPU."""
    name: str = info.collect()["devices"][0]["name"]
    return name
