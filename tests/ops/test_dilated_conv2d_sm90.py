"""The Hopper convolution kernel, on a Hopper GPU and emulated on the CPU.

The emulation (tests/emulation) runs the kernel's own code (boxes, taps, swizzle, descriptors,
registers, epilogue, fix-ups) on models of the copy engine and of the warpgroup matrix product.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import emulation
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import segkernels
from segkernels import _native
from segkernels.ops.dilated_conv2d import backends
from segkernels.ops.dilated_conv2d import native as sm90
from segkernels.ops.dilated_conv2d.call import Call, Epilogue
from segkernels.ops.dilated_conv2d.geometry import Geometry, Problem

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# ||y - ref|| / ||ref|| against float64; float32 is multiplied as TF32.
BOUND = {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 6e-4}


def geometry_of(
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
) -> Geometry:
    out = [
        s + 2 * p - d * (k - 1) for s, k, d, p in zip(size, kernel, dilation, padding, strict=True)
    ]
    return Geometry(*size, out[0], out[1], kernel, padding, dilation)


def same(size: tuple[int, int], kernel: int, dilation: int) -> Geometry:
    pad = dilation * (kernel - 1) // 2
    return geometry_of(size, (kernel, kernel), (dilation, dilation), (pad, pad))


def reference(x: torch.Tensor, w: torch.Tensor, g: Geometry) -> torch.Tensor:
    return F.conv2d(x.double(), w.double(), None, 1, g.padding, g.dilation)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def operands(
    batch: int,
    channels: int,
    out_channels: int,
    g: Geometry,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, channels, g.height, g.width, device=device, dtype=dtype)
    w = torch.randn(out_channels, channels, *g.kernel, device=device) / (channels * g.taps) ** 0.5
    layout = torch.channels_last
    return x.to(memory_format=layout), w.to(dtype).to(memory_format=layout)


@pytest.fixture
def schedule_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Overrides options of the schedule, which the shape would decide."""

    def choose(multiprocessors: int = 6, **options: int) -> None:
        def schedule(shape: tuple[Any, ...], _: int) -> dict[str, Any]:
            found: dict[str, Any] = _native.C().dilated_conv2d_schedule(
                *shape, multiprocessors, **options
            )
            return found

        monkeypatch.setattr(sm90, "_tables", OrderedDict())
        monkeypatch.setattr(sm90, "_schedule", schedule)

    return choose


