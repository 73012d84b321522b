"""The Hopper convolution kernel, on a Hopper GPU and emulated on the CPU.

The emulation (tests/emulation) runs the kernel's own code (boxes, taps, swizzle, descriptors,
registers, epilogue, fix-ups) on models of the copy engine and of the warpgroup matrix product.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import emulation
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import segkernels
from segkernels import _native
from segkernels.ops.aspp import reference as aspp_reference
from segkernels.ops.dilated_conv2d import cost_model, cudnn, hopper, operator
from segkernels.ops.dilated_conv2d.call import Call, Epilogue, Problem

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# ||y - ref|| / ||ref|| against float64; float32 is multiplied as TF32.
BOUND = {torch.float16: 6e-4, torch.bfloat16: 4e-3, torch.float32: 6e-4}


class Shape(NamedTuple):
    """Sizes of the planes of a convolution."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]

    @property
    def call(self) -> Call:
        (h, w), (kh, kw), (dh, dw), (ph, pw) = self
        out = (h + 2 * ph - dh * (kh - 1), w + 2 * pw - dw * (kw - 1))
        return Call((1, 1), self.padding, self.dilation, 1, out, True, "sm90")


def same(size: tuple[int, int], kernel: int, dilation: int) -> Shape:
    pad = dilation * (kernel - 1) // 2
    return Shape(size, (kernel, kernel), (dilation, dilation), (pad, pad))


def reference(x: torch.Tensor, w: torch.Tensor, g: Shape) -> torch.Tensor:
    return F.conv2d(x.double(), w.double(), None, 1, g.padding, g.dilation)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def forward(x: torch.Tensor, w: torch.Tensor, g: Shape, **epilogue: Any) -> torch.Tensor:
    y = hopper.forward(x, [w], Epilogue(**epilogue), [g.call])
    assert y is not None
    return y


def branches(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    shapes: list[Shape],
    into: torch.Tensor | None = None,
    **epilogue: Any,
) -> torch.Tensor:
    y = hopper.forward(x, weights, Epilogue(**epilogue), [g.call for g in shapes], into)
    assert y is not None
    return y


def input_gradient(grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, g: Shape) -> torch.Tensor:
    dx = hopper.input_gradient(grad, x, w, g.call)
    assert dx is not None
    return dx


def weight_gradient(grad: torch.Tensor, x: torch.Tensor, g: Shape) -> torch.Tensor:
    dw = hopper.weight_gradient(grad, x, x.new_empty(grad.size(1), x.size(1), *g.kernel), g.call)
    assert dw is not None
    return dw


def operands(
    batch: int,
    channels: int,
    out_channels: int,
    g: Shape,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, channels, *g.size, device=device, dtype=dtype)
    taps = g.kernel[0] * g.kernel[1]
    w = torch.randn(out_channels, channels, *g.kernel, device=device) / (channels * taps) ** 0.5
    layout = torch.channels_last
    return x.to(memory_format=layout), w.to(dtype).to(memory_format=layout)


def cache_tables(monkeypatch: pytest.MonkeyPatch, count: int) -> Any:
    """Replace the cache of schedules by an empty one of `count`, and return it."""
    cached = functools.lru_cache(count)(hopper._table.__wrapped__)
    monkeypatch.setattr(hopper, "_table", cached)
    return cached


