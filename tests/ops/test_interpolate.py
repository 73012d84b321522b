"""interpolate: the shared suite, torch's results, transposed resampling, layouts and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulation import emulated
from hypothesis import given
from hypothesis import strategies as st
from ops import suite
from ops.suite import Error, Float, Sample

import segkernels
from segkernels import _native
from segkernels.ops import _dtypes
from segkernels.ops.interpolate import _resampling_for, native, reference
from segkernels.ops.interpolate._resampling import Resampling

MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")


def sample(id: str, *shape: int, grad: bool = True, compile: bool = False, **kwargs: Any) -> Sample:
    return Sample(id, (Float(*shape),), kwargs, grad=grad, compile=compile)


class TestInterpolate(suite.OpSuite):
    function = staticmethod(segkernels.interpolate)
    reference = staticmethod(reference.interpolate)
    double_backward = True
    same_sums = False
    tolerance = {
        torch.float16: (1e-3, 1e-6),
        torch.bfloat16: (8e-3, 1e-6),
        torch.float32: (2e-6, 2e-6),
        torch.float64: (1e-12, 1e-12),
    }
    samples = [
        sample("nearest_up", 2, 3, 4, 5, size=(9, 7), mode="nearest"),
        sample("exact_factor", 1, 5, 3, 4, scale_factor=2.5, mode="nearest-exact"),
        sample("bilinear_up", 2, 4, 5, 3, compile=True, size=(11, 8), mode="bilinear"),
        sample("bilinear_corners", 1, 2, 4, 4, size=9, mode="bilinear", align_corners=True),
        sample("bilinear_down", 1, 3, 9, 11, scale_factor=(0.3, 0.5), mode="bilinear"),
        sample("bicubic_up", 2, 3, 4, 3, compile=True, scale_factor=2.0, mode="bicubic"),
        sample("bicubic_corners", 1, 2, 3, 5, size=(7, 6), mode="bicubic", align_corners=True),
        sample("bicubic_down", 1, 1, 13, 6, size=(5, 4), mode="bicubic"),
        sample("one_pixel", 2, 2, 1, 1, size=(5, 3), mode="bicubic"),
        sample("one_row", 1, 2, 1, 6, size=(1, 4), mode="bilinear"),
        sample("same_height", 1, 5, 4, 3, size=(4, 6), mode="bilinear"),
        sample("same_size", 1, 2, 4, 3, size=(4, 3), mode="bicubic"),
        sample("large", 1, 6, 65, 33, grad=False, size=(257, 200), mode="bilinear"),
    ]
    errors = [
        Error(
            "no size",
            lambda d: segkernels.interpolate(torch.ones(1, 1, 2, 2, device=d)),
            ValueError,
            "either size or scale_factor should be defined",
        ),
        Error(
            "both",
            lambda d: segkernels.interpolate(torch.ones(1, 1, 2, 2, device=d), 4, 2.0),
            ValueError,
            "only one of size or scale_factor",
        ),
        Error(
            "corners of nearest",
            lambda d: segkernels.interpolate(
                torch.ones(1, 1, 2, 2, device=d), 4, align_corners=False
            ),
            ValueError,
            "align_corners option can only be set",
        ),
        Error(
            "three sizes",
            lambda d: segkernels.interpolate(torch.ones(1, 1, 2, 2, device=d), (4, 4, 4)),
            ValueError,
            "spatial dimensions",
        ),
        Error(
            "empty output",
            lambda d: segkernels.interpolate(
                torch.ones(1, 1, 2, 2, device=d), scale_factor=0.3, mode="bilinear"
            ),
            RuntimeError,
            "greater than 0",
        ),
        Error(
            "no channels",
            lambda d: segkernels.interpolate(torch.ones(1, 0, 2, 2, device=d), 4, mode="bilinear"),
            RuntimeError,
            "Non-empty 4D data tensor expected",
        ),
        Error(
            "mode",
            lambda d: segkernels.interpolate(torch.ones(1, 1, 2, 2, device=d), 4, mode="linear"),
            NotImplementedError,
            "Got 4D input",
        ),
    ]

    def expected(self, sample: Sample, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        # The coordinates have the dtype that torch computes in.
        return self._widened(sample, dtype, device).run(_reference_of(dtype))

    def expected_gradients(
        self, sample: Sample, dtype: torch.dtype, device: str
    ) -> tuple[torch.Tensor, ...]:
        call = self._widened(sample, dtype, device, grad=True)
        return suite.gradients(call, _reference_of(dtype), dtype)


def _reference_of(dtype: torch.dtype) -> Any:
    def of(*args: Any, **kwargs: Any) -> torch.Tensor:
        coordinates = _dtypes.compute_dtype(dtype)
        return reference.interpolate(*args, **kwargs, coordinates=coordinates)

    return of


@st.composite
def calls(
    draw: st.DrawFn, device: str = "cpu", dtypes: Sequence[torch.dtype] = tuple(_dtypes.FLOATING)
) -> tuple[torch.Tensor, dict[str, Any]]:
    """An input in any dtype and layout, and arguments of `interpolate`."""
    sizes = st.integers(1, 24) | st.sampled_from([33, 65, 200])
    planes = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    if device == "cpu" and _native.on_cuda(torch.device(device)):  # emulated, so slow
        sizes, planes = st.integers(1, 16), (1, planes[1] // 3 + 1)
    shape = (*planes, draw(sizes), draw(sizes))
    dtype = draw(st.sampled_from(dtypes))
    layout = draw(st.sampled_from(("contiguous", *suite.LAYOUTS[:-1])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    mode = draw(st.sampled_from(MODES))
    kwargs: dict[str, Any] = {"mode": mode}
    if not mode.startswith("nearest"):
        kwargs["align_corners"] = draw(st.sampled_from([None, True, False]))
    if draw(st.booleans()):
        kwargs["size"] = (draw(st.integers(1, 200)), draw(st.integers(1, 90)))
    else:
        least = 1 / min(shape[2:])
        factors = st.floats(max(0.3, least), 16) | st.sampled_from([1.0, 1.1, 2.0, 2.01, 3.0])
        kwargs["scale_factor"] = draw(st.tuples(factors, factors))
        kwargs["recompute_scale_factor"] = draw(st.sampled_from([None, True, False]))
        height, width = (int(n * f) for n, f in zip(shape[2:], kwargs["scale_factor"], strict=True))
        if height < 1 or width < 1:
            kwargs["scale_factor"] = (1.0, 1.0)
    return suite.with_layout(x.to(device, dtype), layout), kwargs


def _torch_rounded(x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """torch's result, computed in float32 for half precision and then rounded."""
    return F.interpolate(x.to(_dtypes.compute_dtype(x.dtype)), **kwargs).to(x.dtype)


