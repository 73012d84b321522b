"""Writes build.ninja (sources, flags, targets) for the native extension, and runs ninja."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from . import cuda, emulation

ROOT = Path(__file__).resolve().parent.parent
MACOS = sys.platform == "darwin"
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"),
)
# For code that runs once a call: the bindings, and the host code of *.cu files.
QUICK = "-O1"
# Files named *.simd.cpp are compiled once per instruction set; one is chosen at run time.
# -fno-trapping-math: no code reads floating-point exception flags, and preserving them would keep
# the compiler from vectorising float16. -falign-*: the speed of short loops depends on alignment,
# which would change with the size of the code before them.
SIMD_FLAGS = (
    *("-ffp-contract=fast", "-fno-trapping-math"),
    *("-falign-functions=64", "-falign-loops=32"),
)
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mprefer-vector-width=256"]
# Base x86-64 is only for processors from before 2013 (and emulators) without AVX2: fast to compile.
X86_ISAS = {"isa_base": [QUICK], "isa_avx2": _AVX2, "isa_avx512": [*_AVX2, *_AVX512]}


class BuildError(RuntimeError):
    """The native extension cannot be built. The message gives the reason and a remedy."""


@dataclass
class Config:
    """The build configuration: compiler, instruction sets, CUDA."""

    cxx: list[str]
    isas: dict[str, list[str]]
    toolkit: cuda.Toolkit | None
    cuda_missing: str
    arches: list[cuda.Arch] = field(default_factory=list)
    emulation: str = ""  # one of emulation.VARIANTS, or ""

    @property
    def shared_dir(self) -> Path:
        """Folder of the CPU objects, which all configurations share, and of ninja's logs."""
        soabi = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
        return ROOT / "build" / f"native-{soabi}"

    @property
    def build_dir(self) -> Path:
        """Folder of this configuration, so that switching configurations rebuilds nothing."""
        device = self.emulation or "cpu"
        if self.toolkit:
            device = f"cuda{self.toolkit.version_string}-" + "-".join(
                f"{arch.number}{'p' if arch.ptx else ''}" for arch in self.arches
            )
        return self.shared_dir / device


def configure() -> Config:
    """Detect compiler, SIMD variants and CUDA from the machine and the environment."""
    if sys.platform == "win32":
        raise BuildError(
            "segkernels builds on Linux and macOS. On Windows use WSL 2 (Ubuntu), where the CUDA "
            "build works as on Linux"
        )
    cxx = shlex.split(os.environ.get("CXX", "")) or [_default_compiler()]
    if not shutil.which(cxx[0]):
        raise BuildError(
            f"no C++ compiler: {cxx[0]!r} is not on PATH. Install one (Debian/Ubuntu: apt install "
            "g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or set CXX"
        )
    if not _compiles(cxx, ["-std=c++17"]):
        raise BuildError(f"{shlex.join(cxx)} cannot compile and link a C++17 program")
    isas: dict[str, list[str]] = {"isa_base": []}
    if platform.machine().lower() in ("x86_64", "amd64") and all(
        _compiles(cxx, flags) for flags in X86_ISAS.values()
    ):
        isas = X86_ISAS
    config = Config(
        cxx=cxx,
        isas=isas,
        toolkit=None,
        cuda_missing=f"CUDA does not exist on {sys.platform}",
    )
    if (wanted := os.environ.get("SEGKERNELS_CUDA", "")).startswith("emulated"):
        config.emulation, config.cuda_missing = emulation.variant(wanted), ""
    elif not MACOS:
        config.toolkit, config.cuda_missing = cuda.find_toolkit()
    elif os.environ.get("SEGKERNELS_CUDA") == "1":
        raise cuda.CudaError("SEGKERNELS_CUDA=1, but there is no CUDA on macOS")
    if config.toolkit:
        config.arches = cuda.choose_arches(config.toolkit)
    return config


def _default_compiler() -> str:
    return next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), "g++")


