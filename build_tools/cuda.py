"""Finds a CUDA toolkit and chooses the architectures to compile for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIP_PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-cccl",
    "nvidia-cuda-runtime",
)
MIN_VERSION = (12, 0)
# Machine code for Ampere and Hopper data-centre GPUs, and PTX, which the driver of a newer GPU
# compiles when the module loads. (sm_90a code comes from *.sm90a.cu files: see Arch.)
DEFAULT_ARCHES = "8.0 9.0+PTX"
NAMED_ARCHES = {
    "turing": "7.5+PTX",
    "ampere": "8.0 8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 12.0+PTX",
}


class CudaError(RuntimeError):
    """CUDA was requested and cannot be used. The message lists the locations searched."""


@dataclass(frozen=True)
class Toolkit:
    """A complete CUDA toolkit: compiler, headers and libraries."""

    nvcc: Path
    includes: tuple[Path, ...]
    libdir: Path
    version: tuple[int, int]

    @property
    def version_string(self) -> str:
        """The version as text, such as "13.0"."""
        return f"{self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Arch:
    """One compute capability, as in torch's TORCH_CUDA_ARCH_LIST.

    The suffix ("a" or "f") does not change how plain ``*.cu`` files are compiled: they are always
    compiled for the generic architecture. Only files named ``*.sm90a.cu`` (or ``*.sm100a.cu``...)
    are compiled for an architecture-specific target, whose code and PTX run on no other GPU.
    """

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @property
    def number(self) -> str:
        """The number in the target's name, such as "90" in sm_90."""
        return f"{self.major}{self.minor}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + ("+PTX" if self.ptx else "")


def site_packages() -> list[Path]:
    """The environment's package folders, which also exist inside pip's build isolation."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("purelib", "platlib")))


def _candidates() -> Iterator[tuple[str, list[Path]]]:
    """Yield (origin, root folders that together form one toolkit), in search order."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield variable, [Path(os.environ[variable])]
    yield "default location", [Path("/usr/local/cuda")]
    if on_path := shutil.which("nvcc"):
        # nvcc on PATH may be a wrapper script, so nvcc itself reports its folder. A Linux
        # distribution's package installs the other files under /usr.
        yield f"nvcc on PATH ({on_path})", [_root_of_nvcc(on_path), Path(on_path).parent.parent]
    for site in site_packages():
        for root in sorted(site.glob("nvidia/cu[0-9]*"), reverse=True):
            yield "pip packages", [root]


def _root_of_nvcc(nvcc: str) -> Path:
    output = _run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", output or "", re.MULTILINE)
    return Path(os.path.realpath(top[1] if top else Path(nvcc).resolve().parent.parent))


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _first(roots: list[Path], *patterns: str) -> Path | None:
    for root in roots:
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                return path
    return None


def _header(roots: list[Path], name: str) -> Path | None:
    """The include folder that contains the header `name`, or None."""
    folders = ("include", "include/cccl", "targets/*/include", "targets/*/include/cccl")
    found = _first(roots, *(f"{folder}/{name}" for folder in folders))
    return found.parents[name.count("/")] if found else None


def _inspect(roots: list[Path]) -> tuple[Toolkit | None, str]:
    """Return the toolkit under `roots` and "", or None and what is missing."""
    if not roots[0].is_dir():
        return None, "no such folder"
    nvcc = _first(roots, "bin/nvcc")
    libraries = ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu")
    cudart = _first(roots, *(f"{folder}/libcudart_static.a" for folder in libraries))
    cicc = _first(roots, "nvvm/bin/cicc", "lib/nvidia-cuda-toolkit/bin/cicc", "bin/cicc")
    headers = {
        "cuda_runtime.h": ("nvidia-cuda-runtime", _header(roots, "cuda_runtime.h")),
        "crt/host_config.h": ("nvidia-cuda-crt", _header(roots, "crt/host_config.h")),
        "cub/cub.cuh": ("nvidia-cuda-cccl", _header(roots, "cub/cub.cuh")),
    }
    missing = []
    if nvcc is None:
        missing.append("bin/nvcc (pip package nvidia-cuda-nvcc)")
    if cicc is None:
        missing.append("nvvm/bin/cicc (nvidia-nvvm)")
    for name, (package, folder) in headers.items():
        if folder is None:
            missing.append(f"{name} ({package})")
    if cudart is None:
        missing.append("libcudart_static.a (nvidia-cuda-runtime)")
    if missing or nvcc is None or cudart is None:
        return None, "lacks " + ", ".join(missing)
    version = re.search(r"release (\d+)\.(\d+)", _run([str(nvcc), "--version"]) or "")
    if version is None:
        return None, f"{nvcc} --version does not run"
    number = (int(version[1]), int(version[2]))
    if number < MIN_VERSION:
        return (
            None,
            f"is CUDA {version[1]}.{version[2]}; {MIN_VERSION[0]}.{MIN_VERSION[1]} is needed",
        )
    folders = dict.fromkeys(folder for _, folder in headers.values() if folder)
    # Passing the compiler's own folder with -I would break libstdc++'s #include_next.
    folders.pop(Path("/usr/include"), None)
    return Toolkit(nvcc, tuple(folders), cudart.parent, number), ""


