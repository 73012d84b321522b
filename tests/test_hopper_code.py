"""Machine code of the Hopper kernels; needs nvcc."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc").rglob("*.sm90a.cu"))


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_report", ROOT / ".ci" / "cuda_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["cuda_report"] = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        # The module adds the repository root, which would hide the installed package.
        sys.path[:] = before
    return module


def test_count_instructions(report: ModuleType) -> None:
    sass = (
        "Function : _Z11conv_kernelv\n HGMMA.64x256x16.F32 ;\n UTMALDG.4D ;\n HGMMA ;\n"
        "Function : _Z13weight_kernelv\n HMMA.16816.F32 R24 ;\n"
        "Function : _Z12fixup_kernelv\n FADD ;\n"
    )
    assert report.count_instructions(sass) == {
        "_Z11conv_kernelv": {"HGMMA": 2, "UTMALDG": 1},
        "_Z13weight_kernelv": {"HGMMA": 0, "UTMALDG": 0},
    }


@pytest.mark.compiles
@pytest.mark.nightly
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_machine_code(
    source: Path, report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEGKERNELS_CUDA", raising=False)
    toolkit, missing = report.cuda.find_toolkit()
    tool = toolkit and report.find_cuobjdump(toolkit)
    if not tool:
        pytest.skip(f"needs nvcc and cuobjdump: {missing or 'no cuobjdump'}")
    target = tmp_path / "kernels.o"
    command = [str(toolkit.nvcc), "-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}"]
    command += [f"-isystem={folder}" for folder in toolkit.includes]
    command += ["-fmad=false", "--expt-relaxed-constexpr", "-Xptxas=-v", "-c", str(source)]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    kernels = report.parse(done.stdout + done.stderr, source.name)
    assert kernels
    assert {(k.symbol, k.spill, k.stack) for k in kernels} == {(k.symbol, 0, 0) for k in kernels}

    listing = subprocess.run([tool, "-sass", str(target)], capture_output=True, text=True)
    functions = dict(
        text.split("\n", maxsplit=1) for text in listing.stdout.split("Function : ")[1:]
    )
    counts = report.count_instructions(listing.stdout)
    assert len(counts) == sum("fixup" not in name for name in functions)
    for symbol, found in counts.items():
        # One loop step: four matrix products, and the copies.
        assert found["HGMMA"] == 4
        assert found["UTMALDG"] >= 2
        body = functions[symbol]
        assert not re.search(r"\b(LDL|STL)\b", body), "local memory"
        loop = body[body.index("HGMMA") : body.rindex("HGMMA")]
        assert not re.search(r"\b(MEMBAR|ERRBAR|DEPBAR)\b", loop), "a fence between the products"
