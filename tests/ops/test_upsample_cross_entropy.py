"""upsample_cross_entropy and upsample_binary_cross_entropy: the shared suite, torch's losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulation import ON_CUDA, emulated
from hypothesis import given
from hypothesis import strategies as st
from lattice_points import raises_in_call
from ops import suite
from ops.suite import Error, Float, Sample

import segkernels
from segkernels.ops import _dtypes
from segkernels.ops.interpolate import _logits
from segkernels.ops.interpolate.native import resample
from segkernels.ops.upsample_cross_entropy import native, operator, reference
from segkernels.ops.upsample_cross_entropy.native import Loss

MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")


def labels(classes: int, *shape: int, ignore: int | None = None, dtype: Any = torch.int64) -> Any:
    """A function that draws labels, one in five of them `ignore`."""

    def make(generator: torch.Generator) -> torch.Tensor:
        found = torch.randint(classes, shape, generator=generator)
        if ignore is not None:
            found[torch.rand(shape, generator=generator) < 0.2] = ignore
        return found.to(dtype)

    return make


def positive(generator: torch.Generator, n: int) -> torch.Tensor:
    return torch.rand(n, generator=generator, dtype=torch.float64) + 0.1


def class_weights(n: int) -> Float:
    return Float(n, make=lambda generator: positive(generator, n), grad=False)


def sample(id: str, *args: Any, grad: bool = True, compile: bool = False, **kwargs: Any) -> Sample:
    return Sample(id, args, kwargs, grad=grad, compile=compile)


class LossSuite(suite.OpSuite):
    forward_mode = False
    not_differentiable = ("upsample_cross_entropy_backward",)
    tolerance = {
        torch.float16: (2e-3, 2e-5),
        torch.bfloat16: (1.6e-2, 2e-4),
        torch.float32: (2e-5, 2e-6),
        torch.float64: (1e-11, 1e-12),
    }

    def _with_coordinates(self, dtype: torch.dtype) -> Callable[..., Any]:
        def of(*args: Any, **kwargs: Any) -> Any:
            coordinates = _dtypes.compute_dtype(dtype)
            return type(self).reference(*args, **kwargs, coordinates=coordinates)

        return of

    def expected(self, sample: Sample, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        return self._widened(sample, dtype, device).run(self._with_coordinates(dtype))

    def expected_gradients(
        self, sample: Sample, dtype: torch.dtype, device: str
    ) -> tuple[torch.Tensor, ...]:
        call = self._widened(sample, dtype, device, grad=True)
        # The loss and its gradient have the dtype that is computed in.
        return suite.gradients(call, self._with_coordinates(dtype), _dtypes.compute_dtype(dtype))


class TestUpsampleCrossEntropy(LossSuite):
    function = staticmethod(segkernels.upsample_cross_entropy)
    reference = staticmethod(reference.upsample_cross_entropy)
    samples = [
        sample("mean", Float(2, 5, 4, 3), labels(5, 2, 13, 9, ignore=-100), compile=True),
        sample(
            "weighted",
            Float(2, 3, 4, 5),
            labels(3, 2, 7, 11, ignore=255, dtype=torch.uint8),
            class_weights(3),
            ignore_index=255,
            align_corners=True,
        ),
        sample(
            "smoothed",
            Float(1, 4, 3, 3),
            labels(4, 1, 10, 6, ignore=-100),
            class_weights(4),
            label_smoothing=0.1,
            compile=True,
            reduction="sum",
        ),
        sample(
            "smoothed, none",
            Float(2, 4, 3, 3),
            labels(4, 2, 10, 6, ignore=-100),
            class_weights(4),
            label_smoothing=0.1,
            reduction="none",
        ),
        sample(
            "none",
            Float(2, 6, 3, 4),
            labels(6, 2, 5, 9, ignore=2, dtype=torch.int32),
            ignore_index=2,
            reduction="none",
            compile=True,
        ),
        sample("bicubic", Float(1, 3, 5, 4), labels(3, 1, 12, 12), mode="bicubic"),
        sample("nearest", Float(1, 2, 3, 2), labels(2, 1, 7, 5, dtype=torch.int16), mode="nearest"),
        sample("down", Float(1, 3, 9, 8), labels(3, 1, 4, 3), label_smoothing=0.3),
        sample("one_class", Float(1, 1, 2, 2), labels(1, 1, 4, 4)),
        sample("one_pixel", Float(2, 3, 1, 1), labels(3, 2, 5, 6)),
        sample("same_size", Float(1, 3, 4, 5), labels(3, 1, 4, 5)),
        sample("wide", Float(1, 21, 9, 33), labels(21, 1, 65, 257, ignore=-100), grad=False),
        sample("many_classes", Float(1, 1000, 2, 2), labels(1000, 1, 6, 5), grad=False),
    ]
    errors = [
        Error(
            "target shape",
            lambda d: segkernels.upsample_cross_entropy(
                torch.zeros(2, 3, 2, 2, device=d), torch.zeros(1, 4, 4, device=d).long()
            ),
            ValueError,
            r"target must be \[2, H, W\], got shape \(1, 4, 4\)",
        ),
        Error(
            "target dtype",
            lambda d: segkernels.upsample_cross_entropy(
                torch.zeros(1, 3, 2, 2, device=d), torch.zeros(1, 4, 4, device=d)
            ),
            TypeError,
            "target must be int64, int32, int16 or uint8, got torch.float32",
        ),
        Error(
            "weight shape",
            lambda d: segkernels.upsample_cross_entropy(
                torch.zeros(1, 3, 2, 2, device=d),
                torch.zeros(1, 4, 4, device=d).long(),
                torch.ones(4, device=d),
            ),
            ValueError,
            r"weight must be \[3\], got shape \(4,\)",
        ),
        Error(
            "reduction",
            lambda d: segkernels.upsample_cross_entropy(
                torch.zeros(1, 3, 2, 2, device=d),
                torch.zeros(1, 4, 4, device=d).long(),
                reduction="average",
            ),
            ValueError,
            suite.message("reduction must be one of 'none', 'mean', 'sum'", "'average'"),
        ),
        Error(
            "label smoothing",
            lambda d: segkernels.upsample_cross_entropy(
                torch.zeros(1, 3, 2, 2, device=d),
                torch.zeros(1, 4, 4, device=d).long(),
                label_smoothing=1.5,
            ),
            ValueError,
            "label_smoothing must be from 0 to 1, got 1.5",
        ),
        Error(
            "weight with a gradient",
            lambda d: segkernels.upsample_cross_entropy(
                torch.zeros(1, 3, 2, 2, device=d),
                torch.zeros(1, 4, 4, device=d).long(),
                torch.ones(3, device=d, requires_grad=True),
            ),
            ValueError,
            "weight must not require grad",
        ),
        Error(
            "two devices",
            lambda d: segkernels.upsample_cross_entropy(
                torch.zeros(1, 3, 2, 2, device=d), torch.zeros(1, 4, 4, device="meta").long()
            ),
            RuntimeError,
            suite.message("target must be on", "got meta"),
        ),
    ]

    def test_nan_propagation(self, sample: Sample, device: str) -> None:
        # Only per-pixel losses: a mean or sum is NaN as soon as one pixel is.
        if sample.kwargs.get("reduction") == "none":
            super().test_nan_propagation(sample, device)


class TestUpsampleBinaryCrossEntropy(LossSuite):
    function = staticmethod(segkernels.upsample_binary_cross_entropy)
    reference = staticmethod(reference.upsample_binary_cross_entropy)
    samples = [
        sample("labels", Float(2, 1, 4, 3), labels(2, 2, 1, 13, 9, ignore=-100), compile=True),
        sample(
            "soft",
            Float(2, 1, 3, 5),
            lambda g: torch.rand(2, 1, 11, 8, generator=g),
            compile=True,
            reduction="none",
        ),
        sample(
            "weighted",
            Float(1, 1, 4, 4),
            labels(2, 1, 1, 9, 10, ignore=255, dtype=torch.uint8),
            Float(1, 1, 9, 10, make=lambda g: positive(g, 90).reshape(1, 1, 9, 10), grad=False),
            ignore_index=255,
            pos_weight=class_weights(1),
            reduction="sum",
            mode="bicubic",
        ),
        sample("bool", Float(1, 1, 2, 3), lambda g: torch.rand(1, 1, 6, 7, generator=g) < 0.5),
        sample("corners", Float(1, 1, 5, 5), labels(2, 1, 1, 9, 9), align_corners=True),
        sample("same_size", Float(1, 1, 5, 5), labels(2, 1, 1, 5, 5)),
    ]
    errors = [
        Error(
            "channels",
            lambda d: segkernels.upsample_binary_cross_entropy(
                torch.zeros(1, 2, 2, 2, device=d), torch.zeros(1, 2, 4, 4, device=d)
            ),
            ValueError,
            r"logits must be \[N, 1, H, W\], got shape \(1, 2, 2, 2\)",
        ),
        Error(
            "target shape",
            lambda d: segkernels.upsample_binary_cross_entropy(
                torch.zeros(1, 1, 2, 2, device=d), torch.zeros(1, 4, 4, device=d)
            ),
            ValueError,
            r"target must be \[1, 1, H, W\], got shape \(1, 4, 4\)",
        ),
        Error(
            "weight shape",
            lambda d: segkernels.upsample_binary_cross_entropy(
                torch.zeros(1, 1, 2, 2, device=d),
                torch.zeros(1, 1, 4, 4, device=d),
                torch.ones(3, device=d),
            ),
            ValueError,
            r"weight must broadcast to \(1, 1, 4, 4\), got shape \(3,\)",
        ),
        Error(
            "pos_weight shape",
            lambda d: segkernels.upsample_binary_cross_entropy(
                torch.zeros(1, 1, 2, 2, device=d),
                torch.zeros(1, 1, 4, 4, device=d),
                pos_weight=torch.ones(2, device=d),
            ),
            ValueError,
            r"pos_weight must have one element, got shape \(2,\)",
        ),
        Error(
            "target dtype",
            lambda d: segkernels.upsample_binary_cross_entropy(
                torch.zeros(1, 1, 2, 2, device=d), torch.zeros(1, 1, 4, 4, device=d).cfloat()
            ),
            TypeError,
            "target must be floating, bool, uint8",
        ),
    ]

    def test_nan_propagation(self, sample: Sample, device: str) -> None:
        if sample.kwargs.get("reduction") == "none":
            super().test_nan_propagation(sample, device)


@st.composite
def calls(
    draw: st.DrawFn, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    sizes = st.integers(1, 9) | st.just(17)
    n, c = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8, 21]))
    dtype = draw(st.sampled_from(list(_dtypes.FLOATING)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    shape = (n, c, draw(sizes), draw(sizes))
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
    logits = suite.with_layout(logits, draw(st.sampled_from(("contiguous", *suite.LAYOUTS[:-1]))))
    size = (draw(st.integers(1, 40)), draw(st.integers(1, 140)))
    ignore = draw(st.sampled_from([-100, 255, 0]))
    target = labels(c, n, *size, ignore=ignore)(generator).to(device)
    kwargs: dict[str, Any] = {
        "ignore_index": ignore,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
    }
    if draw(st.booleans()):
        kwargs["weight"] = positive(generator, c)
    kwargs["mode"] = draw(st.sampled_from(MODES))
    kwargs["align_corners"] = not kwargs["mode"].startswith("nearest") and draw(st.booleans())
    return logits, target, kwargs


def _torch_loss(logits: torch.Tensor, target: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    rest = dict(kwargs)
    mode, align = rest.pop("mode"), rest.pop("align_corners")
    x = F.interpolate(
        logits.to(_dtypes.compute_dtype(logits.dtype)),
        target.shape[-2:],
        mode=mode,
        align_corners=None if mode.startswith("nearest") else align,
    )
    return F.cross_entropy(x, target, **rest)


def check(logits: torch.Tensor, target: torch.Tensor, kwargs: dict[str, Any]) -> None:
    compute = _dtypes.compute_dtype(logits.dtype)
    if "weight" in kwargs:
        kwargs = {**kwargs, "weight": kwargs["weight"].to(logits.device, compute)}
    rtol, atol = (1e-10, 1e-12) if compute == torch.float64 else (1e-4, 1e-5)
    found = []
    for function in (segkernels.upsample_cross_entropy, None):
        x = logits.detach().requires_grad_()  # clone() would lose the strides
        if function is not None:
            loss = function(x, target, **kwargs)
        else:
            loss = _torch_loss(x, target, kwargs)
        assert loss.dtype == compute
        grad = torch.linspace(0.5, 1.5, loss.numel(), dtype=compute).reshape(loss.shape)
        found.append((loss, torch.autograd.grad(loss, x, grad.to(loss.device))[0]))
    (loss, grad), (loss_of_torch, grad_of_torch) = found
    torch.testing.assert_close(loss, loss_of_torch, rtol=rtol, atol=atol, equal_nan=True)
    if kwargs["mode"].startswith("nearest"):
        return  # torch's CPU backward is not the transpose of its forward (see the reference)
    ulp = {torch.float16: 2**-9, torch.bfloat16: 2**-6}.get(logits.dtype, 0.0)
    # A pixel's terms cancel (to 0 with one class), so the scale is their size, not their sum's.
    term = 1 / target.numel() if kwargs["reduction"] == "mean" else 1.0
    scale = max(grad_of_torch.double().nan_to_num().abs().max().item(), term)
    # Each of the terms that are accumulated into a logit's gradient is rounded.
    readers = target.numel() * logits.size(1) / max(logits.numel(), 1)
    rounding = torch.finfo(compute).eps * readers * term
    # The spacing of float16's subnormal numbers.
    step = torch.finfo(logits.dtype).smallest_normal * torch.finfo(logits.dtype).eps
    atol = atol * scale + rounding + step
    torch.testing.assert_close(grad, grad_of_torch, rtol=rtol + ulp, atol=atol, equal_nan=True)


@pytest.mark.parametrize("device", suite.DEVICES)
@given(data=st.data())
def test_equals_torch(device: str, data: st.DataObject) -> None:
    check(*data.draw(calls(device)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("device", suite.DEVICES)
def test_non_finite_logits(device: str, classes: int, value: float) -> None:
    """A non-finite logit in one class, and in all classes: losses and gradients equal torch's."""
    x = torch.zeros(classes + 1, classes, 1, 1, device=device)
    x[range(classes), range(classes)] = value
    x[classes] = value
    options: dict[str, Any] = {"mode": "nearest", "reduction": "none"}
    for label in range(classes):
        target = torch.full((classes + 1, 2, 2), label, device=device)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        loss = segkernels.upsample_cross_entropy(mine, target, **options)
        expected = _torch_loss(theirs, target, options | {"align_corners": False})
        torch.testing.assert_close(loss, expected, equal_nan=True)
        (grad,) = torch.autograd.grad(loss.sum(), mine)
        (grad_of_torch,) = torch.autograd.grad(expected.sum(), theirs)
        torch.testing.assert_close(grad, grad_of_torch, equal_nan=True)