def find_toolkit() -> tuple[Toolkit | None, str]:
    """Return the first complete toolkit and "", or None and a report of all locations searched.

    With ``SEGKERNELS_CUDA=0`` nothing is searched. With ``1``, `CudaError` is raised when no
    toolkit is found. Unset or ``auto``: CUDA is used if a toolkit is found.
    """
    wanted = os.environ.get("SEGKERNELS_CUDA", "auto").strip().lower() or "auto"
    if wanted not in ("0", "1", "auto"):
        raise CudaError(f"SEGKERNELS_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None, "SEGKERNELS_CUDA was 0 at build time"
    searched = [
        f"{variable}: not set"
        for variable in ("CUDA_HOME", "CUDA_PATH")
        if not os.environ.get(variable)
    ]
    for origin, roots in _candidates():
        toolkit, problem = _inspect(roots)
        if toolkit is not None:
            return toolkit, ""
        if origin in os.environ:
            print(f"Skipping {origin}={os.environ[origin]}: {problem}")
        searched.append(f"{origin}, {', '.join(map(str, roots))}: {problem}")
    if not shutil.which("nvcc"):
        searched.append("PATH: no nvcc")
    for site in site_packages():
        if not (site / "nvidia").is_dir():
            searched.append(f"{site}: none of the pip packages {', '.join(PIP_PACKAGES)}")
    lines = "\n".join(f"  - {line}" for line in searched)
    report = f"no CUDA toolkit was found. Searched:\n{lines}"
    if wanted == "1":
        raise CudaError(
            f"SEGKERNELS_CUDA=1, but {report}\nInstall a toolkit and set CUDA_HOME to its folder, "
            f"or: pip install {' '.join(PIP_PACKAGES)}"
        )
    return None, report


def parse_arches(text: str) -> list[Arch]:
    """Parse TORCH_CUDA_ARCH_LIST: ``"8.0;9.0a+PTX"``, ``"8.0 9.0"`` or ``"Hopper"``.

    Duplicates are merged. Raises `CudaError` for the first entry that is not an architecture.
    """
    found: dict[tuple[int, int], Arch] = {}
    words = re.split(r"[;,\s]+", text.strip())
    words = [part for word in words for part in NAMED_ARCHES.get(word.lower(), word).split()]
    for word in words:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise CudaError(
                "TORCH_CUDA_ARCH_LIST: entries must be such as 8.0, 9.0a or 9.0+PTX, or one of "
                f"{', '.join(NAMED_ARCHES)}, separated by ; or spaces, got {word!r}"
            )
        key = (int(match[1]), int(match[2]))
        known = found.get(key, Arch(*key))
        found[key] = Arch(*key, known.suffix or match[3], known.ptx or bool(match[4]))
    return [found[key] for key in sorted(found)]


def gencode(arches: list[Arch], separate: bool) -> list[str]:
    """nvcc options for `arches`, which are in ascending order.

    nvcc's front end takes most of the time. It runs once for all architectures from 8.0 on, to the
    PTX of the oldest, from which each one's machine code is made. With `separate` it runs for each.
    Older architectures are always separate: they have no bfloat16.
    """
    old = [arch for arch in arches if separate or arch.major < 8]
    groups = [[arch] for arch in old] + [[arch for arch in arches if arch not in old]]
    options = []
    for group in filter(None, groups):
        front = f"compute_{group[0].number}"
        kinds = [f"sm_{arch.number}" for arch in group]
        kinds += [front] if any(arch.ptx for arch in group) else []
        options.append(f"-gencode=arch={front},code=[{','.join(kinds)}]")
    return options


def visible_arches() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that nvidia-smi lists, in ascending order."""
    output = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", output, re.MULTILINE)
    return sorted({(int(major), int(minor)) for major, minor in found})


def supported_arches(toolkit: Toolkit) -> list[tuple[int, int]]:
    """Compute capabilities that `toolkit` can compile for, in ascending order."""
    output = _run([str(toolkit.nvcc), "--list-gpu-arch"]) or ""
    found = re.findall(r"compute_(\d+)(\d)\b", output)
    return sorted({(int(major), int(minor)) for major, minor in found})


def choose_arches(toolkit: Toolkit) -> list[Arch]:
    """Return TORCH_CUDA_ARCH_LIST if set, else those of the visible GPUs, else DEFAULT_ARCHES."""
    supported = supported_arches(toolkit)
    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        arches = parse_arches(requested)
        unknown = [str(a) for a in arches if supported and (a.major, a.minor) not in supported]
        if unknown:
            raise CudaError(
                f"TORCH_CUDA_ARCH_LIST: CUDA {toolkit.version_string} at {toolkit.nvcc} supports "
                + ", ".join(f"{major}.{minor}" for major, minor in supported)
                + f", got {', '.join(unknown)}"
            )
        return arches
    usable = [arch for arch in visible_arches() if not supported or arch in supported]
    if not usable:
        # No GPU is visible, or only GPUs newer than the toolkit, which run the PTX.
        return parse_arches(DEFAULT_ARCHES)
    return [Arch(*arch, ptx=arch == usable[-1]) for arch in usable]