# (tile_channels, cluster) of all kernel instances.
TILES = [(32, 1), (64, 1), (128, 1), (128, 2), (256, 1), (256, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tile_channels", "cluster"), TILES)
@pytest.mark.parametrize("out_channels", [72, 21])
def test_every_tile(
    dtype: torch.dtype,
    tile_channels: int,
    cluster: int,
    out_channels: int,
    schedule_with: Any,
    hopper: str,
) -> None:
    schedule_with(tile_channels=tile_channels, cluster=cluster, multiprocessors=30)
    g = same((11, 13), 3, 1)
    x, w = operands(5, 136, out_channels, g, dtype, hopper)
    expected = reference(x, w, g)
    assert error(sm90.forward(x, w, g), expected) <= BOUND[dtype]
    scale = torch.rand(out_channels, device=hopper)
    shift = torch.randn(out_channels, device=hopper)
    residual = torch.randn(expected.shape, device=hopper).to(dtype)
    expected = expected * scale[:, None, None] + shift[:, None, None] + residual
    y = sm90.forward(x, w, g, scale, shift, residual, "relu")
    assert error(y, expected.relu()) <= BOUND[dtype]
    (table,) = sm90._tables.values()
    fixups = table.words[-6 * table.schedule["fixups"] :].view(-1, 6)
    # Cut tiles occur on every multiprocessor of a cluster.
    assert set((fixups[:, 3] % cluster).tolist()) == set(range(cluster))


@pytest.mark.emulated
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def draw(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    torch.manual_seed(0)
    dtype = data.draw(st.sampled_from(DTYPES))
    kernel = (draw("kh", 1, 7), draw("kw", 1, 7))
    dilation = (draw("dh", 1, 5), draw("dw", 1, 5))
    padding = (draw("ph", 0, 12), draw("pw", 0, 12))
    size = [
        max(draw(name, 1, 17), d * (k - 1) - 2 * p + 1)
        for name, d, k, p in zip("HW", dilation, kernel, padding, strict=True)
    ]
    g = geometry_of((size[0], size[1]), kernel, dilation, padding)
    x, w = operands(draw("N", 1, 3), draw("C", 1, 80), draw("CO", 1, 70), g, dtype)
    if dtype == torch.float32:
        # Exact in TF32, else a few cancelling products would show only the operands' rounding.
        x, w = x.half().float(), w.half().float()
    y = sm90.forward(x, w, g)
    assert y.is_contiguous(memory_format=torch.channels_last)
    expected = reference(x, w, g)
    assert (y.double() - expected).norm() <= BOUND[dtype] * expected.norm() + 1e-6

    grad = torch.randn_like(y).half().to(dtype)
    dx = sm90.input_gradient(grad, w, g)
    expected = torch.nn.grad.conv2d_input(
        list(x.shape), w.double(), grad.double(), 1, g.padding, g.dilation
    )
    assert (dx.double() - expected).norm() <= BOUND[dtype] * expected.norm() + 1e-6


def weight_reference(grad: torch.Tensor, x: torch.Tensor, g: Geometry) -> torch.Tensor:
    shape = (grad.size(1), x.size(1), *g.kernel)
    return torch.nn.grad.conv2d_weight(x.double(), shape, grad.double(), 1, g.padding, g.dilation)


@pytest.mark.emulated
@given(data=st.data())
def test_weight_gradient(data: st.DataObject) -> None:
    def draw(name: str, low: int, high: int) -> int:
        return data.draw(st.integers(low, high), label=name)

    torch.manual_seed(0)
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    kernel = (draw("kh", 1, 3), draw("kw", 1, 4))
    dilation = (draw("dh", 1, 5), draw("dw", 1, 5))
    padding = (draw("ph", 0, 9), draw("pw", 0, 9))
    size = [
        max(draw(name, 1, 17), d * (k - 1) - 2 * p + 1)
        for name, d, k, p in zip("HW", dilation, kernel, padding, strict=True)
    ]
    g = geometry_of((size[0], size[1]), kernel, dilation, padding)
    x = torch.randn(draw("N", 1, 3), draw("C", 1, 140), g.height, g.width).to(dtype)
    grad = torch.randn(x.size(0), draw("CO", 1, 140), g.out_height, g.out_width).to(dtype)
    dw = sm90.weight_gradient(grad, x, g)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    expected = weight_reference(grad, x, g)
    assert (dw.double() - expected).norm() <= BOUND[dtype] * expected.norm() + 1e-6


@pytest.mark.parametrize("channels", [64, 128, 264])
def test_weight_gradient_of_every_tile(channels: int, hopper: str) -> None:
    g = same((17, 17), 3, 6)
    x = torch.randn(3, channels, 17, 17, device=hopper).half()
    grad = torch.randn(3, 136, 17, 17, device=hopper).half()
    dw = sm90.weight_gradient(grad, x, g)
    assert error(dw, weight_reference(grad, x, g)) <= BOUND[torch.float16]


def test_weight_gradient_of_an_empty_batch() -> None:
    dw = sm90.weight_gradient(
        torch.ones(0, 3, 5, 5).half(), torch.ones(0, 9, 5, 5).half(), same((5, 5), 3, 1)
    )
    assert torch.equal(dw, torch.zeros(3, 9, 3, 3).half())


@pytest.mark.parametrize("out_channels", [24, 21, 1])
@pytest.mark.parametrize("part", ["scale", "shift", "residual", "relu", "all"])
def test_epilogue(out_channels: int, part: str, hopper: str) -> None:
    g = same((9, 9), 3, 2)
    x, w = operands(2, 64, out_channels, g, torch.bfloat16, hopper)
    y = reference(x, w, g)
    arguments: dict[str, Any] = {}
    if part in ("scale", "all"):
        arguments["scale"] = torch.rand(out_channels, device=hopper) + 0.5
        y = y * arguments["scale"].double()[:, None, None]
    if part in ("shift", "all"):
        arguments["shift"] = torch.randn(out_channels, device=hopper)
        y = y + arguments["shift"].double()[:, None, None]
    if part in ("residual", "all"):
        arguments["residual"] = torch.randn(y.shape, device=hopper).bfloat16()
        y = y + arguments["residual"].double()
    if part in ("relu", "all"):
        arguments["activation"] = "relu"
        y = y.relu()
    assert error(sm90.forward(x, w, g, **arguments), y) <= BOUND[torch.bfloat16]


def test_nan_propagation(hopper: str) -> None:
    g = same((12, 12), 3, 4)
    x, w = operands(1, 64, 16, g, torch.float16, hopper)
    x[0, 5, 6, 6] = float("nan")
    y = sm90.forward(x, w, g, activation="relu")
    expected = reference(x, w, g).isnan()
    assert torch.equal(y.isnan(), expected)
    assert expected.any()
    assert not expected.all()


@pytest.mark.parametrize("out_channels", [(24, 24, 24), (21, 5, 32)])
def test_branches_are_concatenated(out_channels: tuple[int, ...], hopper: str) -> None:
    geometries = [same((13, 13), 1, 1), same((13, 13), 3, 4), same((13, 13), 3, 9)]
    x, _ = operands(2, 64, 1, geometries[0], torch.float16, hopper)
    weights = [
        operands(1, 64, count, g, torch.float16, hopper)[1]
        for count, g in zip(out_channels, geometries, strict=True)
    ]
    total = sum(out_channels)
    scale, shift = torch.rand(total, device=hopper), torch.randn(total, device=hopper)
    y = sm90.forward_branches(x, weights, geometries, scale, shift)
    expected = torch.cat(
        [reference(x, w, g) for w, g in zip(weights, geometries, strict=True)], dim=1
    )
    expected = expected * scale.double()[:, None, None] + shift.double()[:, None, None]
    assert error(y, expected) <= BOUND[torch.float16]


@pytest.mark.parametrize("first", [0, 8, 3])
def test_branches_write_into_a_larger_tensor(first: int, hopper: str) -> None:
    geometries = [same((9, 7), 1, 1), same((9, 7), 3, 4)]
    x, w = operands(2, 64, 24, geometries[0], torch.float16, hopper)
    weights = [w, operands(2, 64, 24, geometries[1], torch.float16, hopper)[1]]
    residual = torch.randn(2, 48, 9, 7, device=hopper).half()
    larger = torch.full_like(torch.cat([x] * 2, dim=1), 7.0)
    into = larger[:, first : first + 48]
    out = sm90.forward_branches(x, weights, geometries, residual=residual, into=into)
    assert out is into
    assert torch.equal(out, sm90.forward_branches(x, weights, geometries, residual=residual))
    assert bool((larger[:, :first] == 7).all())
    assert bool((larger[:, first + 48 :] == 7).all())


def test_invalid_into() -> None:
    g = same((9, 7), 3, 4)
    x, w = operands(2, 64, 24, g, torch.float16)
    wide = torch.zeros(2, 24, 9, 14).half().to(memory_format=torch.channels_last)
    for into in (
        torch.zeros(2, 24, 9, 7).half(),  # not channels_last
        wide[..., :7],  # rows are not adjacent
        torch.zeros(2, 25, 9, 7).half(),
        torch.zeros(2, 24, 9, 7).to(memory_format=torch.channels_last),
    ):
        with pytest.raises(ValueError, match=r"into must be channels_last.* \[2, 24, 9, 7\]"):
            sm90.forward_branches(x, [w], [g], into=into)


def test_layouts_and_strided_views(hopper: str) -> None:
    g = same((9, 9), 3, 2)
    x, w = operands(2, 72, 24, g, torch.float16, hopper)
    expected = sm90.forward(x, w, g)
    assert torch.equal(sm90.forward(x.contiguous(), w.contiguous(), g), expected)
    wide = torch.cat([x[:, :1], x, x[:, :7]], dim=1)
    assert torch.equal(sm90.forward(wide[:, 1:73], w, g), expected)
    # Rows are multiples of 16 bytes, but the address is not.
    memory = x.new_empty(x.numel() + 1)[1:]
    moved = memory.view(2, 9, 9, 72).permute(0, 3, 1, 2).copy_(x)
    assert torch.equal(sm90.forward(moved, w, g), expected)


def test_empty_batch() -> None:
    g = same((9, 9), 3, 2)
    x, w = operands(0, 64, 16, g, torch.float16)
    assert sm90.forward(x, w, g).shape == (0, 16, 9, 9)


def test_branches_of_different_sizes_raise() -> None:
    g = same((9, 9), 3, 2)
    x, w = operands(1, 64, 16, g, torch.float16)
    with pytest.raises(ValueError, match=r"1 to 8 weights .* got 2 and 2 of 2 sizes"):
        sm90.forward_branches(x, [w, w], [g, same((8, 9), 3, 2)])
    with pytest.raises(ValueError, match="got 9 and 9"):
        sm90.forward_branches(x, [w] * 9, [g] * 9)


def test_schedules_are_cached_by_shape(hopper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm90, "_tables", OrderedDict())
    monkeypatch.setattr(sm90, "_MAX_TABLES", 2)
    g = same((9, 9), 3, 2)
    for batch in (1, 1, 2, 3):
        x, w = operands(batch, 64, 16, g, torch.float16, hopper)
        sm90.forward(x, w, g)
    assert [key[0] for key in sm90._tables] == [2, 3]


@pytest.mark.emulated
def test_table_of_a_captured_call_outlives_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm90, "_MAX_TABLES", 1)
    g = same((9, 9), 3, 2)
    x, w = operands(3, 64, 16, g, torch.float16)
    expected = sm90.forward(x, w, g)
    with emulation.capture():
        assert torch.equal(sm90.forward(x, w, g), expected)
    (table,) = sm90._tables.values()
    for batch in (2, 1):
        sm90.forward(x[:batch], w, g)
    assert sm90._captured_tables == [table]


PROBLEM = Problem(
    8, 2048, 256, same((65, 65), 3, 12), (1, 1), 1, torch.bfloat16, torch.device("cuda", 0)
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.float16}, ""),
        ({"dtype": torch.float32}, ""),
        ({"channels": 21, "out_channels": 21}, ""),
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"stride": (2, 1)}, "stride must be 1"),
        ({"groups": 2}, "groups must be 1"),
        ({"geometry": same((65, 65), 9, 1)}, "7 x 7"),
        ({"batch": 2**31}, "2\\^31"),
        ({"batch": 2**24, "out_channels": 1024}, "split the batch"),
        ({"device": torch.device("cpu")}, "CUDA device, got 'cpu'"),
    ],
)
def test_supported(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm90, "_capability", lambda _: (9, 0))

    class Module:
        has_sm90a = True

    monkeypatch.setattr(_native, "C", Module)
    problem = PROBLEM._replace(**change)
    found = sm90.supported(problem)
    if reason:
        assert re.search(reason, found), found
    else:
        assert found == ""
    if problem.dtype == torch.float32:
        assert "got torch.float32" in sm90.weight_gradient_supported(problem)
    else:
        assert sm90.weight_gradient_supported(problem) == found


