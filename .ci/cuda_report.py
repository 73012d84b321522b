"""Compiles every CUDA source and prints ptxas' figures for each kernel; fails on register spills.

Also fails when the machine code of *.sm90a.cu lacks Hopper's wgmma or TMA load instructions.

    python .ci/cuda_report.py [--all]

Compiles for sm_80 and sm_90 (sm_90a for *.sm90a.cu) and PTX, as a default build does, and reuses
its objects. Prints one line per kernel and architecture, with the maxima over the template
instances; --all prints every instance.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from build_tools import cuda, ninja_build

# Kernels that may spill: part of the demangled name -> (bytes allowed, reason).
BUDGET = {
    "update_kernel<double,": (24, "registers saved around float64 exp and log, once per point"),
    "update_and_splat_kernel<double,": (24, "as for update_kernel<double>"),
    "update_kernel<float,": (24, "registers saved around float32 exp and log, above 128 classes"),
}

# Required instructions of sm_90a kernels, by part of the mangled name: wgmma and the TMA tile load.
INSTRUCTIONS = {"conv_kernel": ("HGMMA", "UTMALDG"), "weight_kernel": ("HGMMA", "UTMALDG")}


def allowed(kernel: Kernel) -> int:
    """Bytes that `kernel` may spill."""
    return max((bytes_ for part, (bytes_, _) in BUDGET.items() if part in kernel.name), default=0)


@dataclass
class Kernel:
    """ptxas' figures for one function on one architecture."""

    symbol: str
    arch: str
    source: str
    registers: int = 0
    spill: int = 0
    stack: int = 0
    shared: int = 0
    name: str = ""
    short: str = ""


def parse(log: str, source: str) -> list[Kernel]:
    """Parse the output of ``ptxas -v``: kernels, and functions that were not inlined."""
    found: list[Kernel] = []
    entry = current = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            entry = current = Kernel(match[1], match[2], source)
            found.append(entry)
        elif entry is None or current is None:
            continue
        elif match := re.search(r"Function properties for (\S+)", line):
            if match[1] == entry.symbol:
                current = entry
            else:
                current = Kernel(match[1], entry.arch, source)
                found.append(current)
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            current.stack = int(match[1])
            current.spill = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            entry.registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                entry.shared = int(shared[1])
    return found


