"""Build choices (toolkit, architectures, flags) with mocked toolkits, and one small real build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make_toolkit(root: Path, version: str = "13.0", without: tuple[str, ...] = ()) -> Path:
    files = {
        "bin/nvcc": "#!/bin/sh\n"
        'case "$1" in\n'
        f"  --version) echo 'Cuda compilation tools, release {version}, V{version}.1';;\n"
        "  --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_100\\n';;\n"
        f"  --dryrun) echo '#$ TOP={root}';;\n"
        "esac\n",
        "nvvm/bin/cicc": "",
        "include/cuda_runtime.h": "",
        "include/crt/host_config.h": "",
        "include/cccl/cub/cub.cuh": "",
        "lib/libcudart_static.a": "",
    }
    for name, text in files.items():
        if name not in without:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
    return root


@pytest.fixture
def no_cuda(
    build_tools: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> pytest.MonkeyPatch:
    """A machine without any CUDA toolkit."""
    for name in ("CUDA_HOME", "CUDA_PATH", "SEGKERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to("/bin/sh")
    (tools / "printf").symlink_to(shutil.which("printf") or "/usr/bin/printf")
    monkeypatch.setenv("PATH", str(tools))
    inspect = build_tools.cuda._inspect

    def hide(roots: list[Path]) -> object:
        if str(roots[0]).startswith("/usr/local/cuda"):
            return None, "no such folder"
        return inspect(roots)

    monkeypatch.setattr(build_tools.cuda, "_inspect", hide)
    monkeypatch.setattr(build_tools.cuda, "site_packages", lambda: [tmp_path / "site"])
    return monkeypatch


def test_no_toolkit_reports_the_places_searched(
    build_tools: ModuleType, no_cuda: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit, report = build_tools.cuda.find_toolkit()
    assert toolkit is None
    for place in ("CUDA_HOME: not set", "/usr/local/cuda", "PATH: no nvcc", "site", "nvidia-nvvm"):
        assert place in report
    no_cuda.setenv("SEGKERNELS_CUDA", "1")
    with pytest.raises(build_tools.cuda.CudaError, match=r"(?s)SEGKERNELS_CUDA=1.*pip install"):
        build_tools.cuda.find_toolkit()


def test_incomplete_toolkit_is_skipped_and_reported(
    build_tools: ModuleType, no_cuda: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacking = ("include/cccl/cub/cub.cuh", "lib/libcudart_static.a")
    root = make_toolkit(tmp_path / "partial", without=lacking)
    no_cuda.setenv("CUDA_HOME", str(root))
    toolkit, report = build_tools.cuda.find_toolkit()
    assert toolkit is None
    assert f"CUDA_HOME, {root}: lacks cub/cub.cuh (nvidia-cuda-cccl), libcudart_static.a" in report


def test_old_toolkit_is_skipped(
    build_tools: ModuleType, no_cuda: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_cuda.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "old", version="11.8")))
    assert "is CUDA 11.8" in build_tools.cuda.find_toolkit()[1]


def test_search_order(build_tools: ModuleType, no_cuda: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = build_tools.cuda.find_toolkit
    site = make_toolkit(tmp_path / "site/nvidia/cu13", version="13.4")
    assert find()[0].nvcc == site / "bin/nvcc"
    # An nvcc on PATH may be a wrapper; the folder that it reports is used.
    real = make_toolkit(tmp_path / "real", version="13.1")
    wrapper = tmp_path / "tools/nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    assert find()[0].nvcc == real / "bin/nvcc"
    home = make_toolkit(tmp_path / "home", version="12.9")
    no_cuda.setenv("CUDA_HOME", str(home))
    found = find()[0]
    assert (found.nvcc, found.version_string) == (home / "bin/nvcc", "12.9")
    assert found.includes == (home / "include", home / "include/cccl")
    no_cuda.setenv("SEGKERNELS_CUDA", "0")
    assert find()[0] is None
    no_cuda.setenv("SEGKERNELS_CUDA", "yes")
    with pytest.raises(build_tools.cuda.CudaError, match="must be 0, 1 or auto, got 'yes'"):
        find()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0a+PTX", ["8.0", "9.0+PTX"]),
        ("9.0 8.0", ["8.0", "9.0"]),
        ("8.0, 9.0a;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("Ampere;10.0", ["8.0", "8.6+PTX", "10.0"]),
    ],
)
def test_arch_list(build_tools: ModuleType, text: str, expected: list[str]) -> None:
    assert [str(arch) for arch in build_tools.cuda.parse_arches(text)] == expected


@pytest.mark.parametrize("text", ["sm_80", "8", "8.0+SASS", "8.0;fast"])
def test_invalid_arch_list(build_tools: ModuleType, text: str) -> None:
    with pytest.raises(build_tools.cuda.CudaError, match="TORCH_CUDA_ARCH_LIST: entries must be"):
        build_tools.cuda.parse_arches(text)


def test_choice_of_architectures(
    build_tools: ModuleType, no_cuda: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = build_tools.cuda
    no_cuda.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "toolkit")))
    toolkit = cuda.find_toolkit()[0]

    def choose() -> str:
        return " ".join(map(str, cuda.choose_arches(toolkit)))

    assert choose() == cuda.DEFAULT_ARCHES
    smi = tmp_path / "tools/nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.0\\n9.0\\n'\n")
    smi.chmod(0o755)
    assert choose() == "8.0 9.0+PTX"
    smi.write_text("#!/bin/sh\nprintf '12.0\\n'\n")  # newer than the toolkit: needs PTX
    assert choose() == cuda.DEFAULT_ARCHES
    no_cuda.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert choose() == "10.0"
    no_cuda.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(cuda.CudaError, match=r"CUDA 13\.0 .* supports 8\.0, .*, got 7\.0"):
        choose()


@pytest.fixture
def tree(build_tools: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small source tree that the build uses as its root; its path has a space."""
    root = tmp_path / "a tree"
    (root / "csrc/op").mkdir(parents=True)
    (root / "segkernels").mkdir()
    shutil.copy(ROOT / "segkernels/_version.py", root / "segkernels")
    (root / "csrc/op/op.h").write_text("#define VALUE 1\n")
    (root / "csrc/op/op.cpp").write_text(
        '#include "op/op.h"\n'
        "int simd_isa_base();\n"
        "#ifdef SK_HAVE_X86_ISAS\nint simd_isa_avx512();\n#endif\n"
        'extern "C" int PyInit__C() { return VALUE + simd_isa_base(); }\n'
    )
    (root / "csrc/op/op.simd.cpp").write_text(
        "#define NAME2(isa) simd_##isa\n#define NAME(isa) NAME2(isa)\n"
        "int NAME(SK_ISA)() { return 40; }\n"
    )
    (root / "csrc/bindings.cpp").write_text("int bindings() { return 0; }\n")
    (root / "csrc/op/op.cu").write_text("not compiled here\n")
    (root / "csrc/op/op.sm90a.cu").write_text("not compiled here\n")
    monkeypatch.setattr(build_tools.ninja_build, "ROOT", root)
    monkeypatch.setenv("SEGKERNELS_CUDA", "0")
    return root


