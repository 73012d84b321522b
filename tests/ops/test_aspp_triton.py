"""aspp's Triton path: interpreted, and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ops import triton_tools
from ops.test_dilated_conv2d_triton import H100, same
from ops.triton_tools import compiled, ptxas

import segkernels
from segkernels.ops.aspp import reference, triton_path
from segkernels.ops.dilated_conv2d import tuning

HERE = Path(__file__).parent
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@triton_tools.interpreter
@pytest.mark.parametrize(
    ("nightly", "least"), [(False, 7), pytest.param(True, 15, marks=pytest.mark.nightly)]
)
def test_interpreted(nightly: bool, least: int) -> None:
    """Runs interpreted_aspp.py, in float32 or all of it."""
    triton_tools.run_interpreted_tests(HERE / "interpreted_aspp.py", least, nightly)


def test_branches_are_cut_where_few_tiles_leave_the_device_idle() -> None:
    assert triton_path.cuts(105, 4, 288, H100) == 1
    assert triton_path.cuts(14, 4, 288, H100) == 2
    assert triton_path.cuts(1, 2, 288, H100) == 36  # parts of 8 steps at least
    assert triton_path.cuts(1, 2, 4, H100) == 1


@pytest.mark.compiles
@pytest.mark.nightly
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_compiles_without_spills(dtype: str, arch: int, tmp_path: Path) -> None:
    """DeepLab v2's: 2048 channels to 21 from four branches; descriptors on Hopper."""
    from segkernels.ops.aspp import triton_kernels as kernels

    described = arch == 90
    key = tuning.Key("forward", 8, 2048, 21, same(41, 12), DTYPES[dtype])
    config = tuning.config_without_file(key, H100)
    n, h, w = config.box
    types: dict[str, Any] = {"x": f"*{dtype}", "w": f"*{dtype}", "sums": "*fp32"}
    if described:
        types["x"] = f"tensordesc<{dtype}[{n},{h},{w},{config.step}]>"
        types["w"] = f"tensordesc<{dtype}[{config.block},1,{config.step}]>"
    types["taps"] = ("i32",) * 16
    constants = {"KH": 3, "KW": 3, "BRANCHES": 4, "BN": n, "BH": h, "BW": w}
    constants |= {"BC": config.block, "BK": config.step, "DESCRIPTORS": described}
    constants |= {"WIDE": False, "WIDEN": False, "PRECISION": "tf32"}  # type: ignore[dict-item]
    made = compiled(kernels.branch_sums, types, constants, arch, config.warps, config.stages)
    report = ptxas(made.asm["ptx"], tmp_path)
    print(f"sm_{arch} {dtype} branch_sums {config}: {report}")
    assert report.spilled == 0
    assert ("wgmma" if arch == 90 else "mma.sync") in made.asm["ptx"]
    assert made.metadata.shared <= (227 if arch == 90 else 163) * 1024


def test_the_cpu_is_not_taken() -> None:
    x, weights = torch.zeros(1, 8, 5, 5), [torch.zeros(8, 8, 3, 3)] * 2
    with pytest.raises(ValueError, match=r"backend='triton'.*needs a CUDA device, got 'cpu'"):
        segkernels.aspp(x, weights, (1, 2), backend="triton")


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["v3", "v2"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_on_a_gpu_against_float64_and_the_same_bits(
    backend: str, form: str, dtype: torch.dtype
) -> None:
    layout = {"memory_format": torch.channels_last}
    out_channels, kernels = (256, (1, 3, 3, 3)) if form == "v3" else (21, (3, 3, 3, 3))
    rates = (1, 12, 24, 36) if form == "v3" else (6, 12, 18, 24)
    x = torch.randn(8, 2048, 65, 65, device="cuda").to(dtype).contiguous(**layout)
    weights = [
        (torch.randn(out_channels, 2048, k, k, device="cuda") / (k * 45)).to(dtype) for k in kernels
    ]
    found = [segkernels.aspp(x, weights, rates, form=form, backend=backend) for _ in range(3)]
    wide = [w.double() for w in weights]
    exact = reference.aspp(x[:1].double(), wide, rates, form=form)
    off = float((found[0][:1].double() - exact).norm() / exact.norm())
    assert off <= {torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert all(torch.equal(found[0], again) for again in found[1:])
