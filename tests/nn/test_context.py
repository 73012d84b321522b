"""The module ContextModule: initialisation, receptive field, both backends, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import segkernels
from segkernels import ContextModule


def with_random_weights(module: ContextModule) -> ContextModule:
    """`module` with normal random weights in place of the identity initialisation."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


@pytest.mark.parametrize(
    ("multiplier", "parameters"),
    [(1, 28_392), (ContextModule.LARGE, 6_803_139)],
    ids=["basic", "large"],
)
def test_number_of_parameters_in_table_1(multiplier: Any, parameters: int) -> None:
    with torch.device("meta"):
        module = ContextModule(21, multiplier=multiplier)
    # Without the front end, which has 134,346,581 parameters more.
    assert sum(p.numel() for p in module.parameters()) == parameters


@pytest.mark.parametrize("multiplier", [1, 2, (2, 2, 4, 8, 16, 32, 32, 1)])
def test_identity_initialisation(multiplier: Any) -> None:
    scores = torch.rand(1, 3, 9, 11)
    exact = ContextModule(3, multiplier=multiplier, noise=0.0)
    torch.testing.assert_close(exact(scores), scores, rtol=0, atol=1e-5)
    torch.manual_seed(0)
    noisy = ContextModule(3, multiplier=multiplier)
    assert torch.equal(noisy(scores), scores) == (multiplier == 1)
    torch.testing.assert_close(noisy(scores), scores, rtol=0, atol=0.3)


@pytest.mark.parametrize("padding", ["each", "once"])
def test_receptive_field_is_67_by_67(padding: Any) -> None:
    module = with_random_weights(ContextModule(2, padding=padding)).double()
    for parameter in module.parameters():
        parameter.detach().abs_()
    x = torch.rand(1, 2, 81, 83, dtype=torch.float64, requires_grad=True)
    out = module(x)
    assert out.shape == x.shape
    (grad,) = torch.autograd.grad(out[0, :, 40, 41].sum(), x)
    rows, columns = (
        (grad[0].abs().sum((0, 2)) > 0).nonzero(),
        (grad[0].abs().sum((0, 1)) > 0).nonzero(),
    )
    assert (rows.min().item(), rows.max().item()) == (40 - 33, 40 + 33)
    assert (columns.min().item(), columns.max().item()) == (41 - 33, 41 + 33)


def test_paddings_agree_away_from_the_border() -> None:
    each = with_random_weights(ContextModule(2)).double()
    once = ContextModule(2, padding="once").double()
    once.load_state_dict(each.state_dict())
    x = torch.randn(1, 2, 70, 71, dtype=torch.float64)
    torch.testing.assert_close(once(x)[..., 33:-33, 33:-33], each(x)[..., 33:-33, 33:-33])
    assert not torch.allclose(once(x), each(x))


@pytest.mark.parametrize("padding", ["each", "once"])
def test_backends_agree_in_outputs_and_gradients(padding: Any) -> None:
    ours = with_random_weights(ContextModule(3, multiplier=2, padding=padding)).double()
    theirs = ContextModule(3, multiplier=2, padding=padding, backend="torch").double()
    theirs.load_state_dict(ours.state_dict())
    found = []
    for module in (ours, theirs):
        x = torch.linspace(-1, 1, 2 * 3 * 7 * 9, dtype=torch.float64).view(2, 3, 7, 9)
        x = x.sin().mul(3).requires_grad_()
        out = module(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
def test_compile_export_layout_and_autocast() -> None:
    torch.compiler.reset()
    module, x = with_random_weights(ContextModule(3)), torch.randn(2, 3, 7, 9)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), expected)
    out = copy.deepcopy(module)(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x)
    assert low.dtype == torch.bfloat16
    assert (low - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"multiplier": (1, 2)}, r"multiplier must be one positive int, or eight.*got \(1, 2\)"),
        ({"multiplier": 0}, "multiplier.*got 0"),
        ({"padding": "same"}, "padding must be 'each' or 'once', got 'same'"),
        ({"backend": "cudnn"}, "backend must be.*got 'cudnn'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_invalid_arguments(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"ContextModule: {match}"):
        segkernels.ContextModule(**{"num_classes": 2, **kwargs})


@pytest.mark.gpu
def test_cuda_graph() -> None:
    module = with_random_weights(ContextModule(21)).cuda().to(torch.bfloat16)
    x = torch.randn(1, 21, 64, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = module(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
    graph.replay()
    assert torch.equal(out, expected)
