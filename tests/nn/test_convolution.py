"""DilatedConv2d, fold_batch_norm, conv_bn_act and ConvBNAct."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune

import segkernels
from segkernels.nn import convolution


@pytest.fixture(params=[False, True], ids=["", "folded"], autouse=True)
def folds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run each test also with the batch norm folding that is used on CUDA."""
    if request.param:
        monkeypatch.setattr(convolution, "FOLDED_ON", ("cpu", "cuda"))
    return bool(request.param)


def randomised(module: torch.nn.Module, seed: int = 0) -> Any:
    """`module` with random parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(noise + 0.5 if name.endswith("var") else noise - 0.3)
    return module


def plain(
    x: torch.Tensor, layer: segkernels.ConvBNAct, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer's modules called one by one."""
    out = layer.conv(x)
    out = out if layer.bn is None else layer.bn(out)
    out = out if residual is None else out + residual
    return F.relu(out) if layer.activation == "relu" else out


VARIANTS: dict[str, Callable[[], segkernels.ConvBNAct]] = {
    "dilated": lambda: segkernels.ConvBNAct(4, 6, 3, dilation=2),
    "strided": lambda: segkernels.ConvBNAct(4, 6, 3, stride=2, activation=None),
    "groups": lambda: segkernels.ConvBNAct(4, 6, (1, 3), groups=2),
    "even": lambda: segkernels.ConvBNAct(4, 6, 2, dilation=3),
    "bias": lambda: segkernels.ConvBNAct(4, 6, 1, bias=True),
    "no norm": lambda: segkernels.ConvBNAct(4, 6, 3, norm=False),
    "not affine": lambda: with_norm(torch.nn.BatchNorm2d(6, affine=False)),
    "no statistics": lambda: with_norm(torch.nn.BatchNorm2d(6, track_running_stats=False)),
    "momentum None": lambda: with_norm(torch.nn.BatchNorm2d(6, momentum=None)),
    "sync": lambda: with_norm(torch.nn.SyncBatchNorm(6)),
    "group norm": lambda: with_norm(torch.nn.GroupNorm(2, 6)),
    "instance norm": lambda: with_norm(torch.nn.InstanceNorm2d(6, affine=True)),
    "identity": lambda: with_norm(torch.nn.Identity()),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def with_norm(bn: Any) -> segkernels.ConvBNAct:
    layer = segkernels.ConvBNAct(4, 6, 3, bias=True)
    layer.bn = bn
    return layer


def built(variant: str, dtype: torch.dtype = torch.float64) -> segkernels.ConvBNAct:
    layer: segkernels.ConvBNAct = randomised(VARIANTS[variant]()).to(dtype)
    return layer


def image(dtype: torch.dtype = torch.float64, **kwargs: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 7, 9, generator=generator, dtype=torch.float64).to(dtype, **kwargs)


@variants
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_evaluation_equals_separate_modules(variant: str, with_residual: bool) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer, x = built(variant, dtype).eval(), image(dtype)
        residual = torch.randn_like(plain(x, layer)) if with_residual else None
        expected = plain(x, layer, residual)
        before = copy.deepcopy(layer.state_dict())
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                for _ in range(2):
                    out = layer(x, residual)
                torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("variant", "training"),
    # SyncBatchNorm supports training on CUDA only.
    [
        (v, training)
        for v in VARIANTS
        for training in (False, True)
        if not (training and v == "sync")
    ],
)
def test_backends_agree_in_outputs_gradients_and_statistics(variant: str, training: bool) -> None:
    layer = built(variant).train(training)
    other = copy.deepcopy(layer)
    other.backend = "torch"
    found = []
    for module in (layer, other):
        x = image().requires_grad_()
        residual = torch.ones_like(plain(x, copy.deepcopy(layer))).requires_grad_()
        out = module(x, residual)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        reached = [x, residual, *module.parameters()]
        grads = torch.autograd.grad(out, reached, weights)
        found.append([out, *grads, *module.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert list(layer.state_dict()) == list(other.state_dict())


def test_gradcheck_with_frozen_statistics() -> None:
    layer, x = built("bias").eval(), image()[:1, :, :3, :3].requires_grad_()
    leaves = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    names = [name for name, _ in layer.named_parameters()]

    def of(x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, params, strict=True)), x) + 0.0

    assert torch.autograd.gradcheck(of, leaves)


