"""dilated_conv2d's Triton kernels in Triton's interpreter; test_dilated_conv2d_triton.py runs this.

Triton reads TRITON_INTERPRET when it is imported, so these tests need a process of their own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import segkernels
from segkernels.ops.dilated_conv2d import launch, plan, reference, triton_path, tuning
from segkernels.ops.dilated_conv2d.call import Epilogue
from segkernels.ops.dilated_conv2d.geometry import Geometry

assert os.environ["TRITON_INTERPRET"] == "1"
torch.set_num_threads(1)

# The interpreter cuts bfloat16 off where a GPU rounds.
ACCURACY = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-6}
NAMES = ("bias", "scale", "shift", "residual")


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    assert ours.shape == exact.shape
    ours, exact = ours.detach().double(), exact.detach().double()
    size = exact.norm()
    return float((ours - exact).norm() / size) if size else float(ours.norm())


def check(
    x: torch.Tensor,
    w: torch.Tensor,
    padding: Any,
    dilation: Any,
    given: set[str],
    relu: bool,
) -> None:
    """Forward and all gradients of the public function against float64."""
    dtype = x.dtype
    shape = F.conv2d(x.double(), w.double(), None, 1, padding, dilation).shape
    made = {"x": x, "w": w}
    for name in NAMES:
        if name in given:
            size = shape if name == "residual" else shape[1:2]
            wide = name in ("scale", "shift") and dtype != torch.float32
            made[name] = torch.randn(size).to(torch.float32 if wide else dtype)
    ours = {name: t.clone().requires_grad_() for name, t in made.items()}
    exact = {name: t.double().requires_grad_() for name, t in made.items()}

    def run(t: dict[str, torch.Tensor], function: Any, **options: Any) -> torch.Tensor:
        t = dict(t)
        args = (t.pop("x"), t.pop("w"), t.pop("bias", None), 1, padding, dilation)
        return function(*args, **t, **options)

    act = "relu" if relu else None
    out = run(ours, segkernels.dilated_conv2d, activation=act, backend="triton")
    wanted = run(exact, reference.dilated_conv2d)
    # A bound on the whole of a tensor: few elements may all be rounded far.
    few = 2 if out.numel() < 100 else 1
    assert distance(out, F.relu(wanted) if relu else wanted) <= few * ACCURACY[dtype]
    grad = torch.randn(shape).to(dtype)
    mine = torch.autograd.grad(out, list(ours.values()), grad)
    masked = grad.double() * (out > 0) if relu else grad.double()
    theirs = torch.autograd.grad(wanted, list(exact.values()), masked)
    for name, a, b in zip(ours, mine, theirs, strict=True):
        # Sums over planes may cancel; torch does those, and the other tests hold them.
        loose = 10 if name in ("bias", "scale", "shift") else 1.5 if a.numel() >= 100 else 2
        assert distance(a, b) <= loose * ACCURACY[dtype], name


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilation = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    padding = draw(st.tuples(st.integers(0, 12), st.integers(0, 12)))
    least = [max(1, 1 + dilation[i] * (kernel[i] - 1) - 2 * padding[i]) for i in (0, 1)]
    channels = st.sampled_from([1, 3, 8, 16, 21, 24, 40, 72])
    return {
        "x": (
            draw(st.integers(1, 3)),
            draw(channels),
            *(size + draw(st.integers(0, 9)) for size in least),
        ),
        "w": (draw(channels), *kernel),
        "padding": padding,
        "dilation": dilation,
        "given": draw(st.sets(st.sampled_from(NAMES))),
        "relu": draw(st.booleans()),
        "dtype": draw(st.sampled_from(list(ACCURACY))),
    }


@settings(max_examples=14, deadline=None, derandomize=True, print_blob=False)
@given(p=problems())
@pytest.mark.nightly
def test_any_convolution_and_its_gradients_against_float64(p: dict[str, Any]) -> None:
    out_channels, *kernel = p["w"]
    x = torch.randn(p["x"]).to(p["dtype"])
    w = torch.randn(out_channels, x.size(1), *kernel).to(p["dtype"])
    check(x, w, p["padding"], p["dilation"], p["given"], p["relu"])


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [
        # One of each at every run.
        pytest.param(c, d, id=f"{name}-{d}", marks=[] if d == quick else [pytest.mark.nightly])
        for c, name, quick in (
            (40, "descriptors", torch.bfloat16),
            (21, "pointers", torch.float32),
        )
        for d in ACCURACY
    ],
)
def test_long_loops_are_cut(
    channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_CUT_COST", 0)  # or so short a loop is not worth it
    plan.cut.cache_clear()
    x, w = torch.randn(2, channels * 4, 6, 7).to(dtype), torch.randn(48, channels * 4, 3, 3)
    g = Geometry(6, 7, 6, 7, (3, 3), (2, 2), (2, 2))
    key = tuning.Key("forward", 2, channels * 4, 48, g, dtype)
    config = tuning.config(key, x.device, 4)._replace(step=16)
    tiles, _ = plan.cut(2, channels * 4, 48, (g,), config, 4)
    assert tiles.parts > 1
    w = w.to(dtype)
    e = Epilogue(scale=torch.rand(48), residual=torch.randn(2, 48, 6, 7).to(dtype))
    ours = triton_path.forward(x, w, g, e, config)
    exact = F.conv2d(x.double(), w.double(), None, 1, 2, 2) * e.scale.double()[:, None, None]
    assert distance(ours, exact + e.residual.double()) <= ACCURACY[dtype]
    assert torch.equal(ours, triton_path.forward(x, w, g, e, config))
    grad = torch.randn(2, 48, 6, 7).to(dtype)
    small = plan.Config((1, 2, 8), 32, 32, 4, 3)
    dw = triton_path.weight_gradient(grad, x, g, small)
    wide = w.double().requires_grad_()
    wanted = F.conv2d(x.double(), wide, None, 1, 2, 2)
    assert distance(dw, torch.autograd.grad(wanted, wide, grad.double())[0]) <= ACCURACY[dtype]
    plan.cut.cache_clear()


@pytest.mark.parametrize("branches", [1, pytest.param(3, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "channels",
    [96, pytest.param(90, marks=pytest.mark.nightly)],
    ids=["descriptors", "pointers"],
)
def test_whole_tiles_beside_cut_ones(
    channels: int, branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_CUT_COST", 0)
    plan.cut.cache_clear()
    x = torch.randn(1, channels, 11, 19)
    rates = [(2, 2), (3, 5), (4, 4)][:branches]
    weights = [torch.randn(16, channels, 3, 3) for _ in rates]
    geometries = [Geometry(11, 19, 11, 19, (3, 3), r, r) for r in rates]
    config = plan.Config((1, 4, 8), 16, 16, 4, 3)
    tiles, _ = plan.cut(1, channels, 16, tuple(geometries), config, 4)
    plan.cut.cache_clear()
    rest = tiles.of_a_branch * branches - tiles.whole
    assert tiles.whole > 0
    assert tiles.parts > 1
    assert rest > 0
    ours = triton_path.branches(x, weights, geometries, Epilogue(), config)
    exact = [
        F.conv2d(x.double(), w.double(), None, 1, r, r) for w, r in zip(weights, rates, strict=True)
    ]
    assert distance(ours, torch.cat(exact, 1)) <= 1e-6


def test_vectors_may_be_strided() -> None:
    x, w = torch.randn(1, 8, 6, 7), torch.randn(16, 8, 3, 3)
    bias, scale, shift = torch.randn(32)[::2], torch.rand(16, 3)[:, 1], torch.tensor(2.0).expand(16)
    exact = F.conv2d(x.double(), w.double(), bias.double(), 1, 1) * scale.double()[:, None, None]
    exact += shift.double()[:, None, None]
    g = Geometry(6, 7, 6, 7, (3, 3), (1, 1), (1, 1))
    e = Epilogue(bias, scale, shift)
    assert distance(triton_path.forward(x, w, g, e), exact) <= 1e-6
    y = F.conv2d(x, w, None, 1, 1)
    assert distance(triton_path.epilogue_(y, e), exact) <= 1e-6


def test_sixty_four_bits_where_the_memory_is_large() -> None:
    picture = torch.empty(50_000, 50_000, 64, device="meta")
    one = picture.permute(2, 0, 1).unsqueeze(0)
    assert one.stride(0) < 2**31
    assert launch.wide(one)
    assert not launch.wide(one[:, :, :100, :100])


def test_tiles_of_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_CUT_COST", 0)
    plan.cut.cache_clear()
    x, w = torch.randn(1, 64, 3, 6), torch.randn(16, 64, 3, 3)
    g = Geometry(3, 6, 3, 6, (3, 3), (1, 1), (1, 1))
    config = plan.Config((1, 2, 8), 16, 16, 4, 3)
    assert plan.cut(1, 64, 16, (g,), config, 4)[0].parts > 1
    ours = triton_path.forward(x, w, g, Epilogue(), config)
    plan.cut.cache_clear()
    assert distance(ours, F.conv2d(x.double(), w.double(), None, 1, 1)) <= 1e-6


def test_weight_gradients_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MULTIPROCESSORS_INTERPRETED", 400)
    x, grad = torch.randn(2, 24, 17, 18), torch.randn(2, 40, 17, 18)
    g = Geometry(17, 18, 17, 18, (3, 3), (5, 4), (5, 4))
    w = torch.zeros(40, 24, 3, 3, dtype=torch.float64, requires_grad=True)
    exact = torch.autograd.grad(F.conv2d(x.double(), w, None, 1, (5, 4), (5, 4)), w, grad.double())
    assert distance(triton_path.weight_gradient(grad, x, g), exact[0]) <= 1e-6


@pytest.mark.parametrize(
    "box",
    [
        (8, 4, 4),
        *(
            pytest.param(box, marks=pytest.mark.nightly)
            for box in ((4, 4, 8), (1, 8, 16), (2, 16, 4), (1, 32, 4))
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [16, 5], ids=["descriptors", "pointers"])
def test_boxes(box: Any, channels: int) -> None:
    config = plan.Config(box, 32, 16, 4, 3)
    x, w = torch.randn(5, channels, 11, 10), torch.randn(24, channels, 3, 2)
    g = Geometry(11, 10, 11, 11, (3, 2), (6, 3), (6, 5))
    ours = triton_path.forward(x, w, g, Epilogue(), config)
    assert distance(ours, F.conv2d(x.double(), w.double(), None, 1, (6, 3), (6, 5))) <= 1e-6


@pytest.mark.parametrize("parts", [1, 3])
def test_a_residual_is_added_in_slices(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_CUT_COST", 0 if parts > 1 else 1e9)
    plan.cut.cache_clear()
    x, w = torch.randn(1, 32, 5, 6), torch.randn(200, 32, 3, 3)
    residual, bias = torch.randn(1, 200, 5, 6), torch.randn(200)
    g = Geometry(5, 6, 5, 6, (3, 3), (1, 1), (1, 1))
    config = plan.Config((1, 4, 8), 256, 16, 4, 3)
    assert (plan.cut(1, 32, 200, (g,), config, 4)[0].parts > 1) == (parts > 1)
    e = Epilogue(bias=bias, residual=residual, activation="relu")
    exact = F.conv2d(x.double(), w.double(), bias.double(), 1, 1) + residual.double()
    assert distance(triton_path.forward(x, w, g, e, config), F.relu(exact)) <= 1e-6
    plan.cut.cache_clear()


@pytest.mark.parametrize(
    "channels",
    [24, pytest.param(21, marks=pytest.mark.nightly)],
    ids=["descriptors", "pointers"],
)
def test_branches_in_one_launch(channels: int) -> None:
    x = torch.randn(2, channels, 13, 12)
    rates = (2, (5, 4), 12)
    weights = [torch.randn(16, channels, 3, 3) for _ in rates]
    pairs = [r if isinstance(r, tuple) else (r, r) for r in rates]
    geometries = [Geometry(13, 12, 13, 12, (3, 3), r, r) for r in pairs]
    scale, shift = torch.randn(48), torch.randn(48)
    e = Epilogue(scale=scale, shift=shift, activation="relu")
    exact = torch.cat(
        [
            F.conv2d(x.double(), w.double(), None, 1, r, r)
            for w, r in zip(weights, pairs, strict=True)
        ],
        1,
    )
    exact = F.relu(exact * scale.double()[:, None, None] + shift.double()[:, None, None])
    assert distance(triton_path.branches(x, weights, geometries, e), exact) <= 1e-6
    larger = torch.full((2, 60, 13, 12), 7.0).contiguous(memory_format=torch.channels_last)
    triton_path.branches(x, weights, geometries, e, into=larger[:, 4:52])
    assert distance(larger[:, 4:52], exact) <= 1e-6
    assert bool((larger[:, :4] == 7).all() and (larger[:, 52:] == 7).all())


def test_aspp_is_one_launch_of_its_dilated_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    run = triton_path.branches

    def counted(x: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(len(weights))
        return run(x, weights, *args, **kwargs)

    monkeypatch.setattr(triton_path, "branches", counted)
    x = torch.randn(1, 16, 9, 8).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(8, 16, 1, 1), *(torch.randn(8, 16, 3, 3) for _ in range(3))]
    scale, shift = torch.rand(32), torch.randn(32)
    found = [
        segkernels.aspp(
            x, weights, (1, 2, 4, 6), scale=scale, shift=shift, activation="relu", backend=backend
        )
        for backend in ("triton", "torch")
    ]
    assert launched == [1, 3]
    assert distance(*found) <= 1e-6


@pytest.mark.parametrize("channels", [24, 21], ids=["descriptors", "pointers"])
def test_padding_is_not_multiplied(channels: int) -> None:
    """Taps that no output of a box needs are not read: their weights may be NaN."""
    x, w = torch.randn(1, channels, 5, 6), torch.randn(16, channels, 3, 3)
    exact = F.conv2d(x, w, None, 1, 8, 8)
    for i in range(3):
        for j in range(3):
            if (i, j) != (1, 1):
                w[:, :, i, j] = float("nan")
    ours = segkernels.dilated_conv2d(x, w, padding=8, dilation=8, backend="triton")
    torch.testing.assert_close(ours, exact)


def test_nothing_of_the_next_tap_is_read() -> None:
    """Channels beyond the last, in a step that overhangs it, count for nothing, NaN or not."""
    for channels in (24, 21):
        x, w = torch.randn(1, channels, 4, 4), torch.randn(16, channels, 1, 2)
        x[0, :, :, 3] = float("nan")
        w[:, :, 0, 1] = float("nan")
        # Padding 0: output column 2 reads column 3, so only the first two columns are compared.
        ours = segkernels.dilated_conv2d(x, w[:, :, :, :1], backend="triton")
        exact = F.conv2d(x, w[:, :, :, :1])
        torch.testing.assert_close(ours, exact, equal_nan=True)


def test_nan_passes_relu() -> None:
    x = torch.randn(1, 8, 4, 4)
    x[0, 3, 1, 2] = float("nan")
    w = torch.randn(16, 8, 3, 3)
    ours = segkernels.dilated_conv2d(x, w, padding=1, activation="relu", backend="triton")
    assert torch.equal(ours.isnan(), F.conv2d(x, w, padding=1).isnan())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (1, 33, 2, 2), (3, 16, 1, 1)], ids=str)
def test_epilogue_behind_another_convolution(shape: Any, layout: Any) -> None:
    y = torch.randn(shape).contiguous(memory_format=layout)
    bias, scale, shift = (torch.randn(shape[1]) for _ in range(3))
    residual = torch.randn(shape)
    wanted = (y + bias[:, None, None]) * scale[:, None, None] + shift[:, None, None]
    wanted = F.relu(wanted + residual)
    ours = triton_path.epilogue_(y, Epilogue(bias, scale, shift, residual, "relu"))
    assert ours is y
    torch.testing.assert_close(ours, wanted)


def test_second_derivatives() -> None:
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    w = torch.randn(8, 8, 3, 3, requires_grad=True)
    found = []
    for options in ({"backend": "triton"}, {"backend": "torch"}):
        out = segkernels.dilated_conv2d(x, w, padding=2, dilation=2, **options)
        dx, dw = torch.autograd.grad(out.sin().sum(), (x, w), create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, w)))
    for a, b in zip(*found, strict=True):
        assert distance(a, b) <= 1e-5


def test_layouts_and_empty_batches() -> None:
    w = torch.randn(8, 8, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 6, 5).contiguous(memory_format=layout)
        ours = segkernels.dilated_conv2d(x, w, padding=1, backend="triton")
        assert ours.stride() == F.conv2d(x, w, padding=1).stride()
    empty = x[:0].clone().requires_grad_()
    weight = w.clone().requires_grad_()
    out = segkernels.dilated_conv2d(empty, weight, padding=1, backend="triton")
    dx, dw = torch.autograd.grad(out.sum(), (empty, weight))
    assert out.shape == (0, 8, 6, 5)
    assert dx.shape == empty.shape
    assert bool((dw == 0).all())


def test_what_the_kernels_do_not_take_raises() -> None:
    x, w = torch.randn(1, 4, 9, 9), torch.randn(4, 2, 3, 3)
    for args, why in (
        (((x, w), {"groups": 2}), "groups must be 1"),
        (((x[:, :2], w), {"stride": 2}), "stride must be 1"),
        (((x[:, :2].double(), w.double()), {}), "it has no torch.float64"),
        (((x[:, :2], torch.randn(4, 2, 8, 1)), {}), "7 x 7"),
    ):
        with pytest.raises(ValueError, match=f"backend='triton' cannot.*{why}"):
            segkernels.dilated_conv2d(*args[0], **args[1], backend="triton")