def test_other_devices_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm90, "_capability", lambda _: (8, 0))

    class Module:
        has_sm90a = True

    monkeypatch.setattr(_native, "C", Module)
    assert "9.0, got 8.0" in sm90.supported(PROBLEM)
    Module.has_sm90a = False
    assert "built without sm_90a" in sm90.supported(PROBLEM)


def test_float32_follows_torchs_tf32_setting() -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            assert sm90.tf32_allowed() == (precision == "tf32")
    finally:
        conv.fp32_precision = before


# For tests of large sizes, streams and graphs.
only_a_gpu = pytest.mark.parametrize(
    "hopper", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)

# batch, channels, out channels, size, dilation
SHAPES = [
    *((8, 2048, 256, (65, 65), d) for d in (1, 6, 12, 24, 36)),
    (8, 512, 1024, (41, 41), 12),
    (8, 512, 512, (65, 65), 4),
    (8, 256, 256, (65, 65), 2),
    (8, 2048, 256, (33, 33), 18),
    (1, 2048, 256, (65, 65), 12),
    (1, 2048, 256, (128, 256), 12),
    (8, 2048, 21, (65, 65), 24),
    (8, 2048, 48, (65, 65), 24),
    (8, 21, 21, (64, 64), 8),
    (4, 19, 19, (128, 256), 8),
    (3, 200, 384, (37, 51), 5),
]


