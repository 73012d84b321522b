"""Which backend dilated_conv2d takes: the rule of "auto", and what it does on a GPU."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import segkernels
from segkernels import _native
from segkernels.ops.dilated_conv2d import backends, dispatch, sm90, torch_path
from segkernels.ops.dilated_conv2d.call import Call, Epilogue
from segkernels.ops.dilated_conv2d.geometry import Geometry, Problem

KINDS = ("forward", "input_gradient", "weight_gradient")


def same(size: int, dilation: int, kernel: int = 3) -> Geometry:
    pad = dilation * (kernel - 1) // 2
    return Geometry(size, size, size, size, (kernel, kernel), (pad, pad), (dilation, dilation))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    class Module:
        has_sm90a = True

    monkeypatch.setattr(_native, "C", Module)
    monkeypatch.setattr(sm90, "_capability", lambda index: (9, 0))
    return torch.device("cuda", 0)


def test_without_triton_the_epilogue_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    torch_path._fused_epilogue.cache_clear()
    try:
        assert torch_path._fused_epilogue() is None
        x, w = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
        assert torch.equal(segkernels.dilated_conv2d(x, w), F.conv2d(x, w))
    finally:
        torch_path._fused_epilogue.cache_clear()


def test_the_cpu_is_refused_where_hopper_is_asked_for() -> None:
    x, w = torch.zeros(1, 8, 5, 5), torch.zeros(8, 8, 3, 3)
    with pytest.raises(ValueError, match=r"backend='sm90'.*needs a CUDA device, got 'cpu'"):
        segkernels.dilated_conv2d(x, w, backend="sm90")
    with pytest.raises(ValueError, match=r"backend='sm90'.*needs a CUDA device, got 'cpu'"):
        segkernels.aspp(x, [w, w], (1, 2), backend="sm90")


@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_hopper_from_some_rate_on(kind: str, hopper: torch.device) -> None:
    """The larger the rate, the more of cuDNN's products are with padding."""
    chosen = []
    for rate in range(1, 64):
        problem = Problem(8, 2048, 256, same(65, rate), (1, 1), 1, torch.bfloat16, hopper)
        chosen.append(dispatch.choose(kind, problem))
        half = problem._replace(dtype=torch.float16)
        assert dispatch.choose(kind, half) == chosen[-1]
    first = chosen.index("sm90")
    assert first > 0
    assert set(chosen[:first]) == {"torch"}
    assert set(chosen[first:]) == {"sm90"}


def test_auto_takes_branches_that_all_suit(hopper: torch.device) -> None:
    alone = [
        Problem(8, 2048, 256, same(65, rate), (1, 1), 1, torch.bfloat16, hopper)
        for rate in (12, 24, 36)
    ]
    assert dispatch.choose("forward", *alone) == "sm90"
    assert dispatch.choose("forward", *alone, alone[0]._replace(out_channels=21)) == "torch"
    assert dispatch.choose("forward") == "torch"


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float32},
        {"out_channels": 21},
        {"channels": 2044},
        {"channels": 64},
        {"stride": (2, 2)},
        {"groups": 2},
        {"device": torch.device("cpu")},
        {"geometry": same(65, 1)},
        {"geometry": same(65, 24, kernel=1)},
        {"geometry": same(65, 24, kernel=9)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_leaves_the_rest_to_torch(
    kind: str, change: dict[str, Any], hopper: torch.device
) -> None:
    good = Problem(8, 2048, 256, same(65, 24), (1, 1), 1, torch.bfloat16, hopper)
    assert dispatch.choose(kind, good) == "sm90"
    assert dispatch.choose(kind, good._replace(**change)) == "torch"


def test_auto_leaves_other_devices_to_torch(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Problem(8, 2048, 256, same(65, 24), (1, 1), 1, torch.bfloat16, hopper)
    monkeypatch.setattr(sm90, "_capability", lambda index: (8, 0))
    assert dispatch.choose("forward", good) == "torch"


@pytest.mark.parametrize("chosen", [(), ("forward",), ("input_gradient",), ("weight_gradient",)])
def test_each_part_goes_where_the_rule_says(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Hopper, through the emulation."""
    monkeypatch.setattr(backends, "_is_torchs", lambda x, c: False)
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
    # The gradient of the input is a forward again.
    assert ran == [*chosen, *(["forward"] if chosen == ("input_gradient",) else [])]
    leaves = [t.double().requires_grad_() for t in (x, w)]
    out = F.conv2d(*leaves, None, 1, 2, 2)
    exact = [out, *torch.autograd.grad(out, leaves, grad.double())]
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.stride() == wanted.stride()
        assert distance(ours, wanted.detach()) <= 6e-4
    for mask in ((True, False), (False, True), (False, False)):
        for ours, wanted, asked in zip(
            backends.gradients(grad, x, w, mask, c), found[1:], mask, strict=True
        ):
            assert torch.equal(ours, wanted) if asked else ours.numel() == 0


def test_a_first_call_in_a_graph_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper, through the emulation: its schedule could not be copied to the device."""
    monkeypatch.setattr(sm90, "_tables", OrderedDict())
    monkeypatch.setattr(sm90, "supported", lambda problem: "")
    monkeypatch.setattr(backends, "_is_torchs", lambda x, c: False)
    monkeypatch.setattr(dispatch, "choose", lambda kind, *problems: "sm90")
    monkeypatch.setattr(_native, "capturing", lambda device: True)
    x, w = torch.randn(2, 16, 9, 9).half(), torch.randn(24, 16, 3, 3).half() / 12
    grad = torch.randn(2, 24, 9, 9).half()
    c = Call((1, 1), (2, 2), (2, 2), 1, (9, 9), True, "auto")
    out = backends.forward(x, w, Epilogue(), c)
    assert torch.equal(out, torch_path.forward(x, w, Epilogue(), c))
    into = torch.zeros_like(out)
    assert not backends.forward_into(into, x, [w], Epilogue(), [c])
    assert bool((into == 0).all())
    theirs = torch_path.gradients(grad, x, w, c, (True, True))
    for a, b in zip(backends.gradients(grad, x, w, (True, True), c), theirs, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="Call it once before capturing"):
        backends.forward(x, w, Epilogue(), c._replace(backend="sm90"))


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


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.compiles
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_on_a_gpu_against_float64_and_the_same_bits(
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
        # cuDNN may multiply as tf32.
        limit = max(1e-3, 1.1 * distance(F.conv2d(x, w, None, 1, d, d), exact))
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
        assert distance(ours, wanted) <= limit
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
