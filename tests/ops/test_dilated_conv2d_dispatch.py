"""Backend selection of dilated_conv2d: the rule of backend="auto", and results on a GPU."""

from __future__ import annotations

import sys
from typing import Any

import emulation
import pytest
import torch
import torch.nn.functional as F
from ops.suite import relative_error

import segkernels
from segkernels import _native
from segkernels.ops.dilated_conv2d import backends, dispatch, torch_path
from segkernels.ops.dilated_conv2d import native as sm90
from segkernels.ops.dilated_conv2d.call import Call, Epilogue
from segkernels.ops.dilated_conv2d.geometry import Geometry, Problem

KINDS = ("forward", "input_gradient", "weight_gradient")


def same(size: int, dilation: int, kernel: int = 3) -> Geometry:
    pad = dilation * (kernel - 1) // 2
    return Geometry(size, size, size, size, (kernel, kernel), (pad, pad), (dilation, dilation))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CUDA device with a mocked Hopper GPU (compute capability 9.0)."""

    class Module:
        has_sm90a = True

    monkeypatch.setattr(_native, "C", Module)
    monkeypatch.setattr(sm90, "_capability", lambda index: (9, 0))
    return torch.device("cuda", 0)


def test_without_triton_torch_computes_the_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    torch_path._fused_epilogue.cache_clear()
    try:
        assert torch_path._fused_epilogue() is None
        x, w = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
        assert torch.equal(segkernels.dilated_conv2d(x, w), F.conv2d(x, w))
    finally:
        torch_path._fused_epilogue.cache_clear()


def test_sm90_backend_rejects_cpu_tensors() -> None:
    x, w = torch.zeros(1, 8, 5, 5), torch.zeros(8, 8, 3, 3)
    with pytest.raises(ValueError, match=r"backend='sm90'.*must be on a CUDA device, got 'cpu'"):
        segkernels.dilated_conv2d(x, w, backend="sm90")
    with pytest.raises(ValueError, match=r"backend='sm90'.*must be on a CUDA device, got 'cpu'"):
        segkernels.aspp(x, [w, w], (1, 2), backend="sm90")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_chooses_hopper_from_some_rate_on(
    kind: str, dtype: torch.dtype, hopper: torch.device
) -> None:
    """The larger the rate, the more products cuDNN computes with padding."""
    problems = [
        Problem(8, 2048, 256, same(65, rate), (1, 1), 1, dtype, hopper) for rate in range(1, 64)
    ]
    chosen = [dispatch.choose(kind, problem) for problem in problems]
    if (kind, dtype) == ("weight_gradient", torch.float32):
        assert set(chosen) == {"torch"}
        return
    first = chosen.index("sm90")
    assert first > 0
    assert set(chosen[:first]) == {"torch"}
    assert set(chosen[first:]) == {"sm90"}


# Batch, channels, out channels, size, rate; the Hopper kernel's speed relative to cuDNN's, measured
# by benchmarks/cuda_grid.py on an H200: forward, input gradient, weight gradient.
MEASURED = [
    (8, 2048, 256, 65, 6, 1.02, 0.78, 0.96),
    (8, 2048, 256, 65, 10, 2.03, 0.82, 2.00),
    (8, 2048, 256, 65, 12, 2.03, 1.54, 2.03),
    (8, 512, 512, 65, 4, 0.86, 0.77, 1.02),
    (8, 512, 512, 65, 12, 1.87, 1.62, 1.73),
    (8, 256, 256, 65, 12, 1.46, 0.91, 1.93),
    (8, 512, 1024, 41, 12, 1.85, 1.55, 2.52),
    (8, 2048, 256, 33, 18, 3.21, 1.38, 3.10),
    (1, 2048, 256, 65, 12, 2.31, 0.92, 1.75),
    (8, 2048, 21, 65, 24, 1.49, 0.72, 1.31),
    (4, 1280, 256, 33, 12, 2.30, 0.88, 2.11),
    (8, 21, 21, 64, 8, 0.90, 0.67, 0.94),
]


@pytest.mark.parametrize("measured", MEASURED, ids=str)
def test_auto_chooses_the_faster_backend(measured: Any, hopper: torch.device) -> None:
    batch, channels, out_channels, size, rate, *ratios = measured
    problem = Problem(
        batch, channels, out_channels, same(size, rate), (1, 1), 1, torch.bfloat16, hopper
    )
    for kind, ratio in zip(KINDS, ratios, strict=True):
        if not 0.95 <= ratio <= 1.1:
            assert dispatch.choose(kind, problem) == ("sm90" if ratio > 1 else "torch"), kind


def test_auto_sums_the_branches_of_a_launch(hopper: torch.device) -> None:
    near, *far = [
        Problem(8, 2048, 256, same(33, rate), (1, 1), 1, torch.bfloat16, hopper)
        for rate in (6, 12, 18)
    ]
    assert dispatch.choose("forward", near) == "torch"
    assert dispatch.choose("forward", near, *far) == "sm90"
    assert dispatch.choose("forward", near, *far, near._replace(channels=21)) == "torch"
    assert dispatch.choose("forward") == "torch"


CHANGES: list[dict[str, Any]] = [
    {"dtype": torch.float64},
    {"out_channels": 8},
    {"channels": 2044},
    {"channels": 32},
    {"batch": 1, "geometry": same(9, 4)},
    {"stride": (2, 2)},
    {"groups": 2},
    {"device": torch.device("cpu")},
    {"geometry": same(65, 1)},
    {"geometry": same(65, 24, kernel=1)},
    {"geometry": same(65, 24, kernel=9)},
]
# Only the channels that are summed over must be many.
MAY_BE_NARROW = {("forward", "out_channels"), ("input_gradient", "channels")}


@pytest.mark.parametrize(
    ("kind", "change"),
    [(k, c) for k in KINDS for c in CHANGES if (k, next(iter(c))) not in MAY_BE_NARROW],
    ids=str,
)
def test_auto_chooses_torch_for_other_problems(
    kind: str, change: dict[str, Any], hopper: torch.device
) -> None:
    good = Problem(8, 2048, 256, same(65, 24), (1, 1), 1, torch.bfloat16, hopper)
    assert dispatch.choose(kind, good) == "sm90"
    assert dispatch.choose(kind, good._replace(**change)) == "torch"


def test_auto_chooses_torch_on_other_devices(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Problem(8, 2048, 256, same(65, 24), (1, 1), 1, torch.bfloat16, hopper)
    monkeypatch.setattr(sm90, "_capability", lambda index: (8, 0))
    assert dispatch.choose("forward", good) == "torch"


def test_auto_chooses_torch_for_contiguous_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy to channels_last would cost as much as the faster kernel gains."""

    class OnCuda:
        is_cuda = True

    c = Call((1, 1), (2, 2), (2, 2), 1, (9, 9), True, "auto")
    x: Any = OnCuda()
    assert not backends._use_torch(x, c)
    assert backends._use_torch(x, c._replace(channels_last=False))
    assert not backends._use_torch(x, c._replace(channels_last=False, backend="sm90"))