@only_a_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "channels", "out_channels", "size", "dilation"), SHAPES)
def test_shapes_on_hopper(
    batch: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    dilation: int,
    dtype: torch.dtype,
    hopper: str,
) -> None:
    g = same(size, 3, dilation)
    x, w = operands(batch, channels, out_channels, g, dtype, hopper)
    expected = reference(x, w, g)
    bound = BOUND[dtype]
    if dtype == torch.float32:
        bound = max(bound, 1.05 * error(F.conv2d(x, w, None, 1, g.padding, g.dilation), expected))
    y = sm90.forward(x, w, g)
    assert error(y, expected) <= bound
    for _ in range(5):
        assert torch.equal(sm90.forward(x, w, g), y)

    grad = torch.randn_like(y)
    dx = sm90.input_gradient(grad, w, g)
    expected = torch.nn.grad.conv2d_input(
        list(x.shape), w.double(), grad.double(), 1, g.padding, g.dilation
    )
    assert error(dx, expected) <= BOUND[dtype]
    assert torch.equal(sm90.input_gradient(grad, w, g), dx)

    if dtype != torch.float32:
        dw = sm90.weight_gradient(grad, x, g)
        assert error(dw, weight_reference(grad, x, g)) <= BOUND[dtype]
        assert torch.equal(sm90.weight_gradient(grad, x, g), dw)


