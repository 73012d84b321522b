"""``segkernels info``: versions, how the native code was built, devices and operators."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from segkernels import _native, _threads
from segkernels._version import __version__
from segkernels.ops import _registry

_REBUILD = "SEGKERNELS_CUDA=1 pip install --force-reinstall --no-deps . (in segkernels' folder)"


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Versions, how the native code was built, devices and operators: paste it in a bug report."""
    collected = collect()
    if as_json:
        typer.echo(json.dumps(collected, indent=2))
    else:
        render(collected, Console(highlight=False))


@dataclass(frozen=True)
class Problem:
    """What is missing, why, and what to do about it."""

    what: str
    why: str
    do: str


def collect() -> dict[str, Any]:
    """The data of ``segkernels info --json``, as plain JSON types.

    Keys: ``versions`` (package to version, or None if it is not installed), ``system``, ``native``
    (how ``_C`` was built; ``problem`` is why it does not load), ``devices``, ``ops`` (the registry,
    with ``available``: device to bool) and ``problems`` (``what``, ``why``, ``do``).
    """
    native = _native_info()
    devices = _devices(native)
    return {
        "versions": _versions(),
        "system": {
            "platform": platform.platform(),
            "machine": platform.machine(),
            "segkernels": str(Path(__file__).resolve().parents[1]),
            "torch_cuda": torch.version.cuda,
            "torch_hip": torch.version.hip,
            "driver_cuda": _driver_cuda(),
            "torch_threads": torch.get_num_threads(),
            "usable_cores": _threads.usable_cores(),
            "threads": _threads.num_threads(),
        },
        "native": native,
        "devices": devices,
        "ops": _ops(native, devices),
        "problems": [asdict(problem) for problem in _problems(native, devices)],
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "segkernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("triton", "numpy", "pillow"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _driver_cuda() -> str | None:
    """The newest CUDA version that the driver supports, such as "13.0", or None."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    number = ask() if ask is not None and torch.version.hip is None else 0
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _native_info() -> dict[str, Any]:
    built: dict[str, Any] = {
        "version": None,
        "compiler": None,
        "cuda": None,
        "cuda_missing": None,
        "arches": [],
        "simd": [],
    }
    if not _native.problem():
        built.update(_native.C().build_info())
    return {"problem": _native.problem() or None, **built, "left_out": _left_out(built)}


def _left_out(built: dict[str, Any]) -> dict[str, str]:
    """The parts that the build left out, and why; empty if `_C` does not load."""
    if built["version"] is None:
        return {}
    parts = {}
    if built["cuda"] is None:
        parts["CUDA"] = str(built["cuda_missing"]).partition("\n")[0].removesuffix(". Searched:")
    elif not _native.C().has_sm90a:
        parts["Hopper kernels"] = "9.0 is not among the architectures"
    if built["simd"] == ["base"] and platform.machine().lower() in ("x86_64", "amd64"):
        parts["AVX2 and AVX-512"] = "the compiler does not accept their options"
    return parts


def _devices(native: dict[str, Any]) -> list[dict[str, Any]]:
    cpu = {
        "device": "cpu",
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "usable": native["problem"] is None,
    }
    devices = [cpu]
    driver = _driver_cuda()
    too_old = bool(driver and native["cuda"] and _major(driver) < _major(native["cuda"]))
    if torch.version.hip is None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            capability = (seen.major, seen.minor)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": seen.name,
                    "capability": f"{seen.major}.{seen.minor}",
                    "memory_bytes": seen.total_memory,
                    "usable": covers(native["arches"], capability) and not too_old,
                }
            )
    return devices


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def covers(arches: list[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `arches` ("8.0", "9.0+PTX") runs on a GPU of `capability`.

    Machine code runs on the same major and a higher or equal minor version. The driver compiles PTX
    for everything newer.
    """
    for arch in arches:
        number, plus, _ = arch.partition("+PTX")
        major, minor = map(int, number.split("."))
        if major == capability[0] and minor <= capability[1]:
            return True
        if plus and (major, minor) <= capability:
            return True
    return False


def _ops(native: dict[str, Any], devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    usable = {device["device"].partition(":")[0] for device in devices if device["usable"]}
    return [
        {
            **asdict(op),
            "available": {device: device in usable for device in sorted(dict(op.backends))},
        }
        for op in _registry.ops()
    ]


def _problems(native: dict[str, Any], devices: list[dict[str, Any]]) -> list[Problem]:
    found = []
    if native["problem"]:
        found.append(Problem("native code", native["problem"], "nothing works without it"))
    found += _cuda_problems(native, devices)
    if sys.platform == "linux" and _versions()["triton"] is None:
        found.append(Problem("Triton kernels", "triton is not installed", "pip install triton"))
    return found


def _cuda_problems(native: dict[str, Any], devices: list[dict[str, Any]]) -> list[Problem]:
    if torch.version.hip is not None:
        return [
            Problem("GPU", "this torch is a ROCm build; segkernels uses CUDA", "use CPU tensors")
        ]
    gpus = [device for device in devices if device["device"] != "cpu"]
    if not gpus:
        return [_no_gpu()]
    if native["problem"]:
        return []
    if native["cuda"] is None:
        why = f"_C was built without CUDA: {native['cuda_missing']}"
        return [Problem("CUDA code", why, _REBUILD)]
    driver = _driver_cuda()
    if driver and _major(driver) < _major(native["cuda"]):
        why = f"_C was built with CUDA {native['cuda']}, newer than the driver's {driver}"
        do = f"update the driver, or build with a CUDA {driver} toolkit: CUDA_HOME=... {_REBUILD}"
        return [Problem("CUDA code", why, do)]
    return [
        Problem(
            device["device"],
            f"_C was built for {', '.join(native['arches'])}, the GPU is {device['capability']}",
            f"TORCH_CUDA_ARCH_LIST={device['capability']} {_REBUILD}",
        )
        for device in gpus
        if not device["usable"]
    ]


def _no_gpu() -> Problem:
    if not shutil.which("nvidia-smi"):
        return Problem("GPU", "no NVIDIA GPU or driver is visible", "nothing: the CPU is used")
    if torch.version.cuda is None:
        return Problem(
            "GPU",
            f"there is nvidia-smi here, but torch {torch.__version__} is a CPU build",
            "install a CUDA torch: https://pytorch.org/get-started",
        )
    return Problem(
        "GPU",
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no device",
        "run nvidia-smi: is the driver loaded, and new enough; is CUDA_VISIBLE_DEVICES empty?",
    )


def render(info: dict[str, Any], console: Console) -> None:
    """Print the data of `collect` as text, in at most 80 columns."""
    system = info["system"]
    torch_cuda = f"CUDA {system['torch_cuda']}" if system["torch_cuda"] else "CPU only"
    rows = {name: version or "not installed" for name, version in info["versions"].items()}
    rows["torch"] += f" ({torch_cuda})"
    rows |= {"system": system["platform"], "installed in": system["segkernels"]}
    setting = f"torch's setting {system['torch_threads']}, usable cores {system['usable_cores']}"
    rows["CPU threads"] = f"{system['threads']} ({setting})"
    console.print(_pairs(rows | _native_rows(info)))
    devices = _table("device", "name", "capability", "usable")
    for device in info["devices"]:
        devices.add_row(
            device["device"], device["name"], device["capability"], _yes(device["usable"])
        )
    operators = _table("operator", "cpu", "cuda", "dtypes", "deterministic")
    for op in info["ops"]:
        where = [_backends(op, device) for device in ("cpu", "cuda")]
        operators.add_row(op["name"], *where, _short(op["dtypes"]), _yes(op["deterministic"]))
    for part in (devices, operators):
        console.print()
        console.print(part)
    if not all(all(op["available"].values()) for op in info["ops"]):
        console.print("(in brackets: not available here)")
    for problem in info["problems"]:
        console.print()
        console.print(Text(f"{problem['what']}: ", "bold yellow") + Text(problem["why"]))
        console.print(Text(f"  -> {problem['do']}"))


def _native_rows(info: dict[str, Any]) -> dict[str, str]:
    native = info["native"]
    if native["problem"]:
        return {"_C": f"does not load: {native['problem']}"}
    cuda = f"{native['cuda']}, for {', '.join(native['arches'])}"
    left_out = "; ".join(f"{part} ({why})" for part, why in native["left_out"].items())
    rows = {
        "compiler": native["compiler"],
        "CUDA": cuda if native["cuda"] else "",
        "SIMD": ", ".join(native["simd"]),
        "left out": left_out,
    }
    return {name: text for name, text in rows.items() if text}


def _backends(op: dict[str, Any], device: str) -> str:
    names = ", ".join(how for where, how in op["backends"] if where == device)
    return names if op["available"].get(device) else f"({names})" if names else ""


def _short(dtypes: list[str]) -> str:
    """Abbreviate dtypes: "float16 bfloat16 float32" to "f16 bf16 f32"."""
    return " ".join(name.replace("bfloat", "bf").replace("float", "f") for name in dtypes)


def _pairs(values: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for key, value in values.items():
        table.add_row(Text(key, "bold"), Text(value))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _yes(value: bool) -> str:
    return "yes" if value else "no"