def check_equals_torch(x: torch.Tensor, kwargs: dict[str, Any]) -> None:
    ours, theirs = segkernels.interpolate(x, **kwargs), _torch_rounded(x, kwargs)
    assert ours.dtype == x.dtype
    assert ours.stride() == theirs.stride()
    if kwargs["mode"].startswith("nearest"):
        assert torch.equal(ours, theirs)
        return
    # Half precision: the float32 sums round to the same value or to its neighbour.
    rtol = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(x.dtype, 0.0)
    # torch's CUDA kernels add bicubic's taps in another order.
    other_sums = x.is_cuda and kwargs["mode"] == "bicubic" and x.dtype != torch.float64
    rtol = max(rtol, 1e-6) if other_sums else rtol
    atol = 1e-12 if x.dtype == torch.float64 else 2e-6
    if not x.is_cuda and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # Without FMA torch rounds a coordinate once more: an error of half an ulp times the slope.
        half_ulp = 2**-53 if x.dtype == torch.float64 else 2**-24
        atol += half_ulp * max(x.shape[2:]) * float(x.max() - x.min())
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("device", suite.DEVICES)
@given(data=st.data())
def test_equals_torch(device: str, data: st.DataObject) -> None:
    check_equals_torch(*data.draw(calls(device)))


def check_backward_is_the_transpose(x: torch.Tensor, kwargs: dict[str, Any]) -> None:
    x = x.detach().requires_grad_()
    out = segkernels.interpolate(x, **kwargs)
    g = torch.randn(out.shape, dtype=out.dtype).to(out.device)
    (grad,) = torch.autograd.grad(out, x, g)
    left, right = (out * g).sum(), (x * grad).sum()
    scale = (out.abs() * g.abs()).sum() + (x.abs() * grad.abs()).sum()
    assert abs(left - right) <= 1e-13 * scale
    # A constant gradient sums all weights, so a missing or repeated weight would show.
    (ones,) = torch.autograd.grad(segkernels.interpolate(x, **kwargs).sum(), x)
    assert ones.sum().item() == pytest.approx(out.numel(), rel=1e-12)


