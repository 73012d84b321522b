"""Triton epilogue kernel of dilated_conv2d: values, and compiles ahead of time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulation import interpreter
from emulation.interpreter import on_triton
from ops import triton_tools
from ops.triton_tools import compiled, ptxas

import segkernels
from segkernels.ops.dilated_conv2d import cudnn, reference
from segkernels.ops.dilated_conv2d.call import Epilogue

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
# The interpreter truncates to bfloat16 where a GPU rounds.
ACCURACY = {
    torch.bfloat16: 8e-3 if interpreter.on() else 4e-3,
    torch.float16: 6e-4,
    torch.float32: 1e-6,
}


def exact(y: torch.Tensor, e: Epilogue) -> torch.Tensor:
    y = y.double()
    if e.bias is not None:
        y = y + e.bias.double()[:, None, None]
    if e.scale is not None:
        y = y * e.scale.double()[:, None, None]
    if e.shift is not None:
        y = y + e.shift.double()[:, None, None]
    if e.residual is not None:
        y = y + e.residual.double()
    return F.relu(y) if e.activation else y


def apply(y: torch.Tensor, e: Epilogue) -> torch.Tensor:
    from segkernels.ops.dilated_conv2d import triton_kernels

    ours = triton_kernels.apply(y, e)
    assert ours is y
    return ours


def check(y: torch.Tensor, e: Epilogue) -> None:
    """Compare with float64, and two runs with each other bitwise."""
    wanted, limit = exact(y, e), ACCURACY[y.dtype]
    again = apply(y.clone(memory_format=torch.preserve_format), e)
    ours = apply(y, e)
    torch.testing.assert_close(ours.double(), wanted, rtol=limit, atol=limit)
    assert torch.equal(again, ours)


@pytest.mark.compiles
@on_triton
@LAYOUTS
@pytest.mark.parametrize("dtype", ACCURACY, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 3, 7), (1, 33, 2, 2), (3, 16, 1, 1), (2, 64, 33, 31), (3, 21, 5, 7), (1, 1100, 9, 8)],
    ids=str,
)
def test_all_parts(shape: Any, dtype: torch.dtype, layout: Any, device: torch.device) -> None:
    y, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    bias, scale, shift = (torch.randn(shape[1], device=device) for _ in range(3))
    y = y.contiguous(memory_format=layout)
    check(y, Epilogue(bias.to(dtype), scale, shift, residual, "relu"))


@on_triton
@LAYOUTS
@pytest.mark.parametrize("name", ["bias", "scale", "shift", "residual"])
def test_each_part_alone(name: str, layout: Any, device: torch.device) -> None:
    y = torch.randn(2, 5, 3, 4, device=device).contiguous(memory_format=layout)
    part = torch.randn(y.shape if name == "residual" else 5, device=device)
    check(y, Epilogue(**{name: part}))


@on_triton
@LAYOUTS
def test_several_blocks_of_rows_and_columns(layout: Any, device: torch.device) -> None:
    for shape in ((2, 1100, 3, 4), (2, 5, 41, 43)):
        y, residual = (torch.randn(shape, device=device) for _ in range(2))
        y = y.contiguous(memory_format=layout)
        check(y, Epilogue(torch.randn(shape[1], device=device), None, None, residual, "relu"))


@on_triton
def test_strided_vectors(device: torch.device) -> None:
    bias, scale = torch.randn(32, device=device)[::2], torch.rand(16, 3, device=device)[:, 1]
    shift = torch.tensor(2.0, device=device).expand(16)
    check(torch.randn(1, 16, 6, 7, device=device), Epilogue(bias, scale, shift))


@on_triton
@LAYOUTS
def test_nan_passes_relu(layout: Any, device: torch.device) -> None:
    y = torch.randn(1, 16, 4, 4, device=device).contiguous(memory_format=layout)
    y[0, 3, 1, 2] = float("nan")
    wanted, bias = y.isnan(), torch.randn(16, device=device)
    assert torch.equal(apply(y, Epilogue(bias, activation="relu")).isnan(), wanted)


@on_triton
def test_empty_epilogue_and_empty_batch(device: torch.device) -> None:
    y = torch.randn(2, 5, 3, 4, device=device)
    before = y.clone()
    assert torch.equal(apply(y, Epilogue()), before)
    assert apply(y[:0], Epilogue(torch.randn(5, device=device))).shape == (0, 5, 3, 4)


@on_triton
@LAYOUTS
@pytest.mark.parametrize("dtype", [*ACCURACY, torch.float64], ids=str)
def test_after_a_convolution(
    dtype: torch.dtype,
    layout: Any,
    device: torch.device,
    exact_cudnn: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches: list[torch.dtype] = []
    monkeypatch.setattr(
        cudnn, "_fused_epilogue", lambda: lambda y, e: launches.append(y.dtype) or apply(y, e)
    )
    x = torch.randn(2, 16, 9, 7, device=device, dtype=dtype).contiguous(memory_format=layout)
    w = torch.randn(24, 16, 3, 3, device=device, dtype=dtype) / 12
    residual = torch.randn(2, 24, 9, 7, device=device, dtype=dtype)
    bias, scale, shift = (torch.randn(24, device=device, dtype=dtype) for _ in range(3))
    kwargs = {"bias": bias, "scale": scale, "shift": shift, "residual": residual}
    ours = segkernels.dilated_conv2d(
        x, w, padding=2, dilation=2, activation="relu", backend="torch", **kwargs
    )
    # The epilogue is in float32 where this CPU has no convolution of a half-precision dtype.
    assert len(launches) == (dtype != torch.float64)
    kwargs = {name: value.double() for name, value in kwargs.items()}
    wanted = reference.dilated_conv2d(
        x.double(), w.double(), padding=2, dilation=2, activation="relu", **kwargs
    )
    assert ours.dtype == dtype
    limit = 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5
    torch.testing.assert_close(ours.double(), wanted, rtol=limit, atol=limit)


def compiles(
    dtype: str, which: set[str], constants: dict[str, Any], arch: int, ones: bool = False
) -> Any:
    """Compile the kernel ahead of time; with `ones`, for sizes that are 1."""
    from segkernels.ops.dilated_conv2d.triton_kernels import epilogue

    types, constants = {"y": f"*{dtype}"}, {**constants, "RELU": True}
    for name in ("bias", "scale", "shift", "residual"):
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
    constants = {"CHANNELS_LAST": channels_last, "BLOCK_ROWS": 4, "BLOCK_COLUMNS": 1024}
    made = compiles(dtype, {"bias", "scale", "shift", "residual"}, constants, arch)
    report = ptxas(made.asm["ptx"], tmp_path)
    print(f"sm_{arch} {dtype} epilogue: {report}")
    assert report.spilled == 0


@pytest.mark.compiles
@pytest.mark.nightly
def test_compiles_for_sizes_of_one() -> None:
    """Triton turns arguments equal to 1 into constants, which may have another type."""
    for channels_last in (False, True):
        constants = {"CHANNELS_LAST": channels_last, "BLOCK_ROWS": 4, "BLOCK_COLUMNS": 16}
        compiles("bf16", {"bias", "residual"}, constants, 90, ones=True)


def test_other_sizes_do_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = triton_tools.note_compiles(monkeypatch)
    for batch, height, width in ((1, 1, 1), (2, 65, 65), (8, 16, 16), (3, 7, 5)):
        y = torch.empty(batch, 64, height, width, dtype=torch.bfloat16)
        apply(y.contiguous(memory_format=torch.channels_last), Epilogue(torch.empty(64).bfloat16()))
    assert len(seen) == 4
    assert {name for name, _ in seen} == {"epilogue"}
    assert len(set(seen[1:])) == 1  # a single pixel has no distinct layout


def test_without_triton_torch_computes_the_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    cudnn._fused_epilogue.cache_clear()
    try:
        assert cudnn._fused_epilogue() is None
        x, w = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
        assert torch.equal(segkernels.dilated_conv2d(x, w), F.conv2d(x, w))
    finally:
        cudnn._fused_epilogue.cache_clear()


# --- on a GPU ---


@pytest.mark.gpu
def test_cuda_graph_after_cudnn() -> None:
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
def test_more_than_2_31_elements(layout: Any) -> None:
    side = int((2**31 / 64) ** 0.5) + 64
    y = torch.empty(1, 64, side, side, device="cuda", dtype=torch.bfloat16, memory_format=layout)
    assert y.numel() > 2**31
    y.fill_(1)
    bias = torch.arange(-32, 32, device="cuda", dtype=torch.bfloat16)
    apply(y, Epilogue(bias, activation="relu"))
    wanted = F.relu(bias + 1)[:, None, None].expand(64, 64, 64)
    assert torch.equal(y[0, :, :64, :64], wanted)
    assert torch.equal(y[0, :, -64:, -64:], wanted)
