"""aspp: the shared suite for both forms, torch's layers, layouts, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops import suite
from ops.suite import CONVOLUTION_ERROR, Error, Float, Sample, message, relative_error

import segkernels
from segkernels.ops.aspp import reference

pytestmark = pytest.mark.usefixtures("exact_cudnn")


def flat(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """`aspp` of two branches, with the weights as separate arguments for the suite."""
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


class TestAspp(suite.ConvolutionSuite):
    function = staticmethod(flat)
    reference = staticmethod(flat_reference)
    double_backward = True
    batched = "pooled"
    undilated = ("v2", "v2, scaled")  # in their first branches
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

    def assert_close(self, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
        # Both are rounded when CUDA is compared with the CPU.
        rounded = 2 if ours.dtype == expected.dtype == dtype else 1
        assert relative_error(ours, expected) <= rounded * CONVOLUTION_ERROR[dtype]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_torch_layers(layout: torch.memory_format) -> None:
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


def test_autocast() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(2, 8, 7, 9), [torch.randn(4, 8, 3, 3) for _ in range(2)]
    scale, pooled = torch.rand(8) + 0.5, torch.randn(2, 3, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = segkernels.aspp(x, weights, (2, 5), scale=scale, pooled=pooled)
    assert out.dtype == torch.bfloat16
    assert (
        relative_error(out, reference.aspp(x, weights, (2, 5), scale=scale, pooled=pooled)) < 6e-3
    )


def test_meta_device() -> None:
    with torch.device("meta"):
        x, weights = torch.zeros(2, 8, 7, 9), [torch.zeros(4, 8, 3, 3) for _ in range(2)]
        assert segkernels.aspp(x, weights, (2, 5)).shape == (2, 8, 7, 9)


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["v3", "v2"])
@pytest.mark.parametrize("backend", ["sm90", "auto"])
def test_gpu_agrees_with_float64_and_is_deterministic(
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
    assert relative_error(found[0][:1], exact) <= CONVOLUTION_ERROR[dtype]
    assert all(torch.equal(found[0], again) for again in found[1:])