@pytest.mark.parametrize("device", suite.DEVICES)
@given(data=st.data())
def test_backward_is_the_transpose(device: str, data: st.DataObject) -> None:
    check_backward_is_the_transpose(*data.draw(calls(device, [torch.float64])))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_gradient_equals_torch(mode: str) -> None:
    x = torch.randn(2, 5, 17, 9, requires_grad=True)
    g = torch.randn(2, 5, 65, 40)
    (ours,) = torch.autograd.grad(segkernels.interpolate(x, (65, 40), mode=mode), x, g)
    (theirs,) = torch.autograd.grad(F.interpolate(x, (65, 40), mode=mode), x, g)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.emulated
@given(calls(), st.sampled_from([0, 1, 2]))
def test_cuda_equals_the_cpu(call: tuple[torch.Tensor, dict[str, Any]], rule: int) -> None:
    x, kwargs = call
    arguments = {"size": None, "scale_factor": None, "align_corners": None}
    arguments |= {"recompute_scale_factor": None, "antialias": False, **kwargs}
    found = _resampling_for(x, **arguments)
    assert found is not None
    r = found._replace(rule=rule)
    ours = native.resample(x, r)
    g = torch.randn_like(ours)
    our_grad = native.resample(g, r.transposed())
    with emulated(False):
        _close(ours, native.resample(x, r), 1e-5)
        grad = native.resample(g, r.transposed())
    # Sums of many terms, in another order.
    _close(our_grad, grad, 2e-5 * (grad.double().abs().max().item() + 1))


@pytest.mark.emulated
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_same_size_is_copied_on_cuda(mode: str, value: float) -> None:
    """In forward and backward, as by torch's kernels."""
    x = torch.randn(1, 2, 4, 5)
    x[0, :, 1, 2] = value
    r = Resampling((4, 5), (4, 5), (0.0, 0.0), mode, False, 2, False)
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        assert suite.same_bits(native.resample(t, r), x)
        assert suite.same_bits(native.resample(t, r.transposed()), x)


def _close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    rtol = {torch.float16: 2**-9, torch.bfloat16: 2**-6}.get(ours.dtype, 0.0)
    if ours.dtype == torch.float64:
        atol *= 1e-7
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("in_size", "out_size", "channels"),
    [
        ((1, 1), (2, 6000), 1),
        ((1, 1), (1, 13000), 1),
        ((2, 2), (3, 900), 40),
        ((300, 2), (9, 600), 3),
    ],
    ids=["one_row_tiles", "no_tile_holds_it", "channel_chunks", "tall"],
)
@pytest.mark.parametrize("mode", MODES)
def test_tiles_of_extreme_ratios(
    mode: str, in_size: tuple[int, int], out_size: tuple[int, int], channels: int
) -> None:
    g = torch.randn(1, channels, *out_size, dtype=torch.float64)
    g = g.contiguous(memory_format=torch.channels_last)
    r = Resampling(in_size, out_size, (0.0, 0.0), mode, False, 2, True)
    ours = native.resample(g, r)
    with emulated(False):
        torch.testing.assert_close(ours, native.resample(g, r), rtol=1e-11, atol=1e-11)


# Fewer and more channels than vector lanes; ratios whose outputs share rows or not.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 19, 70])
@pytest.mark.parametrize("sizes", [(33, 16), (40, 20), (16, 33), (16, 32)], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", suite.OpSuite.dtypes, ids=str)
def test_layouts_and_ratios(
    mode: str, sizes: tuple[int, int], channels: int, layout: str, dtype: torch.dtype
) -> None:
    before, after = sizes
    x = suite.with_layout(torch.randn(2, channels, before, before + 3).to(dtype), layout)
    wide = x.double() if dtype == torch.float64 else x.float()
    ours, theirs = x.clone().requires_grad_(), wide.clone().requires_grad_()
    out = segkernels.interpolate(ours, (after, after), mode=mode)
    expected = F.interpolate(theirs, (after, after), mode=mode)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.to(wide.dtype))
    # The sums differ in the last bit, which may round half precision to a neighbour.
    half = dtype in (torch.float16, torch.bfloat16)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps if half else 1e-5}
    torch.testing.assert_close(out, expected.to(dtype), **close)
    torch.testing.assert_close(ours.grad, theirs.grad.to(dtype), **close)