def test_incremental_build(build_tools: ModuleType, tree: Path) -> None:
    ninja_build = build_tools.ninja_build
    config = ninja_build.configure()
    linked = config.build_dir / "module.so"

    def build() -> dict[str, int]:
        ninja_build.run(ninja_build.write(config, linked))
        outputs = [*config.shared_dir.rglob("*.o"), linked]
        return {path.name: path.stat().st_mtime_ns for path in outputs}

    first = build()
    assert {f"op.simd.cpp.{isa}.o" for isa in config.isas} < set(first)
    assert build() == first
    time.sleep(0.01)
    (tree / "csrc/op/op.h").write_text("#define VALUE 2\n")
    second = build()
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"op.cpp.o", "module.so"}


def test_compile_errors_stop_the_build(build_tools: ModuleType, tree: Path) -> None:
    ninja_build = build_tools.ninja_build
    config = ninja_build.configure()
    (tree / "csrc/op/op.cpp").write_text("no C++\n")
    file = ninja_build.write(config, config.build_dir / "module.so")
    with pytest.raises(ninja_build.BuildError, match="the native build failed"):
        ninja_build.run(file)


def test_max_jobs(build_tools: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(build_tools.ninja_build.BuildError, match="MAX_JOBS must be"):
        build_tools.ninja_build.run(Path("build.ninja"))


def test_no_compiler(build_tools: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build_tools.ninja_build.BuildError, match="'no-such-compiler' is not on"):
        build_tools.ninja_build.configure()


def rules_of(build_tools: ModuleType, tree: Path, toolkit: Path, arches: str) -> str:
    config = build_tools.ninja_build.configure()
    config.toolkit = build_tools.cuda._inspect([toolkit])[0]
    config.arches = build_tools.cuda.parse_arches(arches)
    file = build_tools.ninja_build.write(config, tree / "module.so")
    return str(file.read_text())


def test_cuda_rules(build_tools: ModuleType, tree: Path, tmp_path: Path) -> None:
    toolkit = make_toolkit(tmp_path / "toolkit")
    text = rules_of(build_tools, tree, toolkit, "8.0;9.0a+PTX")
    assert "arch=compute_80,code=[sm_80,sm_90,compute_80]" in text
    assert "-gencode=arch=compute_90a,code=sm_90a" in text
    assert "-DSK_HAVE_SM90A=1" in text
    assert "-fmad=false" in text
    without = rules_of(build_tools, tree, toolkit, "8.0+PTX")
    assert "op.sm90a.cu" not in without
    assert "SK_HAVE_SM90A" not in without


@pytest.mark.parametrize(
    ("arches", "separate", "expected"),
    [
        ("8.0 9.0+PTX", False, ["arch=compute_80,code=[sm_80,sm_90,compute_80]"]),
        (
            "8.0 9.0+PTX",
            True,
            ["arch=compute_80,code=[sm_80]", "arch=compute_90,code=[sm_90,compute_90]"],
        ),
        (
            "7.5 8.6 12.0",
            False,
            ["arch=compute_75,code=[sm_75]", "arch=compute_86,code=[sm_86,sm_120]"],
        ),
        ("7.5+PTX", False, ["arch=compute_75,code=[sm_75,compute_75]"]),
    ],
)
def test_gencode(build_tools: ModuleType, arches: str, separate: bool, expected: list[str]) -> None:
    options = build_tools.cuda.gencode(build_tools.cuda.parse_arches(arches), separate)
    assert options == [f"-gencode={text}" for text in expected]


def test_cub_is_compiled_for_each_architecture(
    build_tools: ModuleType, tree: Path, tmp_path: Path
) -> None:
    (tree / "csrc/op/op.cu").write_text("#include <cub/device/device_scan.cuh>\n")
    text = rules_of(build_tools, tree, make_toolkit(tmp_path / "toolkit"), "8.0;9.0+PTX")
    assert "arch=compute_90,code=[sm_90,compute_90]" in text


def test_configurations_share_cpu_objects(build_tools: ModuleType, tree: Path) -> None:
    toolkit = make_toolkit(tree / "toolkit")
    built = [rules_of(build_tools, tree, toolkit, arches) for arches in ("8.0", "9.0a+PTX")]
    objects = [set(re.findall(r"^build (\S+\.o): \w+ (\S+)", text, re.M)) for text in built]
    sources = [{source: path for path, source in found} for found in objects]
    assert sources[0]["csrc/op/op.cpp"] == sources[1]["csrc/op/op.cpp"]
    for own in ("csrc/op/op.cu", "csrc/bindings.cpp"):
        assert sources[0][own] != sources[1][own]


@pytest.mark.parametrize("variant", ["emulated", "emulated-asan", "emulated-races"])
def test_emulated_rules(
    build_tools: ModuleType, tree: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGKERNELS_CUDA", variant)
    config = build_tools.ninja_build.configure()
    assert config.emulation == variant
    assert config.toolkit is None
    text = build_tools.ninja_build.write(config, tree / "module.so").read_text()
    folder = config.build_dir.relative_to(tree)
    assert f"build {folder}/csrc/op/op.cu.o: emulated {folder}/csrc/op/op.cu" in text
    assert "op.sm90a.cu" not in text
    assert "-DSK_WITH_CUDA=1 -DSK_HAVE_SM90A=1" in text
    assert f'kCuda[] = "{variant}"' in (config.build_dir / "build_config.h").read_text()


def test_unknown_emulation_raises(build_tools: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGKERNELS_CUDA", "emulated-msan")
    with pytest.raises(build_tools.cuda.CudaError, match="emulated-races, got 'emulated-msan'"):
        build_tools.ninja_build.configure()


@pytest.mark.slow
def test_build_in_place_replaces_a_newer_module(tree: Path) -> None:
    """The existing module was built for another configuration."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "build_tools", tree / "build_tools")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (module,) = (tree / "segkernels").glob("_C*")
    built = module.read_bytes()
    module.write_text("of another configuration, and newer")
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    assert module.read_bytes() == built


def test_wheel_with_emulation_raises(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "SEGKERNELS_CUDA": "emulated"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SEGKERNELS_CUDA=emulated is for tests and is only built in place" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_flags_do_not_depend_on_this_processor(build_tools: ModuleType, tree: Path) -> None:
    config = build_tools.ninja_build.configure()
    text = build_tools.ninja_build.write(config, tree / "module.so").read_text()
    assert "-march=native" not in text
    blocks = [block for block in text.split("build ") if "-mavx" in block]
    assert all(".simd.cpp" in block for block in blocks)
    assert len(blocks) == len(config.isas) - 1


def test_readme_has_the_commands_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci/run").read_text()
    for name in ("install", "test"):
        marker = f"<!-- ci:{name} -->\n```"
        assert readme.count(marker) == 1
        assert f"readme_command {name}" in script
    assert os.access(ROOT / ".ci/run", os.X_OK)