@pytest.mark.emulated
@given(calls(), st.booleans())
def test_cuda_equals_the_cpu(
    call: tuple[torch.Tensor, torch.Tensor, dict[str, Any]], binary: bool
) -> None:
    logits, target, kwargs = call
    compute = _dtypes.compute_dtype(logits.dtype)
    weight = kwargs.get("weight")
    weight = None if weight is None else weight.to(compute)
    if binary:
        logits, target = logits[:, :1], target.clamp(max=1).unsqueeze(1)
        target = torch.where(target < 0, 0, target)
        weight = None if weight is None else torch.rand(target.shape).to(compute)
    r = _logits.resampling(
        "test", logits, tuple(target.shape[-2:]), kwargs["mode"], kwargs["align_corners"]
    )
    loss = Loss(
        binary,
        kwargs["ignore_index"],
        kwargs["reduction"],
        0.0 if binary else kwargs["label_smoothing"],
        r,
    )
    t = logits, target, weight, None
    ours = native.forward(*t, loss)
    with emulated(False):
        expected = native.forward(*t, loss)
    tolerance = (
        {"rtol": 1e-10, "atol": 1e-11} if compute == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for mine, theirs in zip(ours, expected, strict=True):
        if mine is ours[2] and loss.reduction == "none":
            continue
        torch.testing.assert_close(mine, theirs, **tolerance, equal_nan=True)
    grad = torch.rand(target.shape if loss.reduction == "none" else (), dtype=compute)
    mine = native.backward(grad, *t, *expected[1:], loss)
    with emulated(False):
        theirs = native.backward(grad, *t, *expected[1:], loss)
    ulp = {torch.float16: 2**-9, torch.bfloat16: 2**-6}.get(logits.dtype, 0.0)
    term = 1 / target.numel() if loss.reduction == "mean" else 1.0
    scale = max(theirs.double().nan_to_num().abs().max().item(), term)
    torch.testing.assert_close(
        mine,
        theirs,
        rtol=tolerance["rtol"] + ulp,
        # Near 0 the neighbours of float16 are this far apart: each rounds to its own.
        atol=tolerance["atol"] * scale + (2**-24 if logits.dtype == torch.float16 else 0.0),
        equal_nan=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_equals_torch(reduction: str) -> None:
    logits = torch.randn(2, 1, 9, 7) * 20
    target, weight, pos_weight = torch.rand(2, 1, 33, 70), torch.rand(2, 1, 33, 70), torch.rand(1)
    found = []
    for fused in (True, False):
        x = logits.clone().requires_grad_()
        if fused:
            loss = segkernels.upsample_binary_cross_entropy(
                x, target, weight, reduction, pos_weight
            )
        else:
            loss = F.binary_cross_entropy_with_logits(
                F.interpolate(x, (33, 70), mode="bilinear"),
                target,
                weight,
                reduction=reduction,
                pos_weight=pos_weight,
            )
        found.append((loss, *torch.autograd.grad(loss.sum(), x)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_all_pixels_ignored() -> None:
    x = torch.randn(1, 3, 2, 2, requires_grad=True)
    target = torch.full((1, 5, 5), -100)
    loss = segkernels.upsample_cross_entropy(x, target)
    assert torch.isnan(loss)
    assert torch.isnan(_torch_loss(x, target, {"mode": "bilinear", "align_corners": False}))
    total = segkernels.upsample_cross_entropy(x, target, reduction="sum")
    (grad,) = torch.autograd.grad(total, x)
    assert total.item() == 0.0
    assert not grad.any()


@pytest.mark.parametrize("device", suite.DEVICES)
def test_mean_of_labels_without_weight_is_nan(device: str) -> None:
    # With label smoothing the sum of the losses is positive.
    x, target = torch.randn(1, 3, 2, 2), torch.zeros(1, 5, 5, dtype=torch.int64)
    kwargs = {"weight": torch.tensor([0.0, 1.0, 1.0]), "label_smoothing": 0.1}
    assert torch.isnan(F.cross_entropy(F.interpolate(x, (5, 5)), target, **kwargs))
    kwargs["weight"] = kwargs["weight"].to(device)
    assert torch.isnan(segkernels.upsample_cross_entropy(x.to(device), target.to(device), **kwargs))


@pytest.mark.parametrize("label", [-1, 3, 2**40, -(2**33)])
def test_labels_out_of_range(label: int) -> None:
    target = torch.zeros(1, 5, 5, dtype=torch.int64)
    target[0, 2, 3], target[0, 4, 1:] = label, 3
    found = rf"ignore_index = -100, got {label} at \[0, 2, 3\], the first of 5 invalid labels$"
    with pytest.raises(
        ValueError, match=rf"target must be from 0 to num_classes - 1 = 2 or {found}"
    ):
        segkernels.upsample_cross_entropy(torch.randn(1, 3, 2, 2), target)
    found = found.replace("0, 2", "0, 0, 2")
    with pytest.raises(ValueError, match=rf"target must be 0, 1 or {found}"):
        segkernels.upsample_binary_cross_entropy(torch.randn(1, 1, 2, 2), target.unsqueeze(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_a_label_of_255_suggests_ignore_index(dtype: torch.dtype) -> None:
    x, target = torch.randn(1, 1, 2, 2), torch.zeros(1, 4000, 3, dtype=dtype)
    target[0, 7] = 255
    with pytest.raises(ValueError, match=r"got 255 at \[0, 7, 0\].*first of 3 .*ignore_index=255$"):
        segkernels.upsample_cross_entropy(x, target)
    with pytest.raises(ValueError, match=r"got 255 at \[0, 0, 7, 0\].*ignore_index=255$"):
        segkernels.upsample_binary_cross_entropy(x, target.unsqueeze(1))
    assert segkernels.upsample_cross_entropy(x, target, ignore_index=255).item() == 0.0


def both(
    logits: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Loss and gradient of segkernels and of torch, for logits of the target's size."""
    found = []
    for function in (segkernels.upsample_cross_entropy, F.cross_entropy):
        x = logits.detach().clone().requires_grad_()
        loss = function(x, target, *args, **kwargs)
        found.append((loss.detach(), *torch.autograd.grad(loss, x)))
    return found[0], found[1]


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("absent", ["no pixel", "ignored pixels"])
def test_weight_of_an_absent_class_has_no_effect(value: float, absent: str, device: str) -> None:
    """As in ``counts.sum() / counts``, the weight of a class without pixels is infinite."""
    x = torch.randn(2, 3, 6, 7, device=device)
    target = torch.randint(2, (2, 6, 7), device=device)
    ignore = -100
    if absent == "ignored pixels":
        target[:, 2], ignore = 2, 2
    weight = torch.tensor([1.5, 3.0, value], device=device)
    (loss, grad), (expected, expected_grad) = both(x, target, weight, ignore_index=ignore)
    assert expected_grad.isfinite().all()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("m", [0.0, 1e2, 1e4, 1e6, 1e8, 1e30, -1e6])
def test_large_logits(m: float, smoothing: float, dtype: torch.dtype, device: str) -> None:
    x = torch.tensor([m, m, m - 1, 0.0], dtype=dtype, device=device).view(1, 4, 1, 1)
    target = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    (loss, grad), (expected, expected_grad) = both(x, target, label_smoothing=smoothing)
    if smoothing == 0.0 and 1e2 <= m <= 1e6:
        assert abs(loss.item() - 0.861995) < 1e-6
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", suite.DEVICES)
def test_nan_reaches_the_gradient_of_a_pixel_without_weight(device: str) -> None:
    """As in torch: only an ignored pixel hides a NaN."""
    x = torch.randn(1, 2, 1, 2, device=device)
    x[0, 1, 0, 0] = float("nan")
    target = torch.tensor([[[0, 1]]], device=device)
    weight = torch.tensor([0.0, 1.0], device=device)
    (_, grad), (_, expected) = both(x, target, weight, reduction="sum")
    assert expected[..., 0].isnan().all()
    torch.testing.assert_close(grad, expected, equal_nan=True)


@pytest.mark.parametrize("device", ON_CUDA)
def test_labels_out_of_range_on_cuda(device: str) -> None:
    x = torch.randn(1, 3, 2, 2, device=device)
    target = torch.zeros(1, 5, 5, dtype=torch.int64, device=device)
    target[0, 2, 3] = 3
    loss = segkernels.upsample_cross_entropy(x, target, reduction="none")
    assert loss[0, 2, 3] == 0.0
    with pytest.raises(ValueError, match="target must be from 0 to"):
        segkernels.check()
    segkernels.check()


def test_ignored_pixel_hides_nan() -> None:
    x = torch.randn(1, 3, 1, 4)
    x[..., 3] = float("nan")
    x.requires_grad_()
    target = torch.tensor([[[0, 1, 2, -100]]])
    loss = segkernels.upsample_cross_entropy(x, target, mode="nearest")
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


def test_gradient_layout() -> None:
    target = torch.zeros(2, 8, 8, dtype=torch.int64)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 5, 4, 4).contiguous(memory_format=layout).requires_grad_()
        (grad,) = torch.autograd.grad(segkernels.upsample_cross_entropy(x, target), x)
        assert grad.is_contiguous(memory_format=layout)


def test_second_derivative_raises() -> None:
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    loss = segkernels.upsample_cross_entropy(x, torch.zeros(1, 4, 4, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("device", suite.DEVICES)
@pytest.mark.parametrize(("inputs", "outputs", "align"), [(1, 3500, False), (3, 4400, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_wide_outputs_store_the_upsampled_logits(
    inputs: int,
    outputs: int,
    align: bool,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1, 3, 2, inputs, device=device).to(dtype).requires_grad_()
    target = torch.randint(3, (1, 2, outputs), device=device)
    sizes = []
    fused = operator.loss

    def record(*args: Any) -> Any:
        sizes.append(args[-1].resampling.in_size)
        return fused(*args)

    monkeypatch.setattr(operator, "loss", record)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=dtype, device=device)
    options = {"mode": "bilinear", "align_corners": align}
    loss = segkernels.upsample_cross_entropy(x, target, weight, **options)
    expected = _torch_loss(x, target, {**options, "weight": weight.float()})
    compare_with_gradient(loss, expected, x)
    with raises_in_call("target must be from 0 to num_classes - 1"):
        segkernels.upsample_cross_entropy(x, target + 1, **options)
    x = torch.randn(1, 1, 2, inputs, device=device).to(dtype).requires_grad_()
    target = torch.rand(1, 1, 2, outputs, device=device)
    loss = segkernels.upsample_binary_cross_entropy(x, target, weight[1:2], **options)
    upsampled = F.interpolate(x.float(), (2, outputs), **options)
    expected = 2 * F.binary_cross_entropy_with_logits(upsampled, target)
    compare_with_gradient(loss, expected, x)
    assert set(sizes) == {(2, outputs)}


def compare_with_gradient(loss: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, x)[0])


@pytest.mark.gpu
def test_no_full_size_logits_on_cuda() -> None:
    x = torch.randn(8, 21, 65, 65, device="cuda", requires_grad=True)
    target = torch.randint(21, (8, 513, 513), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    segkernels.upsample_cross_entropy(x, target).backward()
    # Eager torch needs 531 MB.
    assert torch.cuda.max_memory_allocated() - before < 531e6 / 15


@pytest.mark.huge
@pytest.mark.gpu
def test_more_than_2_31_logits() -> None:
    x = torch.randn(1, 150, 64, 64, device="cuda", requires_grad=True)
    target = torch.randint(150, (1, 4000, 4000), device="cuda")
    assert 150 * target.numel() > 2**31
    loss = segkernels.upsample_cross_entropy(x, target)
    loss.backward()
    assert x.grad is not None
    # The gradients of a pixel sum to zero over the classes.
    assert x.grad.sum(1).abs().max() < 1e-6
    assert bool((x.grad[:, :, [0, -1]] != 0).all())
    part = segkernels.upsample_cross_entropy(x, target, reduction="none")
    assert part.double().mean().item() == pytest.approx(loss.item(), rel=1e-5)
    # The first rows read only the first row of logits, the last rows only the last.
    for row in (0, -1):
        alone = F.interpolate(x[:, :, row, None], (1, 4000), mode="bilinear")[:, :, 0]
        expected = F.cross_entropy(alone, target[:, row], reduction="none")
        torch.testing.assert_close(part[:, row], expected)


def test_interpolated_logits_equal_interpolates() -> None:
    """The loss and `interpolate` compute the same resampled logits."""
    x, target = torch.randn(1, 2, 5, 4), torch.zeros(1, 9, 30, dtype=torch.int64)
    r = _logits.resampling("test", x, (9, 30), "bilinear", False)
    losses = segkernels.upsample_cross_entropy(x, target, reduction="none")
    expected = F.cross_entropy(resample(x, r), target, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