@pytest.mark.parametrize("variant", ["dilated", "no norm", "no statistics"])
@pytest.mark.slow
def test_compile_and_export(variant: str) -> None:
    torch.compiler.reset()
    layer, x = built(variant, torch.float32).eval(), image(torch.float32)
    residual = torch.randn_like(plain(x, layer))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (False, True):
        layer.train(training)
        expected = plain(x, copy.deepcopy(layer), residual)
        torch.testing.assert_close(compiled(x, residual), expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            expected = plain(x, copy.deepcopy(layer), residual)
            torch.testing.assert_close(compiled(x, residual), expected, rtol=0, atol=1e-5)
    layer.eval()
    with torch.no_grad():
        layer.conv.weight.mul_(2)
        if layer.bn is not None and layer.bn.running_mean is not None:
            layer.bn.running_mean.add_(1)
        torch.testing.assert_close(compiled(x), plain(x, layer), rtol=0, atol=1e-5)
        program = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(program(x), plain(x, layer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_layouts_and_autocast(training: bool) -> None:
    layer, x = built("dilated", torch.float32).train(training), image(torch.float32)
    residual = torch.randn(2, 6, 7, 9)
    expected = plain(x, copy.deepcopy(layer), residual)
    channels_last = x.to(memory_format=torch.channels_last)
    out = copy.deepcopy(layer)(channels_last, residual)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, residual.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=6e-2)


def test_hooks_parametrizations_and_other_norms_are_applied() -> None:
    x = image()
    hooked = built("dilated").eval()
    hooked.bn.register_forward_hook(lambda module, args, out: out + 1)
    pruned = built("dilated").eval()
    prune.l1_unstructured(pruned.conv, "weight", 0.5)
    normed = built("dilated").eval()
    parametrizations.weight_norm(normed.conv)
    grouped = built("dilated").eval()
    grouped.bn = randomised(torch.nn.GroupNorm(2, 6).double())
    for layer in (hooked, pruned, normed, grouped):
        torch.testing.assert_close(layer(x), plain(x, layer), rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_meta_device(training: bool) -> None:
    with torch.device("meta"):
        layer = segkernels.ConvBNAct(4, 6, 3, stride=2).train(training)
        assert layer(torch.zeros(2, 4, 7, 9)).shape == (2, 6, 4, 5)


def test_fold_batch_norm_gives_scale_and_shift() -> None:
    layer, x = built("bias").eval(), image()
    scale, shift = segkernels.fold_batch_norm(layer.conv, layer.bn)
    out = segkernels.dilated_conv2d(x, layer.conv.weight, scale=scale, shift=shift)
    torch.testing.assert_close(out, layer.bn(layer.conv(x)), rtol=0, atol=1e-12)
    assert segkernels.fold_batch_norm(layer.conv.half(), layer.bn.half())[0].dtype == torch.float32


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_dilated_conv2d_module_equals_torchs(padding_mode: Any) -> None:
    kwargs: dict[str, Any] = {"padding": 2, "dilation": 2, "padding_mode": padding_mode}
    ours = segkernels.DilatedConv2d(4, 6, 3, **kwargs)
    theirs = torch.nn.Conv2d(4, 6, 3, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    x = image(torch.float32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(x[0]), theirs(x[0]), rtol=0, atol=1e-5)
    assert repr(ours) == repr(theirs).replace("Conv2d", "DilatedConv2d", 1)
    plain_torch = segkernels.DilatedConv2d(4, 6, 3, **kwargs, backend="torch")
    plain_torch.load_state_dict(ours.state_dict())
    assert torch.equal(plain_torch(x), theirs(x))
    assert "backend='torch'" in repr(plain_torch)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: segkernels.ConvBNAct(2, 2, activation="gelu"), "ConvBNAct: activation.*'gelu'"),
        (lambda: segkernels.ConvBNAct(2, 2, backend="cudnn"), "ConvBNAct: backend.*'cudnn'"),
        (lambda: segkernels.DilatedConv2d(2, 2, 3, backend="x"), "DilatedConv2d: backend.*'x'"),
        (
            lambda: segkernels.ConvBNAct(4, 6).train()(image(torch.float32), torch.ones(6, 1, 1)),
            r"residual must have shape \[2, 6, 7, 9\], got \[6, 1, 1\]",
        ),
        (
            lambda: segkernels.ConvBNAct(4, 6).eval()(image(torch.float32), torch.ones(6, 1, 1)),
            r"residual must have shape \[2, 6, 7, 9\], got \[6, 1, 1\]",
        ),
        (
            lambda: segkernels.ConvBNAct(4, 6).train()(
                image(torch.float32), torch.ones(2, 6, 7, 9).half()
            ),
            "residual must be torch.float32, got torch.float16",
        ),
        (
            lambda: segkernels.fold_batch_norm(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(2)),
            "conv's 3 output channels, got num_features=2",
        ),
        (
            lambda: segkernels.fold_batch_norm(
                torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3, track_running_stats=False)
            ),
            "running statistics",
        ),
    ],
)
def test_invalid_values(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_other_dtypes_raise_torchs_error(dtype: torch.dtype) -> None:
    layer = segkernels.ConvBNAct(3, 4).eval()
    x = torch.ones(1, 3, 8, 8, dtype=dtype)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as theirs:
            layer.conv(x)
        with pytest.raises(RuntimeError) as ours:
            layer(x)
    assert str(ours.value) == str(theirs.value)


def test_invalid_types() -> None:
    with pytest.raises(TypeError, match="conv must be"):
        segkernels.fold_batch_norm(torch.nn.Linear(2, 2), torch.nn.BatchNorm2d(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bn must be"):
        segkernels.fold_batch_norm(torch.nn.Conv2d(2, 2, 1), torch.nn.GroupNorm(1, 2))  # type: ignore[arg-type]
