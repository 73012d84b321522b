"""The module DenseCRF: parameters and state, equality with dense_crf, training."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from segkernels import DenseCRF, PairwiseTerm, dense_crf, models

SIGMAS = ("sxy_gaussian", "sxy_bilateral", "srgb")


def batch(device: torch.device, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and logits."""
    img = torch.randint(0, 256, (2, 3, 9, 11), dtype=torch.uint8)
    return img.to(device), torch.randn(2, classes, 9, 11).to(device)


# --- parameters and state ---


@pytest.mark.parametrize(
    ("compat", "shape"),
    [
        (3, ()),
        (-2.5, ()),
        (np.float32(3), ()),
        (torch.tensor(3.0), ()),
        ([1, 2, 3, 4], (4,)),
        (np.arange(4), (4,)),
        (torch.zeros(4, dtype=torch.float64), (4,)),
        (torch.eye(4).tolist(), (4, 4)),
        (-np.eye(4), (4, 4)),
    ],
)
def test_initial_compatibility_gives_the_parameters_shape(compat, shape):
    crf = DenseCRF(4, compat_gaussian=compat, compat_bilateral=compat)
    parameters = dict(crf.named_parameters())
    assert sorted(parameters) == ["compat_bilateral", "compat_gaussian"]
    for parameter in parameters.values():
        assert tuple(parameter.shape) == shape
        assert parameter.dtype == torch.float32
        assert parameter.is_leaf
        want = torch.as_tensor(np.asarray(compat), dtype=torch.float32)
        assert torch.equal(parameter.detach(), want)


def test_initial_values_are_copied():
    compat = torch.zeros(4)
    crf = DenseCRF(4, compat_gaussian=compat, compat_bilateral=compat)
    with torch.no_grad():
        crf.compat_gaussian += 1
    assert torch.equal(compat, torch.zeros(4))
    assert torch.equal(crf.compat_bilateral.detach(), compat)


def test_parameter_names_and_shapes():
    assert len(list(DenseCRF(4, learn_compat=False).parameters())) == 0
    assert len(list(DenseCRF(4, compat_gaussian=None).parameters())) == 1
    crf = DenseCRF(4, learn_sigmas=True, sxy_gaussian=(3, 4), srgb=(13, 10, 7))
    shapes = {name: tuple(p.shape) for name, p in crf.named_parameters()}
    assert shapes == {
        "compat_gaussian": (),
        "compat_bilateral": (),
        "sxy_gaussian_log_scale": (2,),
        "sxy_bilateral_log_scale": (1,),
        "srgb_log_scale": (3,),
    }


def test_initial_sigmas_and_their_positivity():
    for learn in (False, True):
        crf = DenseCRF(4, sxy_gaussian=(3, 4), srgb=np.float32(7), learn_sigmas=learn)
        assert crf.sigma("sxy_gaussian").tolist() == [3, 4]
        assert crf.sigma("sxy_bilateral").tolist() == [80]
        assert crf.sigma("srgb").tolist() == [7]
        assert crf.sigma("srgb").requires_grad == learn
    with torch.no_grad():
        crf.srgb_log_scale.fill_(-20)
    assert 0 < crf.sigma("srgb").item() < 1e-6


STARTS = [
    {},
    {"compat_gaussian": [1, 2, 3, 4], "compat_bilateral": torch.eye(4)},
    {"compat_gaussian": None, "learn_compat": False},
    {"learn_sigmas": True, "sxy_gaussian": (3, 4), "srgb": (13, 10, 7)},
]


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_state_round_trip(start, device):
    crf = DenseCRF(4, iterations=3, **start).to(device)
    with torch.no_grad():
        for tensor in crf.state_dict().values():
            tensor.add_(0.25 * torch.rand_like(tensor))
    img, logits = batch(device)
    want = crf(img, logits=logits)
    file = io.BytesIO()
    torch.save(crf.state_dict(), file)
    file.seek(0)
    other = DenseCRF(4, iterations=3, **start).to(device)
    assert not torch.equal(other(img, logits=logits), want)
    result = other.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(img, logits=logits), want)
    for copied in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert torch.equal(copied(img, logits=logits), want)


def test_state_of_another_shape_raises():
    state = DenseCRF(4, compat_gaussian=[1, 2, 3, 4]).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for compat_gaussian"):
        DenseCRF(4).load_state_dict(state)


def test_default_device_is_used():
    arguments = {"compat_gaussian": [1, 2, 3, 4], "learn_sigmas": True}
    with torch.device("meta"):
        crf = DenseCRF(4, **arguments)
    assert all(t.device.type == "meta" for t in crf.state_dict().values())
    crf.to_empty(device="cpu").load_state_dict(DenseCRF(4, **arguments).state_dict())
    img, logits = batch(torch.device("cpu"))
    want = dense_crf(img, logits=logits, compat_gaussian=[1, 2, 3, 4])
    assert torch.equal(crf(img, logits=logits), want)


def test_repr():
    text = repr(DenseCRF(4, iterations=7, normalization="after"))
    assert text == "DenseCRF(4, iterations=7, normalization='after')"


# --- equality with dense_crf ---