@pytest.fixture
def schedule_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Overrides options of the schedule, which the shape would decide."""

    def choose(multiprocessors: int = 6, **options: int) -> None:
        module = _native.C()
        schedule = functools.partial(module.dilated_conv2d_schedule, **options)
        monkeypatch.setattr(module, "dilated_conv2d_schedule", schedule)
        monkeypatch.setattr(hopper, "_multiprocessors", lambda index: multiprocessors)
        cache_tables(monkeypatch, 8)

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
    hopper_device: str,
) -> None:
    schedule_with(tile_channels=tile_channels, cluster=cluster, multiprocessors=30)
    g = same((11, 13), 3, 1)
    x, w = operands(5, 136, out_channels, g, dtype, hopper_device)
    expected = reference(x, w, g)
    assert error(forward(x, w, g), expected) <= BOUND[dtype]
    scale = torch.rand(out_channels, device=hopper_device)
    shift = torch.randn(out_channels, device=hopper_device)
    residual = torch.randn(expected.shape, device=hopper_device).to(dtype)
    expected = expected * scale[:, None, None] + shift[:, None, None] + residual
    y = forward(x, w, g, scale=scale, shift=shift, residual=residual, activation="relu")
    assert error(y, expected.relu()) <= BOUND[dtype]
    table = hopper._choose("forward", x, [w], [g.call])
    assert table is not None
    fixups = table.words[-6 * table.schedule["fixups"] :].view(-1, 6)
    # Cut tiles occur on every multiprocessor of a cluster.
    assert set((fixups[:, 3] % cluster).tolist()) == set(range(cluster))


class Draw:
    """Draws ints, and shapes whose output is not empty."""

    def __init__(self, data: st.DataObject) -> None:
        torch.manual_seed(0)
        self.data = data

    def __call__(self, name: str, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high), label=name)

    def shape(self, most_taps: tuple[int, int], most_padding: int) -> Shape:
        kernel = (self("kh", 1, most_taps[0]), self("kw", 1, most_taps[1]))
        dilation = (self("dh", 1, 5), self("dw", 1, 5))
        padding = (self("ph", 0, most_padding), self("pw", 0, most_padding))
        height, width = (
            max(self(name, 1, 17), d * (k - 1) - 2 * p + 1)
            for name, d, k, p in zip("HW", dilation, kernel, padding, strict=True)
        )
        return Shape((height, width), kernel, dilation, padding)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    bound = BOUND[found.dtype] * expected.norm() + 1e-6
    assert (found.double() - expected).norm() <= bound


@pytest.mark.emulated
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = Draw(data)
    dtype = data.draw(st.sampled_from(DTYPES))
    g = draw.shape((7, 7), 12)
    x, w = operands(draw("N", 1, 3), draw("C", 1, 80), draw("CO", 1, 70), g, dtype)
    if dtype == torch.float32:
        # Exact in TF32, else a few cancelling products would show only the operands' rounding.
        x, w = x.half().float(), w.half().float()
    y = forward(x, w, g)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, reference(x, w, g))

    grad = torch.randn_like(y).half().to(dtype)
    options = (1, g.padding, g.dilation)
    wide = w.double(), grad.double()
    expected = torch.nn.grad.conv2d_input(list(x.shape), *wide, *options)
    assert_close(input_gradient(grad, x, w, g), expected)


def weight_reference(grad: torch.Tensor, x: torch.Tensor, g: Shape) -> torch.Tensor:
    shape = (grad.size(1), x.size(1), *g.kernel)
    return torch.nn.grad.conv2d_weight(x.double(), shape, grad.double(), 1, g.padding, g.dilation)


@pytest.mark.emulated
@given(data=st.data())
def test_weight_gradient(data: st.DataObject) -> None:
    draw = Draw(data)
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    g = draw.shape((3, 4), 9)
    x = torch.randn(draw("N", 1, 3), draw("C", 1, 140), *g.size).to(dtype)
    grad = torch.randn(x.size(0), draw("CO", 1, 140), *g.call.out_size).to(dtype)
    dw = weight_gradient(grad, x, g)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    assert dw._base is None  # a view could not be modified in place
    assert_close(dw, weight_reference(grad, x, g))


@pytest.mark.parametrize("channels", [64, 128, 264])
def test_weight_gradient_of_every_tile(channels: int, hopper_device: str) -> None:
    g = same((17, 17), 3, 6)
    x = torch.randn(3, channels, 17, 17, device=hopper_device).half()
    grad = torch.randn(3, 136, 17, 17, device=hopper_device).half()
    dw = weight_gradient(grad, x, g)
    assert error(dw, weight_reference(grad, x, g)) <= BOUND[torch.float16]


@pytest.mark.parametrize("out_channels", [24, 21, 1])
@pytest.mark.parametrize("part", ["scale", "shift", "residual", "relu", "all"])
def test_epilogue(out_channels: int, part: str, hopper_device: str) -> None:
    g = same((9, 9), 3, 2)
    x, w = operands(2, 64, out_channels, g, torch.bfloat16, hopper_device)
    y = reference(x, w, g)
    arguments: dict[str, Any] = {}
    if part in ("scale", "all"):
        arguments["scale"] = torch.rand(out_channels, device=hopper_device) + 0.5
        y = y * arguments["scale"].double()[:, None, None]
    if part in ("shift", "all"):
        arguments["shift"] = torch.randn(out_channels, device=hopper_device)
        y = y + arguments["shift"].double()[:, None, None]
    if part in ("residual", "all"):
        arguments["residual"] = torch.randn(y.shape, device=hopper_device).bfloat16()
        y = y + arguments["residual"].double()
    if part in ("relu", "all"):
        arguments["activation"] = "relu"
        y = y.relu()
    assert error(forward(x, w, g, **arguments), y) <= BOUND[torch.bfloat16]


def test_nan_propagation(hopper_device: str) -> None:
    g = same((12, 12), 3, 4)
    x, w = operands(1, 64, 16, g, torch.float16, hopper_device)
    x[0, 5, 6, 6] = float("nan")
    y = forward(x, w, g, activation="relu")
    expected = reference(x, w, g).isnan()
    assert torch.equal(y.isnan(), expected)
    assert expected.any()
    assert not expected.all()


@pytest.mark.parametrize("out_channels", [(24, 24, 24), (21, 5, 32)])
def test_branches_are_concatenated(out_channels: tuple[int, ...], hopper_device: str) -> None:
    shapes = [same((13, 13), 1, 1), same((13, 13), 3, 4), same((13, 13), 3, 9)]
    x, _ = operands(2, 64, 1, shapes[0], torch.float16, hopper_device)
    weights = [
        operands(1, 64, count, g, torch.float16, hopper_device)[1]
        for count, g in zip(out_channels, shapes, strict=True)
    ]
    total = sum(out_channels)
    scale, shift = torch.rand(total, device=hopper_device), torch.randn(total, device=hopper_device)
    y = branches(x, weights, shapes, scale=scale, shift=shift)
    expected = torch.cat([reference(x, w, g) for w, g in zip(weights, shapes, strict=True)], dim=1)
    expected = expected * scale.double()[:, None, None] + shift.double()[:, None, None]
    assert error(y, expected) <= BOUND[torch.float16]


@pytest.mark.parametrize("first", [0, 8, 3])
def test_branches_write_into_a_larger_tensor(first: int, hopper_device: str) -> None:
    shapes = [same((9, 7), 1, 1), same((9, 7), 3, 4)]
    x, w = operands(2, 64, 24, shapes[0], torch.float16, hopper_device)
    weights = [w, operands(2, 64, 24, shapes[1], torch.float16, hopper_device)[1]]
    residual = torch.randn(2, 48, 9, 7, device=hopper_device).half()
    larger = torch.full((2, 128, 9, 7), 7.0, dtype=x.dtype, device=x.device)
    larger = larger.to(memory_format=torch.channels_last)
    into = larger[:, first : first + 48]
    out = branches(x, weights, shapes, into, residual=residual)
    assert out is into
    assert torch.equal(out, branches(x, weights, shapes, residual=residual))
    assert bool((larger[:, :first] == 7).all())
    assert bool((larger[:, first + 48 :] == 7).all())


def test_layouts_and_strided_views(hopper_device: str) -> None:
    g = same((9, 9), 3, 2)
    x, w = operands(2, 72, 24, g, torch.float16, hopper_device)
    expected = forward(x, w, g)
    assert torch.equal(forward(x.contiguous(), w.contiguous(), g), expected)
    wide = torch.cat([x[:, :1], x, x[:, :7]], dim=1)
    assert torch.equal(forward(wide[:, 1:73], w, g), expected)
    # Rows are multiples of 16 bytes, but the address is not.
    memory = x.new_empty(x.numel() + 1)[1:]
    moved = memory.view(2, 9, 9, 72).permute(0, 3, 1, 2).copy_(x)
    assert torch.equal(forward(moved, w, g), expected)


def test_schedules_are_cached_by_shape(hopper_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = cache_tables(monkeypatch, 2)
    g = same((9, 9), 3, 2)
    for batch in (1, 1, 2, 3, 2):
        x, w = operands(batch, 64, 16, g, torch.float16, hopper_device)
        forward(x, w, g)
    assert tables.cache_info() == (2, 3, 2, 2)  # hits, misses


@pytest.mark.emulated
def test_table_of_a_captured_call_outlives_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_tables(monkeypatch, 1)
    g = same((9, 9), 3, 2)
    x, w = operands(3, 64, 16, g, torch.float16)
    expected = forward(x, w, g)
    with emulation.capture():
        for _ in range(2):
            assert torch.equal(forward(x, w, g), expected)
    table = hopper._choose("forward", x, [w], [g.call])
    assert table is not None
    for batch in (2, 1):
        forward(x[:batch], w, g)
    (words,) = hopper._captured.values()
    assert words is table.words


@pytest.mark.emulated
def test_other_streams_keep_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator must know every stream that reads a table but the one that it was made on."""
    cache_tables(monkeypatch, 1)
    g = same((9, 9), 3, 2)
    x, w = operands(2, 64, 16, g, torch.float16)
    table = hopper._choose("forward", x, [w], [g.call])
    assert table is not None
    recorded: list[Any] = []

    class Words:
        record_stream = staticmethod(recorded.append)

    (own,) = table.streams
    made = table._replace(words=Words())
    monkeypatch.setattr(hopper, "_table", lambda *_: made)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    for stream, count in ((own, 0), (own + 1, 1), (own + 1, 1), (own, 1), (own + 2, 2)):
        monkeypatch.setattr(_native, "where", lambda words, stream=stream: (0, stream, 0))
        hopper._choose("forward", x, [w], [g.call])
        assert recorded == [x.device] * count


