"""Tests of every model: output, gradients, backends, compilers, layouts, bad input."""

from __future__ import annotations

import copy
import inspect
import pickle
import typing
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models.cases import CASES, CLASSES, PARAMETERS, Case, as_if_trained, outputs
from models.counted import parameters
from torch.utils._python_dispatch import TorchDispatchMode

from segkernels import DenseCRF, models
from segkernels.models import _registry

every = pytest.mark.parametrize("case", CASES, ids=str)
# `once`, for tests that take seconds, leaves out models whose layers another model has too.
PARTS = ("fcn32s", "fcn16s", "unet-valid", "dilatednet_frontend", "pspnet50")
# Models with unpooling and with a ResNet and ASPP; `once` marks the others as nightly.
QUICK = ("segnet", "deeplab_v3_resnet50")
once = pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[] if str(c) in QUICK else [pytest.mark.nightly])
        for c in CASES
        if str(c) not in PARTS
    ],
    ids=str,
)


def spec_of(case: Case) -> _registry.Spec:
    (spec,) = [spec for spec in _registry.specs() if spec.name == case.name]
    return spec


def target_for(model: models.SegmentationModel, images: torch.Tensor) -> torch.Tensor:
    size = outputs(model(images))["out"].shape[-2:]
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, CLASSES, (len(images), *size), generator=generator)


def gradients(model: models.SegmentationModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    assert not [key for key, g in zip(named, found, strict=True) if g is None]
    return dict(zip(named, found, strict=True))


def test_the_list_of_models() -> None:
    assert models.list_models() == [
        *("fcn32s", "fcn16s", "fcn8s", "fcn_resnet50", "fcn_resnet101", "unet"),
        *("dilatednet_frontend", "dilatednet", "dilatednet_large", "deeplab_v1"),
        *("deeplab_v2_vgg16", "deeplab_v2_resnet101", "deconvnet", "segnet", "fc_densenet56"),
        *("fc_densenet67", "fc_densenet103", "pspnet50", "pspnet101", "deeplab_v3_resnet50"),
        *("deeplab_v3_resnet101", "deeplab_v3plus_resnet101"),
    ]
    assert {name for name, _, _ in PARAMETERS} == set(models.list_models())
    same = {"fcn_resnet101", "deeplab_v3_resnet101", "fc_densenet67", "fc_densenet103"}
    assert {case.name for case in CASES} | same == set(models.list_models())


@pytest.mark.parametrize(
    ("name", "arguments", "count"), PARAMETERS, ids=[f"{n}-{c}" for n, _, c in PARAMETERS]
)
@pytest.mark.slow
def test_parameters_are_those_of_the_paper(
    name: str, arguments: dict[str, Any], count: int
) -> None:
    found = []
    for backend in ("segkernels", "torch"):
        with torch.device("meta"):
            model = models.create_model(name, backend=backend, **arguments)
        assert parameters(model) == count
        assert {p.device.type for p in model.parameters()} == {"meta"}
        found.append({key: value.shape for key, value in model.state_dict().items()})
    assert found[0] == found[1]
    channels, classes = arguments.get("in_channels", 3), arguments.get("num_classes", 21)
    size = 188 if arguments.get("padding") == "valid" else 224
    out = model.eval()(torch.empty(1, channels, size, size, device="meta"))
    assert outputs(out)["out"].shape[:2] == (1, classes)
    assert set(outputs(out)) == ({"out", "aux"} if "aux_loss" in arguments else {"out"})


@every
def test_output_labels_loss_and_gradients(case: Case) -> None:
    model, images = as_if_trained(case.build()), case.images()
    target = target_for(model, images)
    target[:, :3] = 255
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    loss = model.loss(images, target, weight=weight, ignore_index=255)
    assert all(g.isfinite().all() for g in gradients(model, loss).values())
    model.eval()
    out = outputs(model(images))
    for scores in out.values():
        assert scores.shape[:2] == (2, CLASSES)
        assert case.label == "unet-valid" or scores.shape[2:] == images.shape[2:]
    expected = sum(
        (1.0 if key == "out" else model.aux_weight)
        * F.cross_entropy(scores, target, weight, ignore_index=255, label_smoothing=0.1)
        for key, scores in out.items()
    )
    loss = model.loss(images, target, weight=weight, ignore_index=255, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    labels = model.predict(images)
    assert labels.dtype == torch.int64
    assert not labels.requires_grad
    scores = out["out"]
    chosen = scores.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert (scores.amax(1) - chosen).max() <= 1e-5 * scores.abs().max()
    # This needs eval mode: in training a bias before BatchNorm has no gradient.
    assert [key for key, g in gradients(model, loss).items() if not g.any()] == []


@every
def test_both_backends_are_the_same_model(case: Case) -> None:
    ours, theirs = as_if_trained(case.build("segkernels")), case.build("torch")
    theirs.load_state_dict(ours.state_dict())
    images = case.images()
    target = target_for(theirs, images)
    theirs.load_state_dict(ours.state_dict())
    # In float32: evaluation with folded BatchNorm and fused steps.
    ours.eval(), theirs.eval()
    with torch.no_grad():
        found, expected = outputs(ours(images)), outputs(theirs(images))
        close(ours.loss(images, target), theirs.loss(images, target), 1e-4)
    assert found.keys() == expected.keys()
    for key in found:
        close(found[key], expected[key], 1e-4)
    assert (ours.predict(images) == theirs.predict(images)).double().mean() > 0.999
    # In float64: training with the same dropout. Gradients of deep networks amplify differences.
    ours.double().train(), theirs.double().train()
    results = []
    for model in (ours, theirs):
        torch.manual_seed(4)
        found = outputs(model(images.double()))
        torch.manual_seed(4)
        grads = gradients(model, model.loss(images.double(), target))
        results.append(({**found, **dict(model.named_buffers())}, grads))
    for mine, other in zip(*results, strict=True):
        assert mine.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in results[1][1].values())
    for key, value in results[1][0].items():
        close(results[0][0][key], value, 1e-7)
    for key, grad in results[1][1].items():
        close(results[0][1][key], grad, 1e-7, at_least=1e-6 * largest)


def close(
    found: torch.Tensor, expected: torch.Tensor, share: float, at_least: float = 1e-30
) -> None:
    """Compare with a tolerance of `share` times the largest value, or times `at_least`."""
    scale = max(float(expected.detach().abs().max()), at_least)
    torch.testing.assert_close(found, expected, rtol=0, atol=share * scale)


@every
def test_synchronised_batch_norm_gives_the_same(case: Case) -> None:
    for backend in ("segkernels", "torch"):
        model, images = as_if_trained(case.build(backend)).eval(), case.images()
        with torch.no_grad():
            expected = outputs(model(images))
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            found = outputs(model(images))
        assert not any(type(part) is torch.nn.BatchNorm2d for part in model.modules())
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key], 1e-6)


