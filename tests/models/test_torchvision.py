"""Comparison with torchvision's models: ``pip install ".[peers]" && pytest -m peers``.

Each release of torchvision needs one release of torch, so the extra may install another torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models.cases import as_if_trained, outputs
from models.counted import flops, parameters

from segkernels import models

try:
    import torchvision
    from torchvision.models import segmentation

    MISSING = ""
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision needs another torch
    MISSING = f'torchvision cannot be imported ({error}): pip install ".[peers]"'

pytestmark = [pytest.mark.peers, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

WHOLE = [
    ("fcn_resnet50", "fcn_resnet50"),
    ("fcn_resnet101", "fcn_resnet101"),
    ("deeplab_v3_resnet50", "deeplabv3_resnet50"),
    ("deeplab_v3_resnet101", "deeplabv3_resnet101"),
]


def theirs(name: str, **options: Any) -> Any:
    build = getattr(segmentation, name)
    return build(weights=None, weights_backbone=None, num_classes=21, **options)


@pytest.mark.parametrize(("name", "their_name"), WHOLE)
@pytest.mark.parametrize("aux", [False, True], ids=["", "aux"])
def test_whole_models_load_and_give_the_same(name: str, their_name: str, aux: bool) -> None:
    expected = as_if_trained(theirs(their_name, aux_loss=aux)).eval()
    for backend in ("segkernels", "torch"):
        model = models.create_model(name, aux_loss=aux, backend=backend)
        model.load_state_dict(expected.state_dict())  # strict, so all names are the same
        model.eval()
        image = torch.randn(1, 3, 65, 97)
        with torch.no_grad():
            found, wanted = outputs(model(image)), expected(image)
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-4 * scale)
            print(f"{name} {backend} {key}: {float((found[key] - value).abs().max() / scale):.1e}")


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplab_v3_resnet50"])
def test_training_gives_the_same_gradients(name: str) -> None:
    expected = as_if_trained(theirs(dict(WHOLE)[name], aux_loss=True)).double().train()
    model = models.create_model(name, aux_loss=True).double().train()
    model.load_state_dict(expected.state_dict())
    image, target = torch.randn(2, 3, 33, 41).double(), torch.randint(0, 21, (2, 33, 41))
    torch.manual_seed(1)
    model.loss(image, target).backward()
    torch.manual_seed(1)
    out = expected(image)
    loss = torch.nn.functional.cross_entropy
    (loss(out["out"], target) + 0.5 * loss(out["aux"], target)).backward()
    theirs_by_name = dict(expected.named_parameters())
    for key, parameter in model.named_parameters():
        grad = theirs_by_name[key].grad
        torch.testing.assert_close(
            parameter.grad, grad, rtol=0, atol=1e-6 * float(grad.abs().max()) + 1e-12
        )


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("fcn8s", "vgg16"),
        ("dilatednet_frontend", "vgg16"),
        ("deeplab_v1", "vgg16"),
        ("deeplab_v2_vgg16", "vgg16"),
        ("segnet", "vgg16_bn"),
        ("deconvnet", "vgg16_bn"),
    ],
)
def test_vgg_backbones_load(name: str, backbone: str) -> None:
    source = as_if_trained(getattr(torchvision.models, backbone)(weights=None)).eval()
    model = models.create_model(name).eval()
    model.load_backbone(source.state_dict())
    image = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        # The layers before the fourth pooling, with a padding of 1 and 2x2 max pooling.
        found = image
        for number, stage in enumerate(list(model.vgg)[:4]):
            for layer in stage:
                layer.conv.padding = (1, 1)
            found = stage(torch.nn.functional.max_pool2d(found, 2) if number else found)
        end = {"vgg16": 23, "vgg16_bn": 33}[backbone]
        expected = source.features[:end](image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    if name == "fcn8s":
        x = torch.randn(3, 512, 7, 7)
        with torch.no_grad():
            ours = model.fc7(model.fc6(x)).flatten(1)
            wanted = source.classifier[:5](x.flatten(1)).relu()
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * float(wanted.max()))


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("deeplab_v2_resnet101", "resnet101"),
        ("pspnet50", "resnet50"),
        ("deeplab_v3plus_resnet101", "resnet101"),
    ],
)
def test_resnet_backbones_load(name: str, backbone: str) -> None:
    dilated = [False, name != "deeplab_v3plus_resnet101", True]
    source = getattr(torchvision.models, backbone)(
        weights=None, replace_stride_with_dilation=dilated
    )
    as_if_trained(source).eval()
    model = models.create_model(name).eval()
    model.load_backbone(source.state_dict())
    image = torch.randn(1, 3, 65, 49)
    with torch.no_grad():
        x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
        for number, found in enumerate(model.backbone(image), 1):
            x = getattr(source, f"layer{number}")(x)
            scale = float(x.abs().max())
            torch.testing.assert_close(found, x, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(("name", "their_name"), WHOLE)
def test_operations_are_those_that_torchvision_states(name: str, their_name: str) -> None:
    meta = segmentation.__dict__[_weights(their_name)].DEFAULT.meta
    with torch.device("meta"):
        model = models.create_model(name, aux_loss=True, backend="torch").eval()
    assert parameters(model) == meta["num_params"]
    # torchvision counts multiplications, at 520 x 520.
    assert flops(model, 520, 520) / 2e9 == pytest.approx(meta["_ops"], abs=6e-4)


def _weights(name: str) -> str:
    kind, net = name.split("_")
    return {"fcn": "FCN", "deeplabv3": "DeepLabV3"}[kind] + f"_ResNet{net[6:]}_Weights"


@pytest.mark.parametrize(
    ("name", "their_name", "file"),
    [
        *((*names, "w.pth") for names in WHOLE),
        *((*WHOLE[0], file) for file in ("legacy.pth", "wrapped.pth", "w.safetensors")),
    ],
)
def test_files_of_whole_models_load(name: str, their_name: str, file: str, tmp_path: Path) -> None:
    state = as_if_trained(theirs(their_name, aux_loss=True)).state_dict()
    path = tmp_path / file
    if file == "w.safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif file == "wrapped.pth":  # as torchvision's reference script writes it
        torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 1}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=file == "w.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.create_model(name, aux_loss=True, weights=path)
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    report = model.weights_report
    assert (report.kind, report.loaded) == ("model", list(found))

    with pytest.warns(UserWarning, match=r"left over: 8 \(aux_classifier\.0\.weight") as caught:
        model = models.create_model(name, weights=path)
    assert len(caught) == 1
    aux = {key for key in state if key.startswith("aux_classifier.")}
    assert set(model.weights_report.left_over) == aux

    with pytest.raises(ValueError, match="has 21 classes, got num_classes=7; pass num_classes=21"):
        models.create_model(name, num_classes=7, weights=path)
    model = models.create_model(name, num_classes=7)
    model.load_backbone(torch.load(path, "cpu") if file != "w.safetensors" else state)
    body = [key for key in state if key.startswith("backbone.")]
    assert model.weights_report.loaded == body
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in body)
    path.unlink()  # pytest keeps the folders of three runs


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("fcn8s", "vgg16"),
        ("deeplab_v1", "vgg16"),
        ("segnet", "vgg16_bn"),
        ("deeplab_v3_resnet50", "resnet50"),
        ("deeplab_v2_resnet101", "resnet101"),
    ],
)
def test_files_of_classifiers_load(name: str, backbone: str, tmp_path: Path) -> None:
    state = as_if_trained(getattr(torchvision.models, backbone)(weights=None)).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=rf"{name}: loaded \d+ tensors of the backbone from"):
        model = models.create_model(name, weights=tmp_path / "w.pth")
    (tmp_path / "w.pth").unlink()
    expected = models.create_model(name)
    expected.load_backbone(state)
    report = model.weights_report
    found, wanted = model.state_dict(), expected.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in report.loaded)
    last = {"vgg16": "classifier.6", "vgg16_bn": "classifier", "resnet50": "fc", "resnet101": "fc"}
    head = [key for key in state if key.startswith(last[backbone])]
    assert report.left_over == head
    used = [key for key in state if key not in head]
    assert len(report.loaded) == len(used)
    first = "features.0.weight" if "vgg" in backbone else "conv1.weight"
    assert torch.equal(found[report.loaded[0]], state[first])
