"""dilated_conv2d's epilogue kernel: interpreted, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops import triton_tools
from ops.triton_tools import compiled, ptxas

import segkernels
from segkernels.ops.dilated_conv2d.call import Epilogue

HERE = Path(__file__).parent


@triton_tools.interpreter
def test_interpreted() -> None:
    triton_tools.run_interpreted_tests(HERE / "interpreted_epilogue.py", 32)


def compiles(
    dtype: str, which: set[str], constants: dict[str, Any], arch: int, ones: bool = False
) -> Any:
    """The kernel as its launch finds it; with `ones`, sizes that are 1."""
    from segkernels.ops.dilated_conv2d.triton_kernels import epilogue

    types, constants = {"y": f"*{dtype}"}, {**constants, "RELU": True}
    for name in ("bias", "scale", "shift", "residual"):
        constants[name.upper()] = name in which
        if name not in which:
            constants[name] = None
        else:
            types[name] = "*fp32" if name in ("scale", "shift") else types["y"]
    if ones:
        given = {*types, *constants, *epilogue.do_not_specialize}
        constants |= {name: 1 for name in epilogue.arg_names if name not in given}
    return compiled(epilogue, types, constants, arch, warps=4)


@pytest.mark.compiles
@pytest.mark.nightly
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_compiles_without_spills(
    channels_last: bool, dtype: str, arch: int, tmp_path: Path
) -> None:
    constants = {"CHANNELS_LAST": channels_last, "BR": 4, "BI": 1024}
    made = compiles(dtype, {"bias", "scale", "shift", "residual"}, constants, arch)
    report = ptxas(made.asm["ptx"], tmp_path)
    print(f"sm_{arch} {dtype} epilogue: {report}")
    assert report.spilled == 0


@pytest.mark.compiles
@pytest.mark.nightly
def test_sizes_of_one_compile() -> None:
    """Sizes that are 1 are constants to Triton, and may then be of another type to it."""
    for channels_last in (False, True):
        constants = {"CHANNELS_LAST": channels_last, "BR": 4, "BI": 16}
        compiles("bf16", {"bias", "residual"}, constants, 90, ones=True)


def test_other_numbers_of_rows_need_no_other_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from segkernels.ops.dilated_conv2d.triton_kernels import apply

    seen = triton_tools.note_compiles(monkeypatch)
    for batch, height, width in ((1, 1, 1), (2, 65, 65), (8, 16, 16), (3, 7, 5)):
        y = torch.empty(batch, 64, height, width, dtype=torch.bfloat16)
        apply(y.contiguous(memory_format=torch.channels_last), Epilogue(torch.empty(64).bfloat16()))
    assert len(seen) == 4
    assert {name for name, _ in seen} == {"epilogue"}
    assert len(set(seen[1:])) == 1  # of one pixel there is no telling the layouts apart


# On a GPU.


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 33, 31), (3, 21, 5, 7), (1, 1100, 9, 8)], ids=str)
def test_on_a_gpu_against_float64_and_the_same_bits(
    shape: Any, dtype: torch.dtype, layout: Any
) -> None:
    from segkernels.ops.dilated_conv2d.triton_kernels import apply

    channels = shape[1]
    y, residual = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    y = y.contiguous(memory_format=layout)
    bias = torch.randn(channels, device="cuda").to(dtype)
    scale, shift = (torch.randn(channels, device="cuda") for _ in range(2))
    e = Epilogue(bias, scale, shift, residual, "relu")
    exact = (y.double() + bias.double()[:, None, None]) * scale.double()[:, None, None]
    exact = F.relu(exact + shift.double()[:, None, None] + residual.double())
    ours = apply(y.clone(memory_format=torch.preserve_format), e)
    limit = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(ours.double(), exact, rtol=limit, atol=limit)
    assert torch.equal(apply(y.clone(memory_format=torch.preserve_format), e), ours)


@pytest.mark.gpu
def test_on_a_gpu_behind_cudnn_in_a_graph() -> None:
    x = torch.randn(2, 64, 33, 33, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16)
    scale, shift = torch.rand(64, device="cuda"), torch.randn(64, device="cuda")

    def call() -> torch.Tensor:
        return segkernels.dilated_conv2d(
            x, w, padding=2, dilation=2, scale=scale, shift=shift, activation="relu",
            backend="torch",
        )  # fmt: skip

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    expected = call().double()
    assert float((captured.double() - expected).norm() / expected.norm()) <= 4e-3


@pytest.mark.huge
@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_on_a_gpu_more_than_2_31_elements(layout: Any) -> None:
    from segkernels.ops.dilated_conv2d.triton_kernels import apply

    side = int((2**31 / 64) ** 0.5) + 64
    y = torch.empty(1, 64, side, side, device="cuda", dtype=torch.bfloat16, memory_format=layout)
    assert y.numel() > 2**31
    y.fill_(1)
    bias = torch.arange(-32, 32, device="cuda", dtype=torch.bfloat16)
    apply(y, Epilogue(bias, activation="relu"))
    wanted = F.relu(bias + 1)[:, None, None].expand(64, 64, 64)
    assert torch.equal(y[0, :, :64, :64], wanted)
    assert torch.equal(y[0, :, -64:, -64:], wanted)