@pytest.mark.parametrize(
    "start",
    [
        *STARTS,
        {"normalization": "after", "iterations": 2},
        {"sxy_gaussian": (1, 2), "sxy_bilateral": (30, 40), "srgb": (20, 30, 40)},
        {"compat_gaussian": None, "compat_bilateral": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["probs", "logits", "unary"])
def test_initial_module_equals_dense_crf(start, kind, device):
    img, logits = batch(device)
    scores = {"probs": logits.softmax(1), "logits": logits, "unary": -logits}[kind]
    crf = DenseCRF(4, **start).to(device)
    same = {k: v for k, v in start.items() if not k.startswith("learn")}
    for name in ("compat_gaussian", "compat_bilateral"):
        if isinstance(same.get(name), torch.Tensor):
            same[name] = same[name].to(device)
    for log in (False, True):
        got = crf(img, **{kind: scores}, log=log)
        assert torch.equal(got, dense_crf(img, **{kind: scores}, log=log, **same))


def test_call_arguments(device):
    img, logits = batch(device)
    crf = DenseCRF(4).to(device)
    probs = logits.softmax(1)
    assert torch.equal(crf(img, probs), crf(img, probs=probs))
    assert torch.equal(crf(img[0], probs[0]), crf(img, probs)[0])
    assert torch.equal(crf(img, probs, max_vertices=10**6), crf(img, probs))
    term = PairwiseTerm(torch.randn(2, 2, 9, 11, device=device), 5.0)
    want = dense_crf(img, probs, pairwise=[term])
    assert torch.equal(crf(img, probs, pairwise=[term]), want)
    assert not torch.equal(crf(img, probs), want)
    without_image = DenseCRF(4, compat_bilateral=None).to(device)
    assert torch.equal(without_image(None, probs), dense_crf(None, probs, compat_bilateral=None))


def test_volumes(device):
    img, probs = torch.rand(1, 1, 4, 5, 6, device=device), torch.rand(1, 3, 4, 5, 6, device=device)
    crf = DenseCRF(3, sxy_gaussian=(1, 2, 3), srgb=0.1).to(device)
    want = dense_crf(img, probs, sxy_gaussian=(1, 2, 3), srgb=0.1)
    assert torch.equal(crf(img, probs), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_module_in_another_dtype(dtype, device):
    img, logits = batch(device)
    crf = DenseCRF(4, learn_sigmas=True).to(device, dtype)
    logits = logits.to(dtype)
    out = crf(img, logits=logits)
    assert out.dtype == dtype
    assert torch.equal(out, dense_crf(img, logits=logits))
    out.square().sum().backward()
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in crf.parameters())


# --- gradients ---


@pytest.mark.parametrize("compat", [3.0, [1.0, 2, 3], [[0.0, 1, 2], [1, 0, 3], [2, 3, 0]]])
def test_gradcheck_of_parameters(compat, device):
    img = 255 * torch.rand(1, 2, 3, 4, dtype=torch.float64, device=device)
    logits = torch.randn(1, 3, 3, 4, dtype=torch.float64, device=device)
    crf = DenseCRF(
        3,
        iterations=2,
        compat_gaussian=compat,
        compat_bilateral=compat,
        sxy_gaussian=(2.3, 3.1),
        sxy_bilateral=(21, 33),
        srgb=(60, 90),
        learn_sigmas=True,
    ).to(device, torch.float64)
    names = [name for name, _ in crf.named_parameters()]

    def call(*values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(crf, state, (img,), {"logits": logits})

    leaves = [p.detach().clone().requires_grad_() for p in crf.parameters()]
    assert torch.autograd.gradcheck(call, leaves, eps=1e-7, atol=1e-6)
    grads = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    assert all(float(g.abs().max()) > 1e-9 for g in grads)


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.compiles])],
)
def test_compiles_to_one_graph(backend, device):
    torch.compiler.reset()
    img, logits = batch(device)
    crf = DenseCRF(4, iterations=3, compat_bilateral=torch.eye(4), learn_sigmas=True).to(device)
    compiled = torch.compile(crf, fullgraph=True, backend=backend)
    results = []
    for module in (crf, compiled):
        leaf = logits.clone().requires_grad_()
        loss = module(img, logits=leaf, log=True).square().mean()
        results.append([loss, *torch.autograd.grad(loss, [leaf, *crf.parameters()])])
    for a, b in zip(*results, strict=True):
        scale = max(1.0, float(a.detach().abs().max()))
        assert float((a - b).detach().abs().max()) <= 1e-5 * scale


# --- invalid arguments ---


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ({"num_classes": -3}, "num_classes must be a positive int, got -3"),
        ({"num_classes": 2.0}, "num_classes must be a positive int, got 2.0"),
        ({"num_classes": True}, "num_classes must be a positive int, got True"),
        ({"normalization": "both"}, "normalization must be one of"),
        ({"compat_gaussian": [1, 2]}, "compat_gaussian must be a number, a vector of 3"),
        ({"compat_bilateral": torch.eye(2)}, "compat_bilateral must be .* got shape"),
        ({"compat_bilateral": float("nan")}, "compat_bilateral must be finite"),
        ({"sxy_gaussian": 0}, "sxy_gaussian must be positive and finite, got 0"),
        ({"sxy_bilateral": (3, -1)}, "sxy_bilateral must be positive and finite, got -1"),
        ({"srgb": float("inf")}, "srgb must be positive and finite, got inf"),
    ],
)
def test_invalid_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        DenseCRF(**{"num_classes": 3, **arguments})