PROBLEM = Problem(
    8,
    2048,
    256,
    in_size=(65, 65),
    out_size=(65, 65),
    kernel=(3, 3),
    stride=(1, 1),
    padding=(12, 12),
    dilation=(12, 12),
    groups=1,
    dtype=torch.bfloat16,
    device=torch.device("cuda", 0),
)


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hopper GPU (compute capability 9.0) and a build for it."""

    class Module:
        has_sm90a = True

    monkeypatch.setattr(_native, "C", Module)
    monkeypatch.setattr(hopper, "_capability", lambda index: (9, 0))
    return Module


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
        ({"kernel": (9, 1)}, "7 x 7"),
        ({"batch": 2**31}, "2\\^31"),
        ({"batch": 2**24, "out_channels": 1024}, "split the batch"),
        ({"device": torch.device("cpu")}, "CUDA device, got 'cpu'"),
    ],
)
def test_unsupported(change: dict[str, Any], reason: str, mocked: Any) -> None:
    problem = PROBLEM._replace(**change)
    for kind in ("forward", "input_gradient", "weight_gradient"):
        found = hopper.unsupported(kind, problem)
        if (kind, problem.dtype) == ("weight_gradient", torch.float32):
            assert "must be one of torch.float16, torch.bfloat16, got torch.float32" in found
        elif reason:
            assert re.search(reason, found), found
        else:
            assert found == ""


def test_the_input_gradient_has_its_own_number_of_tiles(mocked: Any) -> None:
    wide = PROBLEM._replace(batch=2**12, channels=2**14)
    assert hopper.unsupported("forward", wide) == ""
    assert "split the batch" in hopper.unsupported("input_gradient", wide)


def test_other_devices_are_unsupported(mocked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_capability", lambda _: (8, 0))
    assert "9.0, got 8.0" in hopper.unsupported("forward", PROBLEM)
    mocked.has_sm90a = False
    assert "built without sm_90a" in hopper.unsupported("forward", PROBLEM)


def test_rejects_cpu_tensors() -> None:
    x, w = torch.zeros(1, 8, 5, 5), torch.zeros(8, 8, 3, 3)
    with pytest.raises(ValueError, match=r"backend='sm90'.*must be on a CUDA device, got 'cpu'"):
        segkernels.dilated_conv2d(x, w, backend="sm90")
    with pytest.raises(ValueError, match=r"backend='sm90'.*must be on a CUDA device, got 'cpu'"):
        segkernels.aspp(x, [w, w], (1, 2), backend="sm90")


def test_float32_follows_torchs_tf32_setting() -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            assert hopper.tf32_allowed() == (precision == "tf32")
    finally:
        conv.fp32_precision = before


# For tests of large sizes, streams and graphs.
only_a_gpu = pytest.mark.parametrize(
    "hopper_device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
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
    hopper_device: str,
) -> None:
    g = same(size, 3, dilation)
    x, w = operands(batch, channels, out_channels, g, dtype, hopper_device)
    expected = reference(x, w, g)
    bound = BOUND[dtype]
    if dtype == torch.float32:
        bound = max(bound, 1.05 * error(F.conv2d(x, w, None, 1, g.padding, g.dilation), expected))
    y = forward(x, w, g)
    assert error(y, expected) <= bound
    for _ in range(5):
        assert torch.equal(forward(x, w, g), y)

    grad = torch.randn_like(y)
    dx = input_gradient(grad, x, w, g)
    expected = torch.nn.grad.conv2d_input(
        list(x.shape), w.double(), grad.double(), 1, g.padding, g.dilation
    )
    assert error(dx, expected) <= BOUND[dtype]
    assert torch.equal(input_gradient(grad, x, w, g), dx)

    if dtype != torch.float32:
        dw = weight_gradient(grad, x, g)
        assert error(dw, weight_reference(grad, x, g)) <= BOUND[dtype]
        assert torch.equal(weight_gradient(grad, x, g), dw)


@only_a_gpu
def test_branches_on_hopper(hopper_device: str) -> None:
    shapes = [same((65, 65), 1, 1), *(same((65, 65), 3, d) for d in (12, 24, 36))]
    x, _ = operands(8, 2048, 1, shapes[0], torch.bfloat16, hopper_device)
    weights = [operands(1, 2048, 256, g, torch.bfloat16, hopper_device)[1] for g in shapes]
    y = branches(x, weights, shapes)
    for found, w, g in zip(y.split(256, dim=1), weights, shapes, strict=True):
        assert error(found, reference(x, w, g)) <= BOUND[torch.bfloat16]


@only_a_gpu
def test_streams_and_graphs_on_hopper(hopper_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_tables(monkeypatch, 1)
    g = same((33, 33), 3, 6)
    x, w = operands(2, 512, 128, g, torch.bfloat16, hopper_device)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before"), torch.cuda.graph(graph):
        forward(x, w, g)

    expected = forward(x, w, g)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outs = []
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            outs.append(forward(x, w, g))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(x, w, g)
    # The captured call's table outlives the cache.
    forward(x[:1], w, g)
    torch.empty(2**20, device=hopper_device).fill_(float("nan"))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, forward(x, w, g))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_operator_and_gradients(
    dtype: torch.dtype, hopper_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = note_kernels(monkeypatch)
    g = same((9, 9), 3, 2)
    x, w = operands(2, 24, 16, g, dtype, hopper_device)
    tensors = {
        "input": x,
        "weight": w,
        "bias": torch.randn(16, device=hopper_device).to(dtype),
        "scale": torch.rand(16, device=hopper_device),
        "shift": torch.randn(16, device=hopper_device),
        "residual": torch.randn(2, 16, 9, 9, device=hopper_device).to(dtype),
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
    assert ran == ["forward", "input_gradient", "weight_gradient"]


@pytest.mark.parametrize(
    ("padding", "dilation"), [((2, 1), (2, 1)), ((0, 0), (1, 3)), ((7, 4), (2, 2))]
)
def test_the_transposed_problem_is_the_input_gradient(
    padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    g = Shape((6, 7), (3, 2), dilation, padding)
    x, w = (t.double() for t in operands(2, 3, 4, g, torch.float32))
    out = F.conv2d(x.requires_grad_(), w, None, 1, padding, dilation)
    grad = torch.randn_like(out)
    p = g.call.problem(x, w)
    t = p.transposed()
    assert t.transposed() == p
    (top, left), (rows, columns) = t.padding, t.out_size
    bottom = rows + dilation[0] * 2 - t.in_size[0] - top
    right = columns + dilation[1] - t.in_size[1] - left
    wide = F.pad(grad, (left, right, top, bottom))
    ours = F.conv2d(wide, w.flip(2, 3).transpose(0, 1), None, 1, 0, dilation)
    torch.testing.assert_close(ours, torch.autograd.grad(out, x, grad)[0])


@pytest.mark.emulated
def test_float32_weight_gradient_uses_torch() -> None:
    g = same((9, 9), 3, 2)
    x, w = operands(2, 24, 16, g, torch.float32)
    grad = torch.randn(2, 16, 9, 9)
    dx, dw = gradients(grad, x, w, (True, True), g.call)
    assert torch.equal(dx, input_gradient(grad, x, w, g))
    assert error(dw, weight_reference(grad, x, g)) <= 1e-6
    assert hopper.weight_gradient(grad, x, w, g.call) is None


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_aspp_computes_equal_branches_in_one_launch(
    dtype: torch.dtype, hopper_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    launch = hopper._launch

    def counted(table: Any, x: Any, weights: Any, *args: Any) -> Any:
        launched.append(len(weights))
        return launch(table, x, weights, *args)

    monkeypatch.setattr(hopper, "_launch", counted)
    x = torch.randn(2, 16, 9, 8, device=hopper_device).to(dtype)
    weights = [torch.randn(8, 16, k, k, device=hopper_device).to(dtype) for k in (1, 3, 3, 3)]
    scale, shift = torch.rand(32, device=hopper_device) + 0.5, torch.randn(32, device=hopper_device)
    pooled = torch.randn(2, 5, 1, 1, device=hopper_device).to(dtype)
    rates = (1, 2, 4, 6)
    ours = segkernels.aspp(
        x, weights, rates, scale=scale, shift=shift, pooled=pooled, activation="relu",
        backend="sm90",
    )  # fmt: skip
    assert launched == [1, 3]
    assert ours.is_contiguous()
    exact = aspp_reference.aspp(
        x.double(), [w.double() for w in weights], rates, scale=scale.double(),
        shift=shift.double(), pooled=pooled.double(), activation="relu",
    )  # fmt: skip
    assert error(ours, exact) <= BOUND[dtype]


# --- the choice ---


def gradients(
    grad: torch.Tensor, x: torch.Tensor, w: torch.Tensor, mask: tuple[bool, bool], c: Call
) -> tuple[Any, ...]:
    return operator._gradients(grad, x, w, operator.BackwardArgs(*mask, c))


def note_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that receives the kind of every launch."""
    ran: list[str] = []
    choose = hopper._choose

    def noted(kind: str, *args: Any) -> Any:
        table = choose(kind, *args)
        ran.extend([] if table is None else [kind])
        return table

    monkeypatch.setattr(hopper, "_choose", noted)
    return ran