def _compiles(cxx: list[str], flags: list[str], source: str = "int main(){return 0;}") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source + "\n")
        command = [*cxx, *flags, str(path), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def sources(suffix: str) -> list[Path]:
    """Files under csrc/ that end in `suffix`, relative to the root.

    The largest first: ninja starts edges in this order, and none that takes long may come last.
    """
    found = sorted((ROOT / "csrc").rglob(f"*{suffix}"))
    return [path.relative_to(ROOT) for path in sorted(found, key=lambda p: -p.stat().st_size)]


def write(config: Config, output: Path) -> Path:
    """Write build.ninja, which links `output`, and build_config.h; return build.ninja's path."""
    build = config.build_dir
    build.mkdir(parents=True, exist_ok=True)
    _write_if_changed(build / "build_config.h", _config_header(config))
    isas = ["-DSK_HAVE_X86_ISAS=1"] if len(config.isas) > 1 else []
    host = [*COMMON_FLAGS, "-Icsrc", "-pthread", *isas]
    lines = _rules(config, host)
    cuda_objects: list[str] = []
    if config.emulation:
        own = str(build.relative_to(ROOT))
        common = [*sources(".cu"), *sources(".h")]
        names = [str(source) for source in common if not specific_arch(source)]
        cuda_objects = emulation.edges(config.emulation, own, config.cxx, host, names, lines)
    elif config.toolkit:
        flags = _nvcc_flags(config, host)
        for source in sources(".cu"):
            if gencode := _gencode(config, source):
                target = _object(config, source)
                lines += [f"build {_path(target)}: nvcc {_source(source)}"]
                lines += [f"  flags = {_join([*flags, *gencode])}"]
                cuda_objects.append(target)
    objects: list[str] = []
    for source in sources(".cpp"):
        objects += _cpp_edges(config, source, lines)
    lines.append(f"build cuda: phony {' '.join(map(_path, cuda_objects))}")
    lines.append(f"build {_path(str(output))}: link {' '.join(map(_path, objects + cuda_objects))}")
    lines.append(f"default {_path(str(output))}")
    _write_if_changed(build / "build.ninja", "\n".join(lines) + "\n")
    return build / "build.ninja"


def _feature_macros(config: Config) -> list[str]:
    """Macros that tell bindings.cpp which CUDA code the module contains."""
    if config.emulation:
        return ["-DSK_EMULATED=1", "-DSK_WITH_CUDA=1", "-DSK_HAVE_SM90A=1"]
    names = sorted({specific_arch(path) for path in sources(".cu")} - {""})
    return (["-DSK_WITH_CUDA=1"] if config.toolkit else []) + [
        f"-DSK_HAVE_{name.upper()}=1" for name in names if _wants(config, name)
    ]


def _rules(config: Config, host: list[str]) -> list[str]:
    folder = str(config.shared_dir.relative_to(ROOT))
    cxx = f"{_join(config.cxx)} {_join(host)} -MMD -MF $out.d"
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {_path(folder)}",
        "rule cxx",
        f"  command = {cxx} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $in $isa",
    ]
    if config.toolkit:
        nvcc = _join([str(config.toolkit.nvcc)])
        # .ci/cuda_report.py reads ptxas' report from $out.log; other messages are printed.
        show = "grep -vE '^ptxas info|bytes stack frame' $out.log || true"
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1; "
            f"status=$$?; {show}; exit $$status",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
        ]
    link = [*config.cxx, *(["-bundle", "-undefined", "dynamic_lookup"] if MACOS else ["-shared"])]
    libs = ["-pthread"]
    if not MACOS:
        # Export only the module's entry point. Two libraries that both export a static cudart, CUB
        # or std template instantiations can resolve to each other's and corrupt results.
        exports = config.build_dir / "exports.map"
        names = "PyInit__C; emulation_*" if config.emulation else "PyInit__C"
        _write_if_changed(exports, f"{{ global: {names}; local: *; }};\n")
        libs += ["-Wl,--exclude-libs,ALL", f"-Wl,--version-script={exports}"]
    if config.toolkit:
        libs += [f"-L{config.toolkit.libdir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    libs += emulation.LINK[config.emulation] if config.emulation else []
    lines += [
        "rule link",
        f"  command = {_join(link)} @$out.rsp -o $out {_join(libs)}",
        "  rspfile = $out.rsp",
        "  rspfile_content = $in",
        "  description = link $out",
    ]
    return lines


def _cpp_edges(config: Config, source: Path, lines: list[str]) -> list[str]:
    if source.name == "bindings.cpp":
        # Only this file includes Python's headers, whose paths change between isolated builds.
        includes = [pybind11_include(), sysconfig.get_paths()["include"], str(config.build_dir)]
        macros = _feature_macros(config)
        variants = {"": [QUICK, *macros, *(f"-isystem{folder}" for folder in includes)]}
    elif source.name.endswith(".simd.cpp"):
        variants = {
            isa: [f"-DSK_ISA={isa}", *flags, *SIMD_FLAGS] for isa, flags in config.isas.items()
        }
    else:
        variants = {"": []}
    targets = []
    for isa, flags in variants.items():
        target = _object(config, source, isa)
        lines += [f"build {_path(target)}: cxx {_source(source)}", f"  flags = {_join(flags)}"]
        lines += [f"  isa = {isa}"]
        targets.append(target)
    return targets


def _nvcc_flags(config: Config, host: list[str]) -> list[str]:
    assert config.toolkit is not None
    passed = [flag for flag in host if not flag.startswith(("-std", "-O", "-D", "-I"))]
    own = [flag for flag in host if flag.startswith(("-std", "-D", "-I"))]
    wrappers = ("ccache", "sccache", "distcc")
    compiler = [word for word in config.cxx if Path(word).name not in wrappers][:1]
    return [
        *own,
        QUICK,  # the device code is always compiled with -O3
        "-Xcompiler=-Wno-maybe-uninitialized",  # wrong about CUB's headers
        "-fmad=false",
        "--expt-relaxed-constexpr",
        # Drivers for CUDA 13 can read it. It makes the library a third as large.
        *(["--compress-mode=size"] if config.toolkit.version >= (13, 0) else []),
        "-Xptxas=-v",
        *(f"-ccbin={word}" for word in compiler if os.environ.get("CXX")),
        *(f"-Xcompiler={flag}" for flag in passed),
    ]


def specific_arch(source: Path) -> str:
    """ "sm90a" for ``kernel.sm90a.cu``, "" for a file that is compiled for every architecture."""
    match = re.search(r"\.(sm\d+[af])\.cu$", source.name)
    return match[1] if match else ""


def _wants(config: Config, name: str) -> bool:
    return any(f"sm{arch.number}" == name[:-1] for arch in config.arches)


def _gencode(config: Config, source: Path) -> list[str]:
    if name := specific_arch(source):
        arch = name.removeprefix("sm")
        return [f"-gencode=arch=compute_{arch},code=sm_{arch}"] if _wants(config, name) else []
    # CUB's device-wide algorithms choose their tuning by the architecture of the PTX.
    return cuda.gencode(config.arches, separate="<cub/device/" in (ROOT / source).read_text())


def pybind11_include() -> str:
    """Include folder of pybind11, from its package or else from the installed torch."""
    if spec := importlib.util.find_spec("pybind11"):
        return str(Path(str(spec.origin)).parent / "include")
    if spec := importlib.util.find_spec("torch"):
        bundled = Path(str(spec.origin)).parent / "include"
        if (bundled / "pybind11/pybind11.h").is_file():
            return str(bundled)
    raise BuildError("pybind11 is missing: pip install pybind11, or build with build isolation")


def _config_header(config: Config) -> str:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "segkernels/_version.py").read_text())
    assert version is not None
    texts = {
        "kVersion": version[1],
        "kCompiler": _compiler_name(config.cxx),
        "kCuda": config.toolkit.version_string if config.toolkit else config.emulation,
        "kCudaMissing": config.cuda_missing,
        "kArches": " ".join(map(str, config.arches)),
        "kSimd": " ".join(name.removeprefix("isa_") for name in config.isas),
    }
    body = [f"inline constexpr char {name}[] = {_c_string(text)};" for name, text in texts.items()]
    return "\n".join(
        [
            "// Generated by the build: how this _C was built.",
            "#pragma once",
            "namespace segkernels::build {",
            *body,
            "}  // namespace segkernels::build",
            "",
        ]
    )