class FrozenBatchNorm2d(torch.nn.Module):
    """As torchvision's: the statistics and the affine map are buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var, weight, bias = (
            t[:, None, None] for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) * (var + 1e-5).rsqrt() * weight + bias


NORMS: dict[str, Any] = {
    "GroupNorm": lambda channels: torch.nn.GroupNorm(1, channels),
    "InstanceNorm2d": lambda channels: torch.nn.InstanceNorm2d(channels, affine=True),
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
}


def with_norm(model: models.SegmentationModel, norm: Any) -> models.SegmentationModel:
    """Replace each BatchNorm2d."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(part, name, norm(child.num_features))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm",
    ["GroupNorm", *(pytest.param(n, marks=pytest.mark.slow) for n in list(NORMS)[1:])],
)
@every
def test_other_norms_are_the_same_in_both_backends(case: Case, norm: str, training: bool) -> None:
    ours, theirs = (
        with_norm(case.build(b), NORMS[norm]).double().train(training)
        for b in ("segkernels", "torch")
    )
    as_if_trained(ours)
    theirs.load_state_dict(ours.state_dict())
    images = case.images(dtype=torch.float64)
    if norm == "InstanceNorm2d" and not case.one_image:
        for model in (ours, theirs):  # image pooling leaves one pixel, which has no variance
            with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
                model(images)
        return
    results = []
    for model in (ours, theirs):
        torch.manual_seed(4)
        out = outputs(model(images))
        results.append((out, gradients(model, squares(out))))
    (found, found_grads), (expected, grads) = results
    assert found.keys() == expected.keys()
    for key in expected:
        close(found[key], expected[key], 1e-7)
    largest = max(float(g.abs().max()) for g in grads.values())
    for key, grad in grads.items():
        close(found_grads[key], grad, 1e-7, at_least=1e-6 * largest)


@every
def test_one_image_trains_or_is_refused(case: Case) -> None:
    model = case.build()
    if case.one_image:
        model.loss(case.images(1), target_for(model, case.images(1))).backward()
    else:
        with pytest.raises(ValueError, match="training needs two images or more, got 1"):
            model(case.images(1))
    assert outputs(model.eval()(case.images(1)))["out"].shape[:2] == (1, CLASSES)


