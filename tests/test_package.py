"""The package: import, loading of native code, threads, devices, `segkernels info`."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import segkernels
from segkernels import _native
from segkernels.cli import app, info

PACKAGE = Path(segkernels.__file__).parent


def run_python(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def copy_python_only(folder: Path) -> None:
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(PACKAGE, folder / "segkernels", ignore=ignored)


def test_versions_are_equal() -> None:
    assert importlib.metadata.version("segkernels") == segkernels.__version__
    assert _native.C().build_info()["version"] == segkernels.__version__


def test_oldest_torch_allowed_is_tested() -> None:
    root = Path(__file__).resolve().parent.parent
    (allowed,) = re.findall(r'"torch>=([\d.]+)"', (root / "pyproject.toml").read_text())
    (tested,) = re.findall(
        r"^torch==([\d.]+)$", (root / ".ci/oldest.txt").read_text(), re.MULTILINE
    )
    assert tested == f"{allowed}.0"
    assert f"torch {allowed} or newer" in (root / "README.md").read_text()


def test_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_import_without_native_code(tmp_path: Path) -> None:
    copy_python_only(tmp_path)
    code = (
        "import segkernels; from segkernels import _native; print(segkernels.__file__)\n"
        "try: _native.C()\n"
        "except RuntimeError as error: print(error)"
    )
    done = run_python(code, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "has no _C for this Python" in done.stdout
    assert "pip install" in done.stdout


@pytest.mark.slow
def test_source_folder_that_hides_the_installed_package_is_reported(tmp_path: Path) -> None:
    copy_python_only(tmp_path)
    (tmp_path / "setup.py").touch()
    code = "from segkernels import _native; print(_native.problem())"
    done = run_python(code, tmp_path)
    assert "imported segkernels from its source folder" in done.stdout, done.stderr


@pytest.mark.slow
def test_native_code_of_another_version_is_rejected(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "segkernels")
    (tmp_path / "segkernels/_version.py").write_text('__version__ = "99.0"\n')
    code = "from segkernels import _native; print(_native.problem())"
    done = run_python(code, tmp_path)
    assert f"built from segkernels {segkernels.__version__}" in done.stdout, done.stderr


@pytest.mark.slow
def test_native_code_that_does_not_load_is_reported(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "segkernels")
    for module in (tmp_path / "segkernels").glob("_C.*"):
        module.write_bytes(b"not a shared library")
    code = "from segkernels import _native; print(_native.problem())"
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Build it again" in done.stdout


def test_number_of_threads_is_torchs() -> None:
    torch.set_num_threads(3)
    assert _native.num_threads() == 3
    assert _native.where(torch.zeros(1)) == (-1, 0, 3)


def _threads_in_child(queue: multiprocessing.Queue[tuple[int, int, float]]) -> None:
    threads = _native.num_threads()
    total = torch.ones(4_000_000).sum().item()  # torch runs this on several threads
    queue.put((threads, torch.get_num_threads(), total))


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_torch_runs_on_one_thread_in_a_forked_child() -> None:
    torch.set_num_threads(2)
    torch.ones(4_000_000).sum()  # starts libgomp's threads in the parent
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_threads_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == (2, 1, 4_000_000.0)
    finally:
        child.kill()
        child.join()
    assert _native.num_threads() == torch.get_num_threads() == 2


def on_device(name: str) -> torch.Tensor:
    """A mock of a tensor on a device that this machine need not have."""
    device = torch.device(name)
    kinds = {f"is_{kind}": device.type == kind for kind in ("cpu", "cuda")}
    return types.SimpleNamespace(device=device, **kinds)  # type: ignore[return-value]


def test_other_devices_raise() -> None:
    with pytest.raises(RuntimeError, match=r"CPU and CUDA devices, got a tensor on 'mps:0'"):
        _native.where(on_device("mps:0"))
    with pytest.raises(RuntimeError, match="'meta'"):
        _native.where(torch.empty(1, device="meta"))


def test_cuda_tensor_without_cuda_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_has_cuda", False)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(RuntimeError, match="SEGKERNELS_CUDA=1 pip install"):
        _native.where(on_device("cuda:0"))


def test_rocm_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RuntimeError, match="ROCm"):
        _native.where(on_device("cuda:0"))


@pytest.mark.gpu
def test_where_returns_the_current_cuda_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor = torch.zeros(1, device="cuda")
        assert _native.where(tensor) == (tensor.device.index, stream.cuda_stream, 0)


def test_info_json() -> None:
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert set(data) == {"versions", "system", "native", "devices", "ops", "problems"}
    assert data["versions"]["segkernels"] == segkernels.__version__
    assert data["versions"]["torch"] == torch.__version__
    native = data["native"]
    assert native.pop("left_out") == info._left_out(native)
    assert native == {"problem": None, **_native.C().build_info()}
    assert data["devices"][0]["device"] == "cpu"
    assert data["devices"][0]["usable"] is True
    for op in data["ops"]:
        assert op["available"]["cpu"] is True
        assert isinstance(op["deterministic"], bool)
    for problem in data["problems"]:
        assert problem["what"]
        assert problem["why"]
        assert problem["do"]


def test_info_fits_80_columns() -> None:
    result = CliRunner().invoke(app, ["info"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert str(torch.__version__) in result.stdout
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert max(map(len, lines)) <= 80
    for op in info.collect()["ops"]:  # one unwrapped line each
        (line,) = (line for line in lines if line.startswith(f"{op['name']} "))
        assert line.endswith("yes" if op["deterministic"] else "no")


def test_info_says_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"version": "1", "cuda": "13.0", "simd": ["base", "avx2"]}
    module = types.SimpleNamespace(has_sm90a=False)
    monkeypatch.setattr(_native, "_module", module)
    monkeypatch.setattr(info.platform, "machine", lambda: "x86_64")
    assert info._left_out(built) == {"Hopper kernels": "9.0 is not among the architectures"}
    module.has_sm90a = True
    assert info._left_out(built) == {}
    missing = "no CUDA toolkit was found. Searched:\n  - CUDA_HOME: not set"
    built |= {"cuda": None, "cuda_missing": missing, "simd": ["base"]}
    assert info._left_out(built) == {
        "CUDA": "no CUDA toolkit was found",
        "AVX2 and AVX-512": "the compiler does not accept their options",
    }
    assert info._left_out({"version": None}) == {}


def test_info_reports_a_gpu_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(name="GPU", major=10, minor=0, total_memory=1 << 30)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    built = {**_native.C().build_info(), "cuda": "13.0", "arches": ["8.0", "9.0"]}
    module = types.SimpleNamespace(build_info=lambda: built, has_sm90a=True)
    monkeypatch.setattr(_native, "_module", module)
    data = info.collect()
    assert data["devices"][1]["usable"] is False
    assert "the GPU is 10.0" in data["problems"][0]["why"]
    built.update(cuda=None, arches=[], cuda_missing="no toolkit")
    data = info.collect()
    assert data["problems"][0]["why"].endswith("no toolkit")
    assert "SEGKERNELS_CUDA=1" in data["problems"][0]["do"]


@pytest.mark.parametrize(
    ("arches", "capability", "covered"),
    [
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0", "9.0"], (10, 0), False),
        (["8.0", "9.0+PTX"], (12, 0), True),
        (["9.0+PTX"], (8, 0), False),
        ([], (8, 0), False),
    ],
)
def test_covers(arches: list[str], capability: tuple[int, int], covered: bool) -> None:
    assert info.covers(arches, capability) is covered


def test_version_option() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.strip() == segkernels.__version__