def _compiler_name(cxx: list[str]) -> str:
    done = subprocess.run([*cxx, "--version"], capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.stdout else shlex.join(cxx)


def _c_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _object(config: Config, source: Path, isa: str = "") -> str:
    own = source.suffix == ".cu" or source.name == "bindings.cpp"
    folder = (config.build_dir if own else config.shared_dir).relative_to(ROOT)
    return str(folder / source) + (f".{isa}" if isa else "") + ".o"


def _source(source: Path) -> str:
    return _path(str(source))


def _path(text: str) -> str:
    return re.sub(r"([$ :\n])", r"$\1", text)


def _join(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def ninja_command() -> str:
    """Path of ninja: from the pip package, or else from PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        if found := shutil.which("ninja"):
            return found
        raise BuildError(
            "ninja is missing: pip install ninja, or build with build isolation"
        ) from None
    return str(Path(BIN_DIR) / "ninja")


def run(ninja_file: Path, *targets: str) -> None:
    """Run ninja with MAX_JOBS parallel jobs (default: ninja's, from the number of cores)."""
    jobs = os.environ.get("MAX_JOBS", "").strip()
    if jobs and not (jobs.isdigit() and int(jobs) > 0):
        raise BuildError(f"MAX_JOBS must be a positive integer, got {jobs!r}")
    command = [ninja_command(), "-C", str(ROOT), "-f", str(ninja_file)]
    command += [f"-j{jobs}"] if jobs else []
    if subprocess.run([*command, *targets]).returncode != 0:
        raise BuildError("the native build failed; see the compiler's messages above")