@every
def test_layouts_and_autocast(case: Case) -> None:
    model, images = as_if_trained(case.build()).eval(), case.images()
    with torch.no_grad():
        expected = outputs(model(images))["out"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = outputs(model(images))["out"]
        model = model.to(memory_format=torch.channels_last)
        last = outputs(model(images.contiguous(memory_format=torch.channels_last)))["out"]
    close(last, expected, 1e-4)
    # Rounding can change the position of a maximum, and so where unpooling puts the value.
    unpools = "max_unpool2d" in spec_of(case).ops
    assert (half.float() - expected).norm() < (0.35 if unpools else 0.1) * expected.norm()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(images, target_for(model, images))
    assert loss.dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients(model, loss).values())


@once
@pytest.mark.parametrize(
    "backend", ["segkernels", pytest.param("torch", marks=pytest.mark.nightly)]
)
def test_compiles(case: Case, backend: str) -> None:
    model, images = as_if_trained(case.build(backend)).eval(), case.images(1)
    torch.compiler.reset()
    # In one graph. "aot_eager" also runs the fake kernels of segkernels' operators.
    tracer = "aot_eager" if backend == "segkernels" else "eager"
    compiled = torch.compile(model, fullgraph=True, backend=tracer)
    with torch.no_grad():
        expected, found = outputs(model(images)), outputs(compiled(images))
    for key in expected:
        close(found[key], expected[key], 1e-4)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            c, marks=pytest.mark.slow if c.name == "deeplab_v3_resnet50" else pytest.mark.nightly
        )
        for c in CASES
        if c.name in ("fcn8s", "unet", "deeplab_v3_resnet50") and not c.label
    ],
    ids=str,
)
def test_compiles_for_training(case: Case) -> None:
    model, images = as_if_trained(case.build()).train(), case.images()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    expected = outputs(model(images))
    grads = gradients(model, squares(expected))
    largest = max(float(g.abs().max()) for g in grads.values())
    torch.compiler.reset()
    found = outputs(torch.compile(model, fullgraph=True, backend="aot_eager")(images))
    for key in expected:
        close(found[key], expected[key], 1e-4)
    for key, grad in gradients(model, squares(found)).items():
        close(grad, grads[key], 1e-3, at_least=1e-3 * largest)


@pytest.mark.compiles
@pytest.mark.nightly
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("fcn8s", "deeplab_v3_resnet50")], ids=str
)
def test_compiles_with_inductor(case: Case) -> None:
    """The default compiler, on the loss of a training step and on predict."""
    model, images = as_if_trained(case.build()), case.images()
    target = torch.randint(0, CLASSES, (2, *case.size))
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    expected = gradients(model, model.loss(images, target))
    largest = max(float(g.abs().max()) for g in expected.values())
    torch.compiler.reset()
    loss = torch.compile(model.loss, fullgraph=True)(images, target)
    for key, grad in gradients(model, loss).items():
        close(grad, expected[key], 1e-3, at_least=1e-3 * largest)
    model.eval()
    with torch.no_grad():
        labels = torch.compile(model.predict, fullgraph=True)(images)
        assert (labels == model.predict(images)).double().mean() > 0.999


