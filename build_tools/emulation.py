"""The build of `tests/emulation`: the CUDA sources as C++, run on the CPU by its scheduler.

SEGKERNELS_CUDA=emulated, or emulated-asan (AddressSanitizer and UBSan), or emulated-races (races of
threads, for which races.cpp answers the hooks of -fsanitize=thread). For tests, never in a wheel.
"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from . import cuda

if TYPE_CHECKING:
    from .ninja_build import Config

FOLDER = "tests/emulation"
_FRAMES = ["-g1", "-fno-omit-frame-pointer"]
# Aligned accesses are what CUDA faults on: -fsanitize=alignment says where one is not.
ASAN = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"]
RACES = [
    *("-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"),
    *("--param", "tsan-instrument-func-entry-exit=0"),
]
VARIANTS = {
    "emulated": ["-O2"],
    "emulated-asan": ["-O0", *_FRAMES, *ASAN],
    "emulated-races": ["-O1", *_FRAMES, *RACES],
}
LINK: dict[str, list[str]] = {
    "emulated": [],
    "emulated-asan": ["-fsanitize=address,undefined"],
    "emulated-races": ["-ldl"],
}


def variant(wanted: str) -> str:
    """`wanted`, if it is one of `VARIANTS`."""
    if wanted not in VARIANTS:
        raise cuda.CudaError(
            f"SEGKERNELS_CUDA must be 0, 1, auto, {', '.join(VARIANTS)}, got {wanted!r}"
        )
    return wanted


def edges(config: Config, host: list[str], lines: list[str]) -> list[str]:
    """Add to build.ninja what compiles the emulation; return its objects."""
    from . import ninja_build

    folder = str(config.build_dir.relative_to(ninja_build.ROOT))
    own = [flag for flag in host if flag not in ("-O3", "-DNDEBUG", "-Icsrc", "-fopenmp")]
    own.append("-Wno-unused-but-set-variable")  # of lambdas that gcc 12 looks into too late
    flags = VARIANTS[config.emulation]
    # The scheduler itself makes the accesses of no thread.
    unhooked = [flag for flag in flags if flag not in RACES]
    sources = [
        str(path)
        for suffix in (".cu", ".h")
        for path in ninja_build.sources(suffix)
        if not ninja_build.specific_arch(path)
    ]
    translated = {path: f"{folder}/{path}" for path in sources}
    lines += [
        "rule translate",
        f"  command = {shlex.quote(sys.executable)} {FOLDER}/translate.py {folder} $in",
        "  restat = 1",
        "  description = translate.py",
        f"build {' '.join(translated.values())}: translate {' '.join(sources)} "
        f"| {FOLDER}/translate.py",
        "rule emulated",
        f"  command = {shlex.join(config.cxx)} {shlex.join(own)} -DSK_EMULATED=1 $flags "
        f"-I{FOLDER} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
    ]
    objects = []

    def compiled(source: str, kind: list[str], needs: str = "") -> None:
        target = f"{folder}/{source.removeprefix(folder + '/')}.o"
        lines.append(f"build {target}: emulated {source}{needs}")
        lines.append(f"  flags = {shlex.join(kind)}")
        objects.append(target)

    headers = " ".join(path for path in translated.values() if path.endswith(".h"))
    for path in sorted(translated.values()):
        if path.endswith(".cu"):
            kind = [*flags, "-x", "c++", "-include", "cuda.h", f"-I{folder}/csrc"]
            compiled(path, kind, f" || {headers}")
    races = ["-DSK_RACES=1"] if config.emulation == "emulated-races" else []
    for name in ("scheduler.cpp", "races.cpp"):
        compiled(f"{FOLDER}/{name}", [*unhooked, *races])
    for name in ("hopper_forward.cpp", "hopper_weight_gradient.cpp"):
        compiled(f"{FOLDER}/{name}", ["-O2", "-Icsrc"])
    return objects