def demangle(symbols: list[str]) -> list[str]:
    """C++ names of `symbols`, or `symbols` unchanged if no demangler is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not symbols:
        return symbols
    done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else symbols


def shorten(name: str) -> str:
    """Kernel name without return type, namespaces, template arguments and parameters.

    A kernel that runs a functor of this project is named after it: ``Embed (for_each_kernel)``.
    """
    name = name.replace("(anonymous namespace)::", "")
    flat, depth, arguments = "", 0, ""
    for letter in name:
        depth -= letter in ">)"
        if depth == 0 and letter == "(":
            break
        flat += letter if depth == 0 and letter not in "<>" else ""
        arguments += letter if depth else ""
        depth += letter in "<("
    parts = flat.split()[-1].split("::")
    if parts[0] in ("cub", "thrust"):
        return f"{parts[0]}::{parts[-1]}"
    functor = re.search(r"segkernels::(?:\w+::)*(\w+)", arguments)
    return f"{functor[1]} ({parts[-1]})" if functor else parts[-1]


def collect(config: ninja_build.Config) -> list[Kernel]:
    """Compile outdated objects and parse all ptxas logs."""
    ninja_build.run(ninja_build.write(config, config.build_dir / "report.so"), "cuda")
    kernels: list[Kernel] = []
    for source in ninja_build.sources(".cu"):
        log = config.build_dir / f"{source}.o.log"
        found = parse(log.read_text(), str(source))
        if not found:
            print(f"{source}: no kernels")
        kernels += found
    names = demangle([kernel.symbol for kernel in kernels])
    for kernel, name in zip(kernels, names, strict=True):
        kernel.name, kernel.short = name, shorten(name)
    return sorted(kernels, key=lambda kernel: (kernel.source, kernel.short, kernel.arch))


def find_cuobjdump(toolkit: cuda.Toolkit) -> str | None:
    """Path of cuobjdump, from the toolkit or else from the triton package."""
    folders = [toolkit.nvcc.parent]
    triton = importlib.util.find_spec("triton")
    for location in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(location, "backends/nvidia/bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))


def count_instructions(sass: str) -> dict[str, dict[str, int]]:
    """Count the `INSTRUCTIONS` of each kernel in the output of cuobjdump."""
    counts: dict[str, dict[str, int]] = {}
    for text in sass.split("Function : ")[1:]:
        symbol = text.split(maxsplit=1)[0]
        for part, wanted in INSTRUCTIONS.items():
            if part in symbol:
                counts[symbol] = {name: len(re.findall(rf"\b{name}\b", text)) for name in wanted}
    return counts


def lacking_instructions(config: ninja_build.Config) -> list[str]:
    """Messages about kernels in *.sm90a.cu that lack a required instruction."""
    assert config.toolkit is not None
    specific = [path for path in ninja_build.sources(".cu") if ninja_build.specific_arch(path)]
    tool = find_cuobjdump(config.toolkit)
    if tool is None:
        print("cuobjdump was not found: instructions were not checked in", *specific)
        return []
    lacking = []
    for source in specific:
        command = [tool, "-sass", str(config.build_dir / f"{source}.o")]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        counts = count_instructions(sass)
        if not counts:
            lacking.append(f"{source}: none of the kernels {', '.join(INSTRUCTIONS)}")
        for symbol, found in counts.items():
            lacking += [f"{demangle([symbol])[0]}: no {name}" for name, n in found.items() if not n]
        checked = {name for found in counts.values() for name in found}
        print(f"{source}: checked {len(counts)} kernels for {' and '.join(sorted(checked))}")
    return lacking


def show(kernels: list[Kernel], every: bool) -> None:
    """Print the table of kernels; with `every`, one line per template instance."""
    print(
        f"{'kernel':44} {'arch':7} {'count':>5} {'regs':>5} {'spill':>6} {'stack':>6} {'smem':>7}"
    )
    source = ""
    for (path, name, arch), group in groupby(kernels, lambda k: (k.source, k.short, k.arch)):
        if path != source:
            source = path
            print(f"{source}")
        same = list(group)
        for shown in [[kernel] for kernel in same] if every else [same]:
            print(
                f"  {name[:42]:42} {arch:7} {len(shown):5d} {max(k.registers for k in shown):5d} "
                f"{max(k.spill for k in shown):6d} {max(k.stack for k in shown):6d} "
                f"{max(k.shared for k in shown):7d}"
            )
            if every:
                print(f"      {shown[0].name}")


def main() -> int:
    """Print the report; return 1 if a kernel exceeds its spill budget or lacks an instruction."""
    config = ninja_build.configure()
    if config.toolkit is None:
        print("!" * 80)
        print("!! THE CUDA SOURCES WERE NOT COMPILED:", config.cuda_missing)
        print("!" * 80)
        return 0
    config.arches = cuda.parse_arches(cuda.DEFAULT_ARCHES)
    kernels = collect(config)
    if not kernels:
        print("No kernel was compiled, so nothing was checked")
        return 1
    show(kernels, "--all" in sys.argv[1:])
    over = [kernel for kernel in kernels if kernel.spill > allowed(kernel)]
    for kernel in over:
        print(f"SPILLS: {kernel.name} on {kernel.arch}: {kernel.spill} bytes stored and loaded")
    lacking = lacking_instructions(config)
    for line in lacking:
        print(f"LACKS: {line}")
    print(
        f"CUDA {config.toolkit.version_string}: {len(kernels)} kernels, "
        f"{len(over)} over the spill budget"
    )
    return 1 if over or lacking else 0


if __name__ == "__main__":
    sys.exit(main())