@pytest.mark.emulated
@pytest.mark.parametrize("chosen", [(), ("forward",), ("input_gradient",), ("weight_gradient",)])
def test_each_kernel_follows_the_rule(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "is_faster", lambda kind, *problems: kind in chosen)
    ran = note_kernels(monkeypatch)
    g = same((9, 9), 3, 2)
    x, w = operands(2, 16, 24, g, torch.float16)
    grad = torch.randn(2, 24, 9, 9).half()
    c = g.call._replace(backend="auto")
    found = [operator.forward(x, w, Epilogue(), c), *gradients(grad, x, w, (True, True), c)]
    assert ran == list(chosen)
    leaves = [t.double().requires_grad_() for t in (x, w)]
    out = F.conv2d(*leaves, None, 1, 2, 2)
    exact = [out, *torch.autograd.grad(out, leaves, grad.double())]
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.stride() == wanted.stride()
        assert error(ours, wanted.detach()) <= BOUND[torch.float16]
    for mask in ((True, False), (False, True), (False, False)):
        for ours, wanted, asked in zip(
            gradients(grad, x, w, mask, c), found[1:], mask, strict=True
        ):
            assert torch.equal(ours, wanted) if asked else ours is None


@pytest.mark.emulated
def test_auto_leaves_contiguous_inputs_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy to channels_last would cost as much as the faster kernel gains."""
    monkeypatch.setattr(cost_model, "is_faster", lambda kind, *problems: True)
    g = same((9, 9), 3, 2)
    x, w = operands(2, 16, 24, g, torch.float16)
    for backend, channels_last, runs in (
        ("auto", True, True), ("auto", False, False), ("sm90", False, True), ("torch", True, False)
    ):  # fmt: skip
        c = g.call._replace(backend=backend, channels_last=channels_last)
        assert (hopper.forward(x, [w], Epilogue(), [c]) is not None) == runs
    with emulation.emulated(False):  # a CPU tensor
        assert hopper.forward(x, [w], Epilogue(), [g.call]) is None


@pytest.mark.emulated
def test_unbatched_input() -> None:
    x, w, r = torch.randn(16, 9, 9), torch.randn(24, 16, 3, 3), torch.randn(24, 7, 7)
    y = segkernels.dilated_conv2d(x.half(), w.half(), residual=r.half(), backend="sm90")
    assert error(y, F.conv2d(x.double(), w.double()) + r) <= 2e-3  # of rounded operands


@pytest.mark.emulated
@pytest.mark.parametrize("backend", ["auto", "sm90"])
def test_torch_computes_an_empty_batch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "is_faster", lambda kind, *problems: True)
    x = torch.ones(0, 9, 5, 5).half().requires_grad_()
    w = torch.ones(3, 9, 3, 3).half().requires_grad_()
    y = segkernels.dilated_conv2d(x, w, padding=1, backend=backend)
    assert y.shape == (0, 3, 5, 5)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w))


@pytest.mark.emulated
def test_first_call_during_capture_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule cannot be copied to the device while a graph is captured."""
    monkeypatch.setattr(cost_model, "is_faster", lambda kind, *problems: True)
    g = same((9, 9), 3, 2)
    x, w = operands(2, 16, 24, g, torch.float16)
    grad = torch.randn(2, 24, 9, 9).half()
    c = g.call._replace(backend="auto")
    with emulation.capture():
        out = operator.forward(x, w, Epilogue(), c)
        into = torch.zeros_like(out)
        assert hopper.forward(x, [w], Epilogue(), [c], into) is None
        found = gradients(grad, x, w, (True, True), c)
        with pytest.raises(RuntimeError, match="Call it once before capturing"):
            operator.forward(x, w, Epilogue(), g.call)
    assert torch.equal(out, cudnn.forward(x, w, Epilogue(), c))
    assert bool((into == 0).all())
    for a, b in zip(found, cudnn.gradients(grad, x, w, c, (True, True)), strict=True):
        assert b is not None
        assert torch.equal(a, b)


