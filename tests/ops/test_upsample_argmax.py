"""upsample_argmax: the shared suite, torch's results, ties, NaN and infinities."""

from __future__ import annotations

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
from segkernels.ops import _dtypes
from segkernels.ops.interpolate import _logits
from segkernels.ops.upsample_argmax import native, reference
from segkernels.ops.upsample_argmax.native import Argmax

MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")


def sample(id: str, *args: Any, compile: bool = False, **kwargs: Any) -> Sample:
    return Sample(id, args, kwargs, compile=compile)


class TestUpsampleArgmax(suite.OpSuite):
    function = staticmethod(segkernels.upsample_argmax)
    reference = staticmethod(reference.upsample_argmax)
    samples = [
        sample("bilinear", Float(2, 5, 6, 7), (17, 20), compile=True),
        sample("confidence", Float(2, 4, 5, 5), 13, return_confidence=True, compile=True),
        sample("corners", Float(1, 21, 9, 4), (30, 30), align_corners=True, dtype=torch.uint8),
        sample("bicubic", Float(1, 3, 5, 6), (70, 9), mode="bicubic", return_confidence=True),
        sample("nearest", Float(2, 19, 3, 4), (5, 80), mode="nearest", dtype=torch.int16),
        sample("exact", Float(1, 2, 7, 7), 3, mode="nearest-exact", dtype=torch.int32),
        sample("one_class", Float(2, 1, 4, 4), 8, return_confidence=True),
        sample("one_pixel", Float(2, 6, 1, 1), (3, 2), return_confidence=True),
        sample("same_size", Float(1, 3, 4, 6), (4, 6), return_confidence=True),
        sample("many_classes", Float(1, 300, 3, 3), 9, return_confidence=True),
    ]
    errors = [
        Error(
            "too many classes",
            lambda d: segkernels.upsample_argmax(
                torch.zeros(1, 257, 1, 1, device=d), 2, dtype=torch.uint8
            ),
            ValueError,
            suite.message("dtype must represent labels up to 256", "uint8", "255"),
        ),
        Error(
            "label dtype",
            lambda d: segkernels.upsample_argmax(
                torch.zeros(1, 2, 1, 1, device=d), 2, dtype=torch.float32
            ),
            TypeError,
            "dtype must be torch.uint8, int16, int32 or int64, got torch.float32",
        ),
        Error(
            "logits dtype",
            lambda d: segkernels.upsample_argmax(torch.zeros(1, 2, 1, 1, device=d).int(), 2),
            TypeError,
            suite.message("logits must be one of", "float32", "got torch.int32"),
        ),
        Error(
            "logits shape",
            lambda d: segkernels.upsample_argmax(torch.zeros(2, 1, 1, device=d), 2),
            ValueError,
            r"logits must be \[N, C, H, W\], got shape \(2, 1, 1\)",
        ),
        Error(
            "size",
            lambda d: segkernels.upsample_argmax(torch.zeros(1, 2, 1, 1, device=d), (0, 3)),
            ValueError,
            r"size must be positive, got \(0, 3\)",
        ),
        Error(
            "mode",
            lambda d: segkernels.upsample_argmax(torch.zeros(1, 2, 1, 1, device=d), 2, mode="area"),
            ValueError,
            suite.message("mode must be one of", "bilinear", "'area'"),
        ),
    ]

    def expected(self, sample: Sample, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        call = self._widened(sample, dtype, device)
        call.kwargs["coordinates"] = _dtypes.compute_dtype(dtype)
        labels, *confidence = call.run(reference.upsample_argmax)
        return (labels, *confidence)

    def assert_close(self, ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
        if not ours.is_floating_point():
            # No pixel of these samples has a tie within rounding.
            assert torch.equal(ours, expected.to(ours.dtype))
            return
        assert ours.dtype == _dtypes.compute_dtype(dtype)
        atol = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=atol)


def near_ties(logits: torch.Tensor, size: tuple[int, int], **kwargs: Any) -> torch.Tensor:
    """Pixels whose two largest logits are so close that rounding may decide."""
    x = F.interpolate(logits.to(_dtypes.compute_dtype(logits.dtype)), size, **kwargs)
    if x.size(1) == 1:
        return torch.zeros(x.shape[:1] + x.shape[2:], dtype=torch.bool, device=x.device)
    top = x.topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]) < 1e-5


