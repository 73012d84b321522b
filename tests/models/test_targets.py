"""Models called with a target, and models of one class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.cases import CASES, Case, as_if_trained, outputs

from segkernels import DenseCRF, models

every = pytest.mark.parametrize("case", CASES, ids=str)
backends = pytest.mark.parametrize("backend", ["segkernels", "torch"])


def one_class(case: Case, backend: str, **more: Any) -> models.SegmentationModel:
    return as_if_trained(case.build(backend, num_classes=1, **more)).eval()


def mask_for(scores: torch.Tensor, ignore_index: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(2, (len(scores), *scores.shape[2:]), generator=generator)
    if ignore_index is not None:
        target[:, :3] = ignore_index
    return target


def binary(
    scores: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """The mean of torch's binary loss over the pixels that count, weighted by label."""
    counts = target != ignore_index
    losses = F.binary_cross_entropy_with_logits(
        scores[:, 0], target.clamp(0, 1).to(scores.dtype), reduction="none"
    )
    factor = weight[target.clamp(0, 1)] * counts
    return (losses * factor).sum() / factor.sum()


@every
@backends
def test_one_class_is_binary(case: Case, backend: str) -> None:
    model, images = one_class(case, backend), case.images()
    out = outputs(model(images))
    target, equal = mask_for(out["out"], 255), torch.ones(2)

    def expected(weight: torch.Tensor) -> torch.Tensor:
        factors = {"out": 1.0, "aux": model.aux_weight}
        return sum(
            factors[key] * binary(scores, target, weight, 255) for key, scores in out.items()
        )

    loss = model(images, target=target, ignore_index=255)
    torch.testing.assert_close(loss, expected(equal), rtol=1e-5, atol=1e-6)
    named = list(model.parameters())
    found = torch.autograd.grad(loss, named, allow_unused=True)
    wanted = torch.autograd.grad(expected(equal), named, allow_unused=True)
    scale = max(float(g.abs().max()) for g in wanted if g is not None)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * scale)
    weight = torch.tensor([0.5, 3.0])
    weighted = model.loss(images, target, weight=weight, ignore_index=255)
    torch.testing.assert_close(weighted, expected(weight), rtol=1e-5, atol=1e-6)
    labels = model.predict(images)
    assert labels.dtype == torch.int64
    clear = out["out"][:, 0].abs() > 1e-4
    assert clear.double().mean() > 0.9
    assert torch.equal(labels[clear], (out["out"][:, 0] > 0).long()[clear])
    zeros = model.loss(images, torch.zeros_like(target))
    assert zeros.item() > 0.01


@backends
def test_one_class_with_smoothing_and_every_dtype(backend: str) -> None:
    case = next(c for c in CASES if c.name == "deeplab_v3_resnet50")
    model, images = one_class(case, backend, aux_loss=False), case.images()
    scores = model(images)
    target = mask_for(scores)
    # torch's label smoothing for two classes: each label keeps s / 2.
    soft = target.to(scores.dtype) * 0.8 + 0.1
    expected = F.binary_cross_entropy_with_logits(scores[:, 0], soft)
    loss = model(images, target=target, label_smoothing=0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    plain = model.loss(images, target)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.bool):
        assert torch.equal(model.loss(images, target.to(dtype)), plain)
    target[0, 0, 0] = 2
    with pytest.raises((ValueError, IndexError), match=r"got 2 at|Target 2 is out of bounds"):
        model.loss(images, target)
    for weight in (torch.ones(1), torch.ones(3)):
        with pytest.raises((ValueError, RuntimeError), match="weight"):
            model.loss(images, target.clamp(max=1), weight=weight)


def test_zero_is_background() -> None:
    model = models.fcn32s(1, width=1 / 16).eval()  # score layers start at zero
    labels = model.predict(torch.rand(1, 3, 32, 32))
    assert labels.shape == (1, 32, 32)
    assert not labels.any()


@backends
@pytest.mark.parametrize("name", ["deeplab_v1", "deeplab_v2_vgg16"])
@pytest.mark.parametrize("classes", [1, 2])
def test_one_class_with_a_crf(name: str, backend: str, classes: int) -> None:
    crf = DenseCRF(classes, iterations=3, srgb=0.5)
    model = as_if_trained(
        models.create_model(name, 1, crf=crf, train_crf=True, width=1 / 16, backend=backend)
    ).eval()
    images = torch.rand(2, 3, 33, 41)
    refined = model(images)
    model.crf = None
    scores = model(images)
    model.crf = crf
    both = torch.cat([torch.zeros_like(scores), scores], dim=1)
    log_probs = crf(images, logits=both, log=True)
    expected = log_probs[:, 1:] - log_probs[:, :1]
    assert not torch.allclose(expected, scores, atol=0.1)
    torch.testing.assert_close(refined, expected)
    assert torch.equal(model.predict(images), log_probs.argmax(1))
    target = mask_for(refined)
    loss = model(images, target=target)
    torch.testing.assert_close(loss, F.cross_entropy(log_probs, target), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, crf.compat_bilateral)
    assert grad.any()
    with pytest.raises(ValueError, match="must be a DenseCRF of 1 or 2 classes, got 3 classes"):
        models.create_model(name, 1, crf=DenseCRF(3))


@every
def test_a_target_gives_the_loss(case: Case) -> None:
    model, images = as_if_trained(case.build()).eval(), case.images()
    out = outputs(model(images))
    target = torch.randint(4, (2, *out["out"].shape[2:]), dtype=torch.uint8)
    target[:, :2] = 255
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    options = {"weight": weight, "ignore_index": 255, "label_smoothing": 0.1}
    loss = model(images, target=target, **options)
    expected = sum(
        (1.0 if key == "out" else model.aux_weight)
        * F.cross_entropy(scores, target.long(), **options)
        for key, scores in out.items()
    )
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(loss, model.loss(images, target, **options))


@pytest.mark.slow
@backends
def test_a_target_compiles_and_runs_hooks(backend: str) -> None:
    case = next(c for c in CASES if c.name == "deeplab_v3_resnet50")
    model, images = as_if_trained(case.build(backend)).eval(), case.images()
    target = torch.randint(4, (2, *case.size))
    expected = model(images, target=target)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, target=target), expected)
    seen = []
    with model.register_forward_hook(lambda *args: seen.append(args[-1])):
        assert torch.equal(model.loss(images, target), seen[0])


@backends
@pytest.mark.parametrize("train_crf", [False, True])
def test_bad_targets_are_refused(backend: str, train_crf: bool) -> None:
    crf = DenseCRF(4, iterations=1, srgb=0.5)
    model = models.deeplab_v1(4, width=1 / 16, crf=crf, train_crf=train_crf, backend=backend)
    images = torch.rand(2, 3, 33, 41)
    for shape in [(2, 33, 40), (2, 9, 9)]:
        with pytest.raises(ValueError, match=r"deeplab_v1: target must be \[2, 33, 41\], got"):
            model(images, target=torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"image must be \[N, any, H, W\], got .*target="):
        model(images, torch.zeros(2, 33, 41, dtype=torch.int64))
    ran = []
    model.vgg.register_forward_hook(lambda *_: ran.append(1))
    for shape in [(1, 33, 41), (2, 1, 33, 41), (33, 41)]:
        with pytest.raises(ValueError, match=r"deeplab_v1: target must be \[2, H, W\], got"):
            model.loss(images, torch.zeros(shape, dtype=torch.int64))
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=rf"deeplab_v1: target must hold labels.*got {dtype}"):
            model(images, target=torch.zeros(2, 33, 41, dtype=dtype))
    assert ran == []