@only_a_gpu
def test_branches_on_hopper(hopper: str) -> None:
    geometries = [same((65, 65), 1, 1), *(same((65, 65), 3, d) for d in (12, 24, 36))]
    x, _ = operands(8, 2048, 1, geometries[0], torch.bfloat16, hopper)
    weights = [operands(1, 2048, 256, g, torch.bfloat16, hopper)[1] for g in geometries]
    y = sm90.forward_branches(x, weights, geometries)
    for found, w, g in zip(y.split(256, dim=1), weights, geometries, strict=True):
        assert error(found, reference(x, w, g)) <= BOUND[torch.bfloat16]


@only_a_gpu
def test_streams_and_graphs_on_hopper(hopper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm90, "_tables", OrderedDict())
    monkeypatch.setattr(sm90, "_captured_tables", [])
    monkeypatch.setattr(sm90, "_MAX_TABLES", 1)
    g = same((33, 33), 3, 6)
    x, w = operands(2, 512, 128, g, torch.bfloat16, hopper)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before"), torch.cuda.graph(graph):
        sm90.forward(x, w, g)

    expected = sm90.forward(x, w, g)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outs = []
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            outs.append(sm90.forward(x, w, g))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sm90.forward(x, w, g)
    # The captured call's table outlives the cache.
    sm90.forward(x[:1], w, g)
    torch.empty(2**20, device=hopper).fill_(float("nan"))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, sm90.forward(x, w, g))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_operator_and_gradients(
    dtype: torch.dtype, hopper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("forward", "input_gradient", "weight_gradient"):
        kernel = getattr(sm90, name)

        def counted(*args: Any, kernel: Any = kernel, name: str = name) -> torch.Tensor:
            calls.append(name)
            return kernel(*args)

        monkeypatch.setattr(sm90, name, counted)
    g = same((9, 9), 3, 2)
    x, w = operands(2, 24, 16, g, dtype, hopper)
    tensors = {
        "input": x,
        "weight": w,
        "bias": torch.randn(16, device=hopper).to(dtype),
        "scale": torch.rand(16, device=hopper),
        "shift": torch.randn(16, device=hopper),
        "residual": torch.randn(2, 16, 9, 9, device=hopper).to(dtype),
    }
    results = []
    for backend in ("sm90", "torch"):
        given = {
            name: (t.double() if backend == "torch" else t).detach().requires_grad_()
            for name, t in tensors.items()
        }
        y = segkernels.dilated_conv2d(
            **given, padding=2, dilation=2, activation="relu", backend=backend
        )
        grads = torch.autograd.grad(y.double().square().sum(), list(given.values()))
        results.append([y, *grads])
    for name, found, expected in zip(["output", *tensors], *results, strict=True):
        assert error(found.detach(), expected.detach()) <= 4 * BOUND[dtype], name
    # The input gradient calls the forward kernel.
    assert calls == ["forward", "input_gradient", "forward", "weight_gradient"]


@pytest.mark.emulated
def test_float32_weight_gradient_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("there is no such kernel")

    monkeypatch.setattr(sm90, "weight_gradient", never)
    g = same((9, 9), 3, 2)
    x, w = operands(2, 24, 16, g, torch.float32)
    grad = torch.randn(2, 16, 9, 9)
    c = Call((1, 1), (2, 2), (2, 2), 1, (9, 9), False, "sm90")
    dx, dw = backends.gradients(grad, x, w, (True, True), c)
    assert torch.equal(dx, sm90.input_gradient(grad, w, g).contiguous())
    assert error(dw, weight_reference(grad, x, g)) <= 1e-6


@pytest.mark.emulated
def test_operator_branches_share_one_launch() -> None:
    geometries = [same((9, 7), 1, 1), same((9, 7), 3, 4)]
    x, w = operands(2, 24, 16, geometries[0], torch.float16)
    weights = [w, operands(2, 24, 8, geometries[1], torch.float16)[1]]
    e = Epilogue(scale=torch.rand(24), shift=torch.randn(24), activation="relu")
    calls = [Call((1, 1), g.padding, g.dilation, 1, (9, 7), True, "sm90") for g in geometries]
    larger = torch.zeros(2, 32, 9, 7).half().to(memory_format=torch.channels_last)
    with emulation.emulated(False):
        assert not backends.forward_into(larger[:, :24], x, weights, e, calls)  # a CPU tensor
    assert backends.forward_into(larger[:, :24], x, weights, e, calls)
    expected = sm90.forward_branches(x, weights, geometries, e.scale, e.shift, None, "relu")
    assert torch.equal(larger[:, :24], expected)
    assert bool((larger[:, 24:] == 0).all())