@pytest.mark.emulated
@pytest.mark.parametrize("chosen", [(), ("forward",), ("input_gradient",), ("weight_gradient",)])
def test_each_kernel_follows_the_rule(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_use_torch", lambda x, c: False)
    monkeypatch.setattr(
        dispatch, "choose", lambda kind, *problems: "sm90" if kind in chosen else "torch"
    )
    ran: list[str] = []

    def noted(kind: str) -> Any:
        run = getattr(sm90, kind)
        return lambda *args: ran.append(kind) or run(*args)

    for kind in ("input_gradient", "weight_gradient", "forward"):
        monkeypatch.setattr(sm90, kind, noted(kind))
    x, w = torch.randn(2, 16, 9, 9).half(), torch.randn(24, 16, 3, 3).half() / 12
    grad = torch.randn(2, 24, 9, 9).half()
    c = Call((1, 1), (2, 2), (2, 2), 1, (9, 9), False, "auto")
    found = [
        backends.forward(x, w, Epilogue(), c),
        *backends.gradients(grad, x, w, (True, True), c),
    ]
    # The input gradient calls the forward kernel.
    assert ran == [*chosen, *(["forward"] if chosen == ("input_gradient",) else [])]
    leaves = [t.double().requires_grad_() for t in (x, w)]
    out = F.conv2d(*leaves, None, 1, 2, 2)
    exact = [out, *torch.autograd.grad(out, leaves, grad.double())]
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.stride() == wanted.stride()
        assert relative_error(ours, wanted.detach()) <= 6e-4
    for mask in ((True, False), (False, True), (False, False)):
        for ours, wanted, asked in zip(
            backends.gradients(grad, x, w, mask, c), found[1:], mask, strict=True
        ):
            assert torch.equal(ours, wanted) if asked else ours is None


@pytest.mark.emulated
def test_first_call_during_capture_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule cannot be copied to the device while a graph is captured."""
    monkeypatch.setattr(backends, "_use_torch", lambda x, c: False)
    monkeypatch.setattr(dispatch, "choose", lambda kind, *problems: "sm90")
    x, w = torch.randn(2, 16, 9, 9).half(), torch.randn(24, 16, 3, 3).half() / 12
    grad = torch.randn(2, 24, 9, 9).half()
    c = Call((1, 1), (2, 2), (2, 2), 1, (9, 9), True, "auto")
    with emulation.capture():
        out = backends.forward(x, w, Epilogue(), c)
        into = torch.zeros_like(out)
        assert not backends.forward_into(into, x, [w], Epilogue(), [c])
        found = backends.gradients(grad, x, w, (True, True), c)
        with pytest.raises(RuntimeError, match="Call it once before capturing"):
            backends.forward(x, w, Epilogue(), c._replace(backend="sm90"))
    assert torch.equal(out, torch_path.forward(x, w, Epilogue(), c))
    assert bool((into == 0).all())
    for a, b in zip(found, torch_path.gradients(grad, x, w, c, (True, True)), strict=True):
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
ACCURACY = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


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
    limit = ACCURACY.get(dtype)
    if limit is None:
        # cuDNN may use TF32.
        limit = max(1e-3, 1.1 * relative_error(F.conv2d(x, w, None, 1, d, d), exact))
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
        assert relative_error(ours, wanted) <= limit
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
