"""Finding a CUDA toolkit, and choosing the architectures to compile for."""

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
# Machine code for the two data-centre generations in use, and PTX that the driver of anything newer
# than Hopper compiles at load. (sm_90a code comes from *.sm90a.cu files: see Arch.)
DEFAULT_ARCHES = "8.0 9.0+PTX"
NAMED_ARCHES = {
    "turing": "7.5+PTX",
    "ampere": "8.0 8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 12.0+PTX",
}


class CudaError(RuntimeError):
    """CUDA was asked for and cannot be used; the message says what was looked for, and where."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit with everything that the build needs."""

    nvcc: Path
    includes: tuple[Path, ...]
    libdir: Path
    version: tuple[int, int]

    @property
    def version_string(self) -> str:
        """Such as "13.0"."""
        return f"{self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Arch:
    """One compute capability, as torch's TORCH_CUDA_ARCH_LIST names it.

    The suffix ("a" or "f") is kept for reporting only. Plain ``*.cu`` files are always compiled for
    the generic architecture, and only files named ``*.sm90a.cu`` (or ``*.sm100a.cu``...) for the
    specific one: PTX of a specific architecture runs nowhere else, so mixing them would compile
    every file once more for nothing.
    """

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    @property
    def number(self) -> str:
        """Such as "90", as in sm_90."""
        return f"{self.major}{self.minor}"

    def gencode(self) -> list[str]:
        """nvcc's option for this architecture."""
        kinds = [f"sm_{self.number}"] + ([f"compute_{self.number}"] if self.ptx else [])
        return [f"-gencode=arch=compute_{self.number},code=[{','.join(kinds)}]"]

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + ("+PTX" if self.ptx else "")


def site_packages() -> list[Path]:
    """The environment's package folders; also seen from inside pip's build isolation."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[key]) for key in ("purelib", "platlib")))


def _candidates() -> Iterator[tuple[str, list[Path]]]:
    """Pairs of (where this comes from, the roots that together make up one toolkit)."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield variable, [Path(os.environ[variable])]
    yield "the usual place", [Path("/usr/local/cuda")]
    if on_path := shutil.which("nvcc"):
        # It may be a wrapper script somewhere else, so nvcc itself is asked for its folder; a Linux
        # distribution's own package spreads the rest under /usr.
        yield f"nvcc on PATH ({on_path})", [_root_of_nvcc(on_path), Path(on_path).parent.parent]
    for site in site_packages():
        for root in sorted(site.glob("nvidia/cu[0-9]*"), reverse=True):
            yield "pip packages", [root]


def _root_of_nvcc(nvcc: str) -> Path:
    answer = _run([nvcc, "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", answer or "", re.MULTILINE)
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
    """The folder to put on the include path for `name`."""
    folders = ("include", "include/cccl", "targets/*/include", "targets/*/include/cccl")
    found = _first(roots, *(f"{folder}/{name}" for folder in folders))
    return found.parents[name.count("/")] if found else None


def _inspect(roots: list[Path]) -> tuple[Toolkit | None, str]:
    """The toolkit under `roots`, or None and what is missing there."""
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
    # The compiler's own folder must not be named: libstdc++'s #include_next would miss it.
    folders.pop(Path("/usr/include"), None)
    return Toolkit(nvcc, tuple(folders), cudart.parent, number), ""


def find_toolkit() -> tuple[Toolkit | None, str]:
    """The first complete toolkit and "", or None and a report of every place looked at.

    ``SEGKERNELS_CUDA=0`` looks nowhere; ``=1`` raises `CudaError` when none is found; unset or
    ``auto`` leaves the choice to what is there.
    """
    wanted = os.environ.get("SEGKERNELS_CUDA", "auto").strip().lower() or "auto"
    if wanted not in ("0", "1", "auto"):
        raise CudaError(f"SEGKERNELS_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None, "SEGKERNELS_CUDA=0 when it was built"
    looked = [
        f"{variable}: not set"
        for variable in ("CUDA_HOME", "CUDA_PATH")
        if not os.environ.get(variable)
    ]
    for origin, roots in _candidates():
        toolkit, problem = _inspect(roots)
        if toolkit is not None:
            return toolkit, ""
        if origin in os.environ:
            print(f"Passing over {origin}={os.environ[origin]}: {problem}")
        looked.append(f"{origin}, {', '.join(map(str, roots))}: {problem}")
    if not shutil.which("nvcc"):
        looked.append("PATH: no nvcc")
    for site in site_packages():
        if not (site / "nvidia").is_dir():
            looked.append(f"{site}: none of the pip packages {', '.join(PIP_PACKAGES)}")
    report = "no CUDA toolkit was found. Looked at:\n" + "\n".join(f"  - {line}" for line in looked)
    if wanted == "1":
        raise CudaError(
            f"SEGKERNELS_CUDA=1, but {report}\nInstall a toolkit and set CUDA_HOME to its folder, "
            f"or: pip install {' '.join(PIP_PACKAGES)}"
        )
    return None, report


def parse_arches(text: str) -> list[Arch]:
    """Read TORCH_CUDA_ARCH_LIST's syntax: ``"8.0;9.0a+PTX"``, ``"8.0 9.0"`` or ``"Hopper"``.

    Duplicates are merged. Raises `CudaError` naming the first entry that is not an architecture.
    """
    found: dict[tuple[int, int], Arch] = {}
    words = re.split(r"[;,\s]+", text.strip())
    words = [part for word in words for part in NAMED_ARCHES.get(word.lower(), word).split()]
    for word in words:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise CudaError(
                f"TORCH_CUDA_ARCH_LIST has {word!r}; expected entries such as 8.0, 9.0a or "
                f"9.0+PTX, separated by ; or spaces, or a name out of {', '.join(NAMED_ARCHES)}"
            )
        key = (int(match[1]), int(match[2]))
        known = found.get(key, Arch(*key))
        found[key] = Arch(*key, known.suffix or match[3], known.ptx or bool(match[4]))
    return [found[key] for key in sorted(found)]


def visible_arches() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that nvidia-smi shows, oldest first; empty without one."""
    answer = _run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", answer, re.MULTILINE)
    return sorted({(int(major), int(minor)) for major, minor in found})


def supported_arches(toolkit: Toolkit) -> list[tuple[int, int]]:
    """What `toolkit` can compile for, oldest first."""
    answer = _run([str(toolkit.nvcc), "--list-gpu-arch"]) or ""
    found = re.findall(r"compute_(\d+)(\d)\b", answer)
    return sorted({(int(major), int(minor)) for major, minor in found})


def choose_arches(toolkit: Toolkit) -> list[Arch]:
    """TORCH_CUDA_ARCH_LIST if set, else the visible GPUs, else `DEFAULT_ARCHES`."""
    supported = supported_arches(toolkit)
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        arches = parse_arches(asked)
        unknown = [str(a) for a in arches if supported and (a.major, a.minor) not in supported]
        if unknown:
            raise CudaError(
                f"TORCH_CUDA_ARCH_LIST asks for {', '.join(unknown)}; CUDA "
                f"{toolkit.version_string} at {toolkit.nvcc} compiles for "
                + ", ".join(f"{major}.{minor}" for major, minor in supported)
            )
        return arches
    usable = [arch for arch in visible_arches() if not supported or arch in supported]
    if not usable:
        # Nothing to see, or a GPU that this toolkit does not know yet: PTX serves a newer one.
        return parse_arches(DEFAULT_ARCHES)
    return [Arch(*arch, ptx=arch == usable[-1]) for arch in usable]