@st.composite
def calls(
    draw: st.DrawFn, device: str = "cpu"
) -> tuple[torch.Tensor, tuple[int, int], dict[str, Any]]:
    sizes = st.integers(1, 12) | st.just(33)
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 30)), draw(sizes), draw(sizes))
    dtype = draw(st.sampled_from(list(_dtypes.FLOATING)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    mode = draw(st.sampled_from(MODES))
    align = None if mode.startswith("nearest") else draw(st.booleans())
    size = (draw(st.integers(1, 70)), draw(st.integers(1, 140)))
    layout = draw(st.sampled_from(("contiguous", *suite.LAYOUTS)))
    x = suite.with_layout(x.to(device, dtype), layout)
    return x, size, {"mode": mode, "align_corners": align}


def check(x: torch.Tensor, size: tuple[int, int], kwargs: dict[str, Any]) -> None:
    arguments = {**kwargs, "align_corners": bool(kwargs["align_corners"])}
    labels, confidence = segkernels.upsample_argmax(x, size, **arguments, return_confidence=True)
    full = F.interpolate(x.to(_dtypes.compute_dtype(x.dtype)), size, **kwargs)
    sure = ~near_ties(x, size, **kwargs)
    assert torch.equal(labels[sure], full.argmax(1)[sure])
    atol = 1e-12 if x.dtype == torch.float64 else 3e-6
    torch.testing.assert_close(confidence, full.softmax(1).amax(1), rtol=0, atol=atol)


@pytest.mark.parametrize("device", suite.DEVICES)
@given(data=st.data())
def test_equals_torch(device: str, data: st.DataObject) -> None:
    check(*data.draw(calls(device)))


@pytest.mark.emulated
@given(calls(), st.sampled_from(list(native.LABELS)))
def test_cuda_equals_the_cpu(
    call: tuple[torch.Tensor, tuple[int, int], dict[str, Any]], dtype: torch.dtype
) -> None:
    x, size, kwargs = call
    r = _logits.resampling("test", x, size, kwargs["mode"], kwargs["align_corners"])
    for rule in (0, 2):
        r = r._replace(rule=rule)
        for confidence in (False, True):
            labels, ours = native.argmax(x, Argmax(r, confidence, dtype))
            with emulated(False):
                expected, theirs = native.argmax(x, Argmax(r, confidence, dtype))
            sure = ~near_ties(x, size, **kwargs)
            assert torch.equal(labels[sure], expected[sure])
            torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6)


@pytest.mark.emulated
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_infinity_does_not_spread_at_the_same_size(mode: str) -> None:
    """By CUDA's rule, under which torch copies the input."""
    x = torch.randn(1, 3, 4, 5)
    x[0, 1, 1, 2] = float("inf")
    r = _logits.resampling("test", x, (4, 5), mode, False)._replace(rule=2)
    labels, confidence = native.argmax(x, Argmax(r, True, torch.int64))
    assert torch.equal(labels, x.argmax(1))
    torch.testing.assert_close(confidence, x.softmax(1).amax(1), equal_nan=True)


def test_ties_and_nan_equal_torch_argmax() -> None:
    x = torch.zeros(1, 4, 2, 2)
    assert segkernels.upsample_argmax(x, 5).eq(0).all()
    x[:, 2:] = 1.0
    assert segkernels.upsample_argmax(x, 5).eq(2).all()
    x[0, 1, 0, 0] = float("nan")
    labels, confidence = segkernels.upsample_argmax(x, 5, return_confidence=True)
    full = F.interpolate(x, 5, mode="bilinear")
    assert torch.equal(labels, full.argmax(1))
    assert torch.equal(torch.isnan(confidence), torch.isnan(full.softmax(1).amax(1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("device", suite.DEVICES)
def test_confidence_of_non_finite_logits(device: str, classes: int, value: float) -> None:
    """A non-finite logit in one class, and in all classes."""
    x = torch.zeros(classes + 1, classes, 1, 1, device=device)
    x[range(classes), range(classes)] = value
    x[classes] = value
    full = F.interpolate(x, 2, mode="nearest")
    labels, confidence = segkernels.upsample_argmax(x, 2, mode="nearest", return_confidence=True)
    assert torch.equal(labels, full.argmax(1))
    torch.testing.assert_close(confidence, full.softmax(1).amax(1), equal_nan=True)


def test_masked_classes() -> None:
    x = torch.randn(1, 5, 3, 3)
    x[:, [0, 3]] = -float("inf")
    labels, confidence = segkernels.upsample_argmax(
        x, (3, 7), mode="nearest", return_confidence=True
    )
    full = F.interpolate(x, (3, 7), mode="nearest")
    assert torch.equal(labels, full.argmax(1))
    torch.testing.assert_close(confidence, full.softmax(1).amax(1))


def test_result_is_a_tensor_without_confidence() -> None:
    labels = segkernels.upsample_argmax(torch.randn(1, 3, 2, 2, requires_grad=True), 4)
    assert isinstance(labels, torch.Tensor)
    assert labels.dtype == torch.int64
    assert not labels.requires_grad


@pytest.mark.huge
@pytest.mark.gpu
def test_more_than_2_31_logits_and_pixels() -> None:
    x = torch.randn(1, 150, 40, 40, device="cuda", dtype=torch.float16)
    labels = segkernels.upsample_argmax(x, (47000, 46000), dtype=torch.uint8)
    assert labels.numel() > 2**31
    # The first rows read only the first row of logits, the last rows only the last.
    for row, logits in ((0, x[:, :, :1]), (-1, x[:, :, -1:])):
        alone = F.interpolate(logits.float(), (1, 46000), mode="bilinear").argmax(1)
        assert (labels[0, row].long() == alone[0, 0]).float().mean() > 0.9999
