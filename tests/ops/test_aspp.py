"""aspp: the shared suite on both forms, layers of torch, layouts, autocast."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops import suite
from ops.suite import Error, Float, Sample, message
from torch._inductor import config

import segkernels
from segkernels.ops.aspp import reference
from segkernels.ops.dilated_conv2d import native as sm90

pytestmark = pytest.mark.usefixtures("exact_cudnn")

# ||ours - exact|| / ||exact||.
ACCURACY = {
    torch.float16: 6e-4,
    torch.bfloat16: 4e-3,
    torch.float32: 2e-6,
    torch.float64: 1e-13,
}


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the whole tensors, relative."""
    assert ours.shape == exact.shape
    ours, exact = ours.detach().double(), exact.detach().double()
    off, size = (ours - exact).norm(), exact.norm()
    return float(off / size) if size else float(off)


def flat(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """`aspp` of two branches, whose weights the suite can see."""
    return segkernels.aspp(x, [first, second], **kwargs)


def flat_reference(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    return reference.aspp(x, [first, second], **kwargs)


def call(weights: Any = None, rates: Any = (1, 2), **kw: Any) -> Any:
    def of(device: str) -> Any:
        x = torch.zeros(2, 3, 5, 5, device=device)
        given = [torch.zeros(4, 3, 3, 3)] * 2 if weights is None else weights
        moved = [w.to(device) if isinstance(w, torch.Tensor) else w for w in given]
        return segkernels.aspp(x, moved, rates, **kw)

    return of


class TestAspp(suite.OpSuite):
    function = staticmethod(flat)
    reference = staticmethod(flat_reference)
    double_backward = True
    samples = [
        Sample(
            "v3",
            (Float(2, 2, 3, 4), Float(2, 2, 1, 1), Float(1, 2, 3, 3)),
            {
                "rates": (1, 2),
                "scale": Float(3),
                "shift": Float(3),
                "pooled": Float(2, 1, 1, 1),
                "activation": "relu",
            },
            grad=True,
            compile=True,
        ),
        Sample(
            "v2",
            (Float(1, 2, 3, 4), Float(2, 2, 3, 3), Float(2, 2, 3, 3)),
            {"rates": (1, 2), "shift": Float(2), "form": "v2"},
            grad=True,
            compile=True,
        ),
        Sample(
            "v2, scaled",
            (Float(1, 2, 3, 3), Float(2, 2, 1, 3), Float(2, 2, 3, 1)),
            {"rates": (1, 2), "scale": Float(2), "activation": "relu", "form": "v2"},
            grad=True,
        ),
        Sample(
            "far",
            (Float(1, 3, 6, 5), Float(2, 3, 3, 3), Float(3, 3, 3, 3)),
            {"rates": (6, 24)},
        ),
        Sample(
            "21 channels",
            (Float(1, 21, 9, 9), Float(21, 21, 3, 3), Float(5, 21, 1, 3)),
            {"rates": (6, 12), "pooled": Float(1, 2, 1, 1)},
        ),
    ]
    errors = [
        Error("form", call(form="v4"), ValueError, "form must be one of 'v2', 'v3', got 'v4'"),
        Error("activation", call(activation="gelu"), ValueError, "activation.*'gelu'"),
        Error("backend", call(backend="cudnn"), ValueError, "backend.*'cudnn'"),
        Error("none", call([], []), ValueError, "at least 1, got 0 and 0"),
        Error("rates", call(rates=(1,)), ValueError, "same length.*got 2 and 1"),
        Error("rate", call(rates=(1, 0)), ValueError, message("at least 1, got rates[1] = 0")),
        Error("rate type", call(rates=(1, 2.0)), TypeError, message("'rates[1]' must be int")),
        Error("weight type", call([None, None]), TypeError, message("'weights[0]' must be Tensor")),
        Error(
            "channels",
            call([torch.zeros(4, 2, 3, 3)] * 2),
            ValueError,
            message("weights[0] must be [C_out, 3, kh, kw]", "got [4, 2, 3, 3]"),
        ),
        Error(
            "even",
            call([torch.zeros(4, 3, 2, 3)] * 2),
            ValueError,
            message("weights[0] must have odd kernel sizes, got [4, 3, 2, 3]"),
        ),
        Error(
            "sum",
            call([torch.zeros(4, 3, 3, 3), torch.zeros(5, 3, 3, 3)], form="v2"),
            ValueError,
            message("weights[1] must have as many output channels", "got [5, 3, 3, 3]"),
        ),
        Error(
            "dtype",
            call([torch.zeros(4, 3, 3, 3).double()] * 2),
            ValueError,
            message("weights[0] must be torch.float32, got torch.float64"),
        ),
        Error(
            "scale",
            call(scale=torch.zeros(4)),
            ValueError,
            message("scale must have shape [8], got [4]"),
        ),
        Error(
            "shift device",
            call(shift=torch.zeros(8, device="meta")),
            ValueError,
            "shift must be on.*meta",
        ),
        Error(
            "pooled",
            call(pooled=torch.zeros(2, 4)),
            ValueError,
            message("pooled must be [2, C, 1, 1], got [2, 4]"),
        ),
        Error(
            "pooled in the sum",
            call(pooled=torch.zeros(2, 4, 1, 1), form="v2"),
            ValueError,
            "pooled must be None for form='v2'",
        ),
        Error(
            "input",
            lambda device: segkernels.aspp(
                torch.zeros(3, 5, 5, device=device), [torch.zeros(4, 3, 3, 3, device=device)], [1]
            ),
            ValueError,
            message("input must be [N, C, H, W]", "got [3, 5, 5]"),
        ),
        Error(
            "integers",
            lambda device: segkernels.aspp(
                torch.zeros(1, 3, 5, 5, dtype=torch.int32, device=device),
                [torch.zeros(4, 3, 3, 3, device=device)],
                [1],
            ),
            ValueError,
            "input must be one of float16.*got torch.int32",
        ),
    ]

    # torch's convolution sums in an order that depends on the layout and the threads, and inductor
    # compiles what the backward does around it in its own way.

    @classmethod
    def devices(cls, check: str) -> list[Any]:
        return suite.DEVICES[:2]  # emulated it would be torch again

    def assert_close(self, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
        # Both may be rounded: CUDA's beside the CPU's.
        rounded = 2 if ours.dtype == expected.dtype == dtype else 1
        assert distance(ours, expected) <= rounded * ACCURACY[dtype]

    def assert_same_layouts(
        self, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
    ) -> None:
        assert distance(ours, expected) <= ACCURACY[dtype]

    def assert_same_again(
        self, again: tuple[torch.Tensor, ...], first: tuple[torch.Tensor, ...], dtype: torch.dtype
    ) -> None:
        if first[0].is_cuda:
            return super().assert_same_again(again, first, dtype)
        for a, b in zip(again, first, strict=True):
            assert distance(a, b) <= ACCURACY[dtype]

    def _compare_compiled(self, compiled: Any, sample: Sample, device: str) -> None:
        found = []
        for function in (compiled, flat):
            built = suite.build(sample, torch.float32, device, grad=sample.grad)
            found.append((*built.of(function), *suite.gradients(built, function)))
        for mine, theirs in zip(*found, strict=True):
            assert mine.stride() == theirs.stride()
            assert distance(mine, theirs) <= ACCURACY[torch.float32]

    @pytest.mark.compiles
    def test_compile_with_inductor(self, device: str) -> None:
        # Inductor takes a program's name alone, while CXX may say "ccache g++".
        with config.patch({"cpp.cxx": (None, os.environ.get("CXX", "g++").split()[-1])}):
            super().test_compile_with_inductor(device)

    # Without the weights, which the suite's would empty or fill too: padding is not multiplied, so
    # a NaN of a weight stays inside the picture.

    def test_empty_batch(self, sample: Sample, device: str) -> None:
        found = []
        for function in (flat, flat_reference):
            built = suite.build(sample, torch.float32, device, grad=True)
            inputs = [built.args[0], built.kwargs.get("pooled")]
            empty = {id(t): t.detach()[:0].requires_grad_() for t in inputs if t is not None}
            built.args = tuple(empty.get(id(a), a) for a in built.args)
            built.kwargs = {name: empty.get(id(a), a) for name, a in built.kwargs.items()}
            built.floats = [empty.get(id(a), a) for a in built.floats]
            found.append([*built.of(function), *suite.gradients(built, function)])
        for mine, expected in zip(*found, strict=True):
            assert torch.equal(mine, expected)

    def test_nan_goes_where_it_must(self, sample: Sample, device: str) -> None:
        built = suite.build(sample, torch.float32, device)
        undilated = sample.id in ("v2", "v2, scaled")  # their first branches
        for x in (built.args[0], built.kwargs.get("pooled")):
            for place in (0, x.numel() // 2, x.numel() - 1) if x is not None else ():
                before = x.view(-1)[place].item()
                x.view(-1)[place] = float("nan")
                ours, expected = built.of(flat)[0], built.of(flat_reference)[0]
                suite.assert_nan_as_expected(ours, expected, device == "cuda" and undilated)
                x.view(-1)[place] = before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_torchs_layers(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 13, 11).to(memory_format=layout)
    weights = [torch.randn(6, 8, 1, 1), *(torch.randn(6, 8, 3, 3) for _ in range(3))]
    rates = (1, 2, 4, 30)
    pads = [rate * (w.size(2) // 2) for w, rate in zip(weights, rates, strict=True)]
    convs = [F.conv2d(x, w, None, 1, p, r) for w, p, r in zip(weights, pads, rates, strict=True)]
    pooled = torch.randn(2, 5, 1, 1)
    out = segkernels.aspp(x, weights, rates, pooled=pooled, activation="relu")
    expected = torch.cat([*convs, pooled.expand(-1, -1, 13, 11)], dim=1).relu()
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=layout)
    out = segkernels.aspp(x, weights[1:], rates[1:], shift=torch.arange(6.0), form="v2")
    expected = convs[1] + convs[2] + convs[3] + torch.arange(6.0)[:, None, None]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert out.is_contiguous(memory_format=layout)


@given(data=st.data())
def test_any_branches(data: Any) -> None:
    size = st.integers(1, 9)
    n, c, h, w = (data.draw(size) for _ in range(4))
    summed = data.draw(st.booleans())
    out_channels = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    if summed:
        out_channels = [out_channels[0]] * len(out_channels)
    kernels = [data.draw(st.sampled_from([(1, 1), (3, 3), (5, 3)])) for _ in out_channels]
    rates = [data.draw(st.integers(1, 12)) for _ in out_channels]
    torch.manual_seed(0)
    weights = [
        torch.randn(co, c, *k, dtype=torch.float64)
        for co, k in zip(out_channels, kernels, strict=True)
    ]
    channels = out_channels[0] if summed else sum(out_channels)
    vectors = {
        name: torch.randn(channels, dtype=torch.float64) if data.draw(st.booleans()) else None
        for name in ("scale", "shift")
    }
    has_pooled = not summed and data.draw(st.booleans())
    pooled = torch.randn(n, 3, 1, 1, dtype=torch.float64) if has_pooled else None
    x = torch.randn(n, c, h, w, dtype=torch.float64)
    kwargs = {
        **vectors,
        "pooled": pooled,
        "activation": data.draw(st.sampled_from([None, "relu"])),
        "form": "v2" if summed else "v3",
    }
    ours = segkernels.aspp(x, weights, rates, **kwargs)
    exact = reference.aspp(x, weights, rates, **kwargs)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12 * (1 + exact.abs().max().item()))


def test_autocast_casts_as_for_a_convolution() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 8, 7, 9), [torch.randn(4, 8, 3, 3) for _ in range(2)]
    scale, pooled = torch.rand(8) + 0.5, torch.randn(2, 3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = segkernels.aspp(x, weights, (2, 5), scale=scale, pooled=pooled)
    assert out.dtype == torch.bfloat16
    assert distance(out, reference.aspp(x, weights, (2, 5), scale=scale, pooled=pooled)) < 6e-3


def test_the_meta_device_gives_shapes() -> None:
    with torch.device("meta"):
        x, weights = torch.zeros(2, 8, 7, 9), [torch.zeros(4, 8, 3, 3) for _ in range(2)]
        assert segkernels.aspp(x, weights, (2, 5)).shape == (2, 8, 7, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dilated_branches_are_one_launch_on_hopper(
    dtype: torch.dtype, hopper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    run = sm90.forward_branches

    def counted(x: Any, weights: Any, *args: Any) -> Any:
        launched.append(len(weights))
        return run(x, weights, *args)

    monkeypatch.setattr(sm90, "forward_branches", counted)
    x = torch.randn(2, 16, 9, 8, device=hopper).to(dtype)
    weights = [torch.randn(8, 16, k, k, device=hopper).to(dtype) for k in (1, 3, 3, 3)]
    scale, shift = torch.rand(32, device=hopper) + 0.5, torch.randn(32, device=hopper)
    pooled = torch.randn(2, 5, 1, 1, device=hopper).to(dtype)
    rates = (1, 2, 4, 6)
    ours = segkernels.aspp(
        x, weights, rates, scale=scale, shift=shift, pooled=pooled, activation="relu",
        backend="sm90",
    )  # fmt: skip
    assert launched == [1, 3]
    assert ours.is_contiguous()
    exact = reference.aspp(
        x.double(), [w.double() for w in weights], rates, scale=scale.double(),
        shift=shift.double(), pooled=pooled.double(), activation="relu",
    )  # fmt: skip
    assert distance(ours, exact) <= ACCURACY[dtype]


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["v3", "v2"])
@pytest.mark.parametrize("backend", ["sm90", "auto"])
def test_on_a_gpu_against_float64_and_the_same_bits(
    backend: str, form: str, dtype: torch.dtype
) -> None:
    if backend == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
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
    assert distance(found[0][:1], exact) <= ACCURACY[dtype]
    assert all(torch.equal(found[0], again) for again in found[1:])
