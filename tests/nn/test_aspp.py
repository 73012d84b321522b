"""The module ASPP: torchvision's state dict, both backends, compilation, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import segkernels


def layers(in_channels: int, out_channels: int, rates: tuple[int, ...]) -> nn.ModuleDict:
    """DeepLab v3's ASPP as in torchvision, which need not be installed."""

    def conv(given: int, kernel: int, rate: int = 1) -> list[nn.Module]:
        pad = rate if kernel == 3 else 0
        plain = nn.Conv2d(given, out_channels, kernel, padding=pad, dilation=rate, bias=False)
        return [plain, nn.BatchNorm2d(out_channels), nn.ReLU()]

    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv(in_channels, 1))
    branches = [conv(in_channels, 1), *(conv(in_channels, 3, rate) for rate in rates)]
    joined = conv((len(rates) + 2) * out_channels, 1)
    return nn.ModuleDict(
        {
            "convs": nn.ModuleList([*(nn.Sequential(*branch) for branch in branches), pooling]),
            "project": nn.Sequential(*joined, nn.Dropout(0.5)),
        }
    )


def run(model: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    each: list[torch.Tensor] = [conv(x) for conv in model["convs"]]  # type: ignore[union-attr, operator]
    each[-1] = nn.functional.interpolate(each[-1], size=x.shape[2:], mode="bilinear")
    out: torch.Tensor = model["project"](torch.cat(each, dim=1))
    return out


def randomised(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(noise + 0.5 if name.endswith("var") else noise - 0.4)
    return module


def built(form: Any = "v3", dtype: torch.dtype = torch.float64, **kwargs: Any) -> segkernels.ASPP:
    rates = (2, 4, 9) if form == "v3" else (1, 3, 6, 20)
    module = segkernels.ASPP(5, 4, rates, form=form, dropout=0.0, **kwargs)
    made: segkernels.ASPP = randomised(module).to(dtype)
    return made


def image(dtype: torch.dtype = torch.float64, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 5, 7, 11, generator=generator, dtype=torch.float64).to(dtype)


def test_loads_torchvisions_state_dict() -> None:
    theirs = randomised(layers(5, 4, (2, 4, 9))).double().eval()
    ours = segkernels.ASPP(5, 4, (2, 4, 9)).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for batch in (1, 2):
        x = image(batch=batch)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(ours(x), run(theirs, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["v3", "v2"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_backends_agree_in_outputs_gradients_and_statistics(form: Any, training: bool) -> None:
    ours = built(form).train(training)
    theirs = built(form, backend="torch").train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    found = []
    for module in (ours, theirs):
        x = image().requires_grad_()
        out = module(x)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad(out, [x, *module.parameters()], weights)
        found.append([out, *grads, *module.buffers()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_norms_in_mixed_training_modes() -> None:
    module = built().train()
    module.convs[1][1].eval()
    module.convs[-1][2].eval()
    other = copy.deepcopy(module)
    other.backend = "torch"
    x = image(batch=1)
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-11)


def test_all_branches_use_one_aspp_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from segkernels.nn import aspp as module_of

    calls = []
    monkeypatch.setattr(
        module_of, "aspp", lambda *a, **k: (calls.append(1), segkernels.aspp(*a, **k))[1]
    )
    for form in ("v3", "v2"):
        built(form).eval()(image())
    built("v2").train()(image())
    assert len(calls) == 3


@pytest.mark.parametrize("form", ["v3", "v2"])
@pytest.mark.slow
def test_compile_export_layout_and_autocast(form: Any) -> None:
    torch.compiler.reset()
    module, x = built(form, torch.float32).eval(), image(torch.float32)
    with torch.no_grad():
        expected = module(x)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-4)
        program = torch.export.export(module, (x,)).module()
        torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-4)
        out = module(x.to(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            low = module(x)
    assert low.dtype == torch.bfloat16
    assert (low - expected).norm() < 0.02 * expected.norm()
    module.train()
    theirs = copy.deepcopy(module)
    theirs.backend = "torch"
    x.requires_grad_()
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (compiled, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_default_dropout_equals_torchvisions() -> None:
    module = segkernels.ASPP(5, 4, (2, 4)).train()
    assert module.project[3].p == 0.5
    assert (module(image(torch.float32)) == 0).float().mean() > 0.3


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_training_on_one_image_raises(backend: Any) -> None:
    module = built(backend=backend).train()
    with pytest.raises(ValueError, match="ASPP: training needs a batch of at least 2"):
        module(image(batch=1))
    module.convs[-1][2].eval()
    assert module(image(batch=1)).shape == (1, 4, 7, 11)
    assert built("v2", backend=backend).train()(image(batch=1)).shape == (1, 4, 7, 11)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"form": "v4"}, "form must be one of 'v2', 'v3', got 'v4'"),
        ({"atrous_rates": ()}, r"atrous_rates must be.*got \[\]"),
        ({"atrous_rates": (6, 0)}, r"atrous_rates must be.*got \[6, 0\]"),
        ({"backend": "cudnn"}, "backend must be.*got 'cudnn'"),
    ],
)
def test_invalid_arguments(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"ASPP: {match}"):
        segkernels.ASPP(5, 4, **{"atrous_rates": (2,), **kwargs})