# batch, channels, out channels, size, dilation
ON_GPU = [
    (8, 2048, 256, 65, 6),
    (8, 2048, 256, 65, 12),
    (8, 2048, 256, 65, 36),
    (8, 2048, 256, 33, 18),
    (8, 512, 1024, 41, 12),
    (8, 512, 512, 65, 4),
    (8, 2048, 21, 65, 24),
    (8, 21, 21, 64, 8),
    (1, 2048, 256, 65, 12),
    (3, 37, 53, 23, 5),
]


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_gpu_agrees_with_float64_and_is_deterministic(
    case: Any, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    batch, channels, out_channels, size, d = case
    layout = {"memory_format": torch.channels_last}
    x = torch.randn(batch, channels, size, size, device="cuda").to(dtype).contiguous(**layout)
    w = torch.randn(out_channels, channels, 3, 3, device="cuda") / (3 * channels**0.5)
    w = w.to(dtype).contiguous(**layout)
    scale, shift = torch.rand(out_channels, device="cuda"), torch.randn(out_channels, device="cuda")
    grad = torch.randn(batch, out_channels, size, size, device="cuda").to(dtype)
    exact = F.conv2d(x.double(), w.double(), None, 1, d, d)
    fused = F.relu(exact * scale.double()[:, None, None] + shift.double()[:, None, None])
    wide = [t.double().requires_grad_() for t in (x, w)]
    gradients = torch.autograd.grad(F.conv2d(*wide, None, 1, d, d), wide, grad.double())
    limit = BOUND[dtype]
    if dtype == torch.float32:
        # cuDNN may use TF32.
        limit = max(1e-3, 1.1 * error(F.conv2d(x, w, None, 1, d, d), exact))
    results = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        args = (*leaves, None, 1, d, d)
        out = segkernels.dilated_conv2d(*args, backend=backend)
        relu = segkernels.dilated_conv2d(
            x, w, None, 1, d, d, scale=scale, shift=shift, activation="relu", backend=backend
        )
        results.append((out, relu, *torch.autograd.grad(out, leaves, grad)))
    for ours, wanted in zip(results[0], (exact, fused, *gradients), strict=True):
        assert error(ours, wanted) <= limit
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