def squares(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([scores.square().mean() for scores in out.values()]).sum()


class Seen(TorchDispatchMode):
    """Record the names of the segkernels operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "segkernels":
            self.ops.add(func._schema.name.split("::")[1].removesuffix("_backward"))
        return func(*args, **(kwargs or {}))


@every
def test_goes_through_the_operators_that_are_listed(case: Case) -> None:
    ops = set(spec_of(case).ops)
    has_crf = "dense_crf" in ops
    more = {"crf": DenseCRF(CLASSES, iterations=1)} if has_crf else {}
    model, images = case.build(**more), case.images()
    target = target_for(model, images)
    with Seen() as seen:
        model.loss(images, target)
        model.eval().predict(images)
        model(images)
        if has_crf:
            model.crf = None
            model.predict(images)
    assert seen.ops - {"permutohedral"} == ops


@every
def test_refuses_what_does_not_fit(case: Case) -> None:
    model = case.build().eval()
    height, width = case.size
    for shape in [(3, height, width), (1, 4, height, width), (1, 3, 2, height, width)]:
        with pytest.raises(ValueError, match=rf"{case.name}: input must be \[N, 3, H, W\], got"):
            model(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"input must hold floats, got torch\.uint8"):
        model(torch.zeros(1, 3, height, width, dtype=torch.uint8))
    with pytest.raises(ValueError, match="target must be"):
        model.loss(torch.zeros(1, 3, height, width), torch.zeros(1, 7, 7, dtype=torch.int64))
    if case.too_small is None:
        assert outputs(model(torch.zeros(1, 3, 1, 2)))["out"].shape == (1, CLASSES, 1, 2)
        return
    for call in (model, model.predict):
        with pytest.raises(ValueError, match=rf"{case.name}: height and width must be at least"):
            call(torch.zeros(1, 3, *case.too_small))


def test_sizes_that_do_not_fit_name_the_nearest() -> None:
    same, valid = (models.unet(width=1 / 64, padding=p) for p in ("same", "valid"))
    with pytest.raises(
        ValueError,
        match=r"at least 16 and a multiple of 16 more, got width 100 \(nearest: 96 or 112\)",
    ):
        same(torch.zeros(1, 3, 32, 100))
    with pytest.raises(ValueError, match=r"15 \(nearest: 16\), width 17 \(nearest: 16 or 32"):
        same(torch.zeros(1, 3, 15, 17))
    with pytest.raises(ValueError, match=r"height 570 \(nearest: 556 or 572\)"):
        valid(torch.zeros(1, 3, 570, 188))
    with pytest.raises(ValueError, match=r"height 223 \(nearest: 224\)"):
        models.deconvnet(width=1 / 64)(torch.zeros(1, 3, 223, 300))


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ValueError, match="'deeplabv3_resnet50'; did you mean deeplab_v3_resnet50"):
        models.create_model("deeplabv3_resnet50")
    with pytest.raises(ValueError, match="did you mean segnet"):
        models.create_model("SegNet")
    with pytest.raises(ValueError, match="known: fcn32s, fcn16s"):
        models.create_model("x")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("fcn8s", {"num_classes": 0}, "num_classes must be a positive int, got 0"),
        ("fcn8s", {"in_channels": 1.5}, "in_channels must be a positive int, got 1.5"),
        ("unet", {"backend": "cuda"}, "backend must be one of"),
        ("unet", {"padding": "full"}, 'padding must be "same" or "valid"'),
        ("dilatednet", {"padding": "same"}, 'padding must be "reflect" or "zeros"'),
        ("deeplab_v1", {"field": "5x5"}, "field must be one of large_fov, 4x4, 7x7"),
        ("deeplab_v1", {"crf": DenseCRF(3)}, "crf must be a DenseCRF of 21 classes, got 3 classes"),
        ("deeplab_v2_resnet101", {"crf": 1}, "crf must be a DenseCRF of 21 classes, got int"),
        ("deeplab_v3_resnet50", {"output_stride": 4}, "output_stride must be 8 or 16, got 4"),
        ("deeplab_v3plus_resnet101", {"output_stride": 4}, "output_stride must be 8 or 16"),
        ("pspnet50", {"stem": "5x5"}, 'stem must be "7x7" or "deep"'),
        ("fc_densenet56", {"depths": (4, 4)}, "depths must be 11 positive ints"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:20],
)
def test_bad_arguments(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        models.create_model(name, **arguments)


def test_copies_and_pickles_keep_their_name() -> None:
    model = models.segnet(3, width=1 / 64)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same.name == "segnet"
        assert same.arguments == model.arguments
        assert same.arguments["width"] == 1 / 64


@pytest.mark.parametrize("spec", _registry.specs(), ids=lambda spec: spec.name)
def test_builders_look_like_functions(spec: _registry.Spec) -> None:
    build = getattr(models, spec.name)
    assert (build.__name__, build.__qualname__) == (spec.name, spec.name)
    assert pickle.loads(pickle.dumps(build)) is build
    assert f" {spec.parameters:,} parameters." in build.__doc__
    signature = inspect.signature(build)
    assert list(signature.parameters)[:2] == ["num_classes", "in_channels"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(signature.parameters.values())[2:])
    assert all(p.default is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation == "SegmentationModel"
    hints = typing.get_type_hints(build)
    assert hints.keys() == {*signature.parameters, "return"}
    assert hints["return"] is models.SegmentationModel


def test_builders_refuse_arguments_that_they_set() -> None:
    with pytest.raises(TypeError, match=r"fcn8s\(\) got an unexpected keyword argument 'stride'"):
        models.create_model("fcn8s", stride=16)
    with pytest.raises(TypeError, match=r"fcn8s\(\) too many positional arguments"):
        models.create_model("fcn8s", 21, 3, 16)


def test_variants_of_one_class_have_their_own_defaults() -> None:
    with torch.device("meta"):
        shallow, deep = models.pspnet50(width=1 / 64), models.pspnet101(width=1 / 64)
    assert (shallow.arguments["layers"], deep.arguments["layers"]) == ((3, 4, 6, 3), (3, 4, 23, 3))
    assert len(deep.backbone.layer3) == 23