def test_nan_does_not_spread_along_an_unchanged_axis() -> None:
    x = torch.zeros(1, 1, 3, 4)
    x[0, 0, 1, 2] = float("nan")
    out = segkernels.interpolate(x, (3, 8), mode="bilinear")
    assert torch.isnan(out).any(3).flatten().tolist() == [False, True, False]
    assert torch.equal(torch.isnan(out), torch.isnan(F.interpolate(x, (3, 8), mode="bilinear")))


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_computed_in_float32(mode: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(2, 3, 9, 8).to(dtype)
        expected = segkernels.interpolate(x.float(), (20, 31), mode=mode).to(dtype)
        assert torch.equal(segkernels.interpolate(x, (20, 31), mode=mode), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_every_half_precision_value_is_copied_and_rounded_as_by_torch(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[~torch.isnan(every)].reshape(1, 1, 1, -1)
    copied = segkernels.interpolate(every, (2, every.size(3)), mode="nearest")
    assert torch.equal(copied[:, :, 1:], every)
    # The mean of two neighbours is a rounding tie where their last bits differ.
    x = every[torch.isfinite(every)].reshape(1, 1, 1, -1)
    pairs = torch.stack((x, x.roll(1)), 2).reshape(1, 1, 2, -1)
    ours = segkernels.interpolate(pairs, (1, pairs.size(3)), mode="bilinear")
    expected = (pairs.float() * 0.5).sum(2, keepdim=True).to(dtype)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("x", "kwargs"),
    [
        (torch.randn(2, 3, 7), {"scale_factor": 2.0, "mode": "linear"}),
        (torch.randn(1, 2, 3, 4, 5), {"size": (4, 5, 6), "mode": "trilinear"}),
        (torch.randn(1, 2, 8, 8), {"size": 3, "mode": "area"}),
        (torch.randn(1, 2, 9, 8), {"size": (3, 4), "mode": "bicubic", "antialias": True}),
        (torch.arange(24, dtype=torch.uint8).reshape(1, 2, 3, 4), {"scale_factor": 2.0}),
    ],
    ids=["3d", "5d", "area", "antialias", "uint8"],
)
def test_other_inputs_are_passed_to_torch(x: torch.Tensor, kwargs: dict[str, Any]) -> None:
    assert torch.equal(segkernels.interpolate(x, **kwargs), F.interpolate(x, **kwargs))


def test_double_backward_equals_torch() -> None:
    def second(function: Any) -> torch.Tensor:
        x = torch.linspace(0, 1, 60, dtype=torch.float64).reshape(1, 3, 4, 5).requires_grad_()
        out = function(x, (7, 9), mode="bicubic")
        (grad,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
        return torch.autograd.grad((grad**3).sum(), x)[0]

    torch.testing.assert_close(second(segkernels.interpolate), second(F.interpolate))


def test_dynamic_shapes_compile_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    count = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def f(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = segkernels.interpolate(x, scale_factor=2.5, mode="bilinear")
        return out

    for shape in ((2, 3, 5, 7), (3, 4, 6, 9), (4, 5, 11, 8)):
        x = torch.randn(shape)
        assert torch.equal(f(x), segkernels.interpolate(x, scale_factor=2.5, mode="bilinear"))
    assert count.frame_count == 1


def test_output_layout_of_strided_inputs() -> None:
    base = torch.randn(2, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    for x in (base[..., ::2], base[:, 1:4], base[:, :, 1:], base.transpose(2, 3)):
        ours = segkernels.interpolate(x, (12, 10), mode="bilinear")
        assert ours.stride() == F.interpolate(x, (12, 10), mode="bilinear").stride()
        torch.testing.assert_close(
            ours, F.interpolate(x, (12, 10), mode="bilinear"), rtol=0, atol=2e-6
        )


@pytest.mark.huge
@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_more_than_2_31_elements(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(1, 96, 1200, 1200, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=layout).requires_grad_()
    out = segkernels.interpolate(x, (4801, 4799), mode="bilinear")
    assert out.numel() > 2**31
    for c in (0, 50, 95):
        theirs = F.interpolate(x[:, c : c + 1].float(), (4801, 4799), mode="bilinear").half()
        torch.testing.assert_close(out[:, c : c + 1], theirs, rtol=2**-10, atol=2e-6)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    total = grad.double().sum().item()
    assert total == pytest.approx(out.numel(), rel=1e-4)
