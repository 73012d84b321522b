"""Builds the CUDA sources as C++ for `tests/emulation`, which runs the kernels on the CPU.

SEGKERNELS_CUDA selects the variant: emulated; emulated-asan (AddressSanitizer and UBSan); or
emulated-races (data races between CUDA threads: races.cpp implements the callbacks that
-fsanitize=thread inserts). Built in place for tests only, never into a wheel.
"""

from __future__ import annotations

import shlex
import sys

from . import cuda

FOLDER = "tests/emulation"
_FRAMES = ["-g1", "-fno-omit-frame-pointer"]
# A misaligned access faults on CUDA: UBSan's alignment check reports it here.
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
    """Return `wanted`, or raise CudaError if it is not one of `VARIANTS`."""
    if wanted not in VARIANTS:
        raise cuda.CudaError(
            f"SEGKERNELS_CUDA must be 0, 1, auto, {', '.join(VARIANTS)}, got {wanted!r}"
        )
    return wanted


def edges(
    variant: str, folder: str, cxx: list[str], host: list[str], sources: list[str], lines: list[str]
) -> list[str]:
    """Append the emulation's ninja rules and edges to `lines`; return the object files.

    Args:
        variant: one of `VARIANTS`.
        folder: the build folder, relative to the root.
        cxx: the compiler's command.
        host: its flags for C++.
        sources: CUDA sources and headers under csrc/, without those for one architecture.
        lines: of build.ninja.
    """
    own = [flag for flag in host if flag not in ("-O3", "-DNDEBUG", "-Icsrc")]
    own.append("-Wno-unused-but-set-variable")  # false positives of gcc 12 in lambdas
    flags = VARIANTS[variant]
    # The scheduler's own accesses belong to no CUDA thread, so they are not instrumented.
    uninstrumented = [flag for flag in flags if flag not in RACES]
    translated = {path: f"{folder}/{path}" for path in sources}
    lines += [
        "rule translate",
        f"  command = {shlex.quote(sys.executable)} {FOLDER}/translate.py {folder} $in",
        "  restat = 1",
        "  description = translate.py",
        f"build {' '.join(translated.values())}: translate {' '.join(sources)} "
        f"| {FOLDER}/translate.py",
        "rule emulated",
        f"  command = {shlex.join(cxx)} {shlex.join(own)} -DSK_EMULATED=1 $flags "
        f"-I{FOLDER} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in",
    ]
    objects = []

    def add_object(source: str, compile_flags: list[str], needs: str = "") -> None:
        target = f"{folder}/{source.removeprefix(folder + '/')}.o"
        lines.append(f"build {target}: emulated {source}{needs}")
        lines.append(f"  flags = {shlex.join(compile_flags)}")
        objects.append(target)

    headers = " ".join(path for path in translated.values() if path.endswith(".h"))
    for path in sorted(translated.values()):
        if path.endswith(".cu"):
            as_cpp = [*flags, "-x", "c++", "-include", "cuda.h", f"-I{folder}/csrc"]
            add_object(path, as_cpp, f" || {headers}")
    races = ["-DSK_RACES=1"] if variant == "emulated-races" else []
    for name in ("scheduler.cpp", "races.cpp"):
        add_object(f"{FOLDER}/{name}", [*uninstrumented, *races])
    for name in ("hopper_forward.cpp", "hopper_weight_gradient.cpp"):
        add_object(f"{FOLDER}/{name}", ["-O2", "-Icsrc"])
    return objects