def test_invalid_calls(device):
    img, logits = batch(device)
    crf = DenseCRF(3).to(device)
    with pytest.raises(ValueError, match=r"^DenseCRF: logits must have 3 classes, got 4"):
        crf(img, logits=logits)
    with pytest.raises(ValueError, match=r"logits must have 3 classes, got 4"):
        crf(img[0], logits=logits[0])
    with pytest.raises(ValueError, match="exactly one of probs, logits and unary"):
        crf(img)
    with pytest.raises(ValueError, match="srgb must be a number or 3 numbers, got"):
        DenseCRF(4, srgb=(1, 2)).to(device)(img, logits=logits)


# --- training ---


def scenes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images (count, 3, 24, 24) of discs and bands, and labels of three classes."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    colours = torch.tensor([[90.0, 120, 100], [130, 110, 140], [110, 150, 120]])
    labels = torch.zeros(count, 24, 24, dtype=torch.long)
    for label in labels:
        cx, cy, r, band = (torch.rand(4, generator=generator) * 24).tolist()
        label[(y - band).abs() < 4] = 1
        label[(x - cx) ** 2 + (y - cy) ** 2 < (4 + r / 4) ** 2] = 2
    # Contiguous, because torch's nll_loss does not support channels_last on the CPU.
    clean = colours[labels].permute(0, 3, 1, 2).contiguous()
    return clean + 40 * torch.randn(clean.shape, generator=generator), labels


class Segmenter(nn.Module):
    """A pixel classifier, optionally followed by a CRF."""

    def __init__(self, crf: DenseCRF | None) -> None:
        super().__init__()
        self.unary = nn.Conv2d(3, 3, 1)
        self.crf = crf

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        logits = self.unary((img - 120) / 60)
        if self.crf is None:
            return logits.log_softmax(1)
        return self.crf(img, logits=logits, log=True)


def train(crf: DenseCRF | None, device: torch.device) -> tuple[list[float], float, float]:
    """Training losses, then loss and accuracy on other scenes."""
    torch.manual_seed(0)
    model = Segmenter(crf).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    img, labels = (t.to(device) for t in scenes(8, seed=1))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.nll_loss(model(img), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    img, labels = (t.to(device) for t in scenes(8, seed=2))
    with torch.no_grad():
        out = model(img)
    accuracy = float((out.argmax(1) == labels).float().mean())
    return losses, float(nn.functional.nll_loss(out, labels)), accuracy


@pytest.mark.slow
def test_training_improves_on_the_classifier_alone(device):
    crf = DenseCRF(
        3,
        iterations=5,
        sxy_gaussian=1.5,
        compat_gaussian=0.5 * (1 - torch.eye(3)),
        sxy_bilateral=6,
        srgb=60,
        compat_bilateral=0.5,
        learn_sigmas=True,
    )
    start = copy.deepcopy(crf.state_dict())
    losses, loss, accuracy = train(crf, device)
    alone, loss_alone, accuracy_alone = train(None, device)
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] < 0.7 * alone[-1]
    assert loss < 0.7 * loss_alone
    assert accuracy > accuracy_alone + 0.1
    moved = [
        name
        for name, value in crf.state_dict().items()
        if not torch.equal(value.cpu(), start[name])
    ]
    assert moved == [name for name, _ in crf.named_parameters()]


@pytest.mark.parametrize("learn_sigmas", [False, True])
def test_images_from_0_to_1_with_srgb_13_warn_once(learn_sigmas: bool) -> None:
    """Also in a model, whose images are often from 0 to 1 or normalised."""
    crf = DenseCRF(2, iterations=1, learn_sigmas=learn_sigmas)
    model = models.deeplab_v1(2, width=1 / 32, crf=crf).eval()
    image = torch.rand(1, 3, 17, 19)
    with pytest.warns(UserWarning, match=r"^DenseCRF: .*from 0 to 1 and srgb is 13") as caught:
        [call(image) for call in (model, model.predict)]
    assert len(caught) == 1
    other = DenseCRF(2, iterations=1, learn_sigmas=learn_sigmas)
    with pytest.warns(UserWarning, match=r"^DenseCRF: .*pass the image before its normalisation"):
        other(image * 5 - 2.5, logits=torch.rand(1, 2, 17, 19))
    quiet = DenseCRF(2, iterations=1, srgb=13 / 255, learn_sigmas=learn_sigmas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(image)
        model(image, image * 255)
        quiet(image, logits=torch.rand(1, 2, 17, 19))
        DenseCRF(2, iterations=1)(image * 255, logits=torch.rand(1, 2, 17, 19))
        no_colour = DenseCRF(2, iterations=1, compat_bilateral=None)
        no_colour(image, logits=torch.rand(1, 2, 17, 19))
