"""Tests of create_model(weights=), of its report, and of load_backbone's errors."""

from __future__ import annotations

import collections
import logging
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models.cases import CASES, Case, as_if_trained
from safetensors.torch import load_file, save_file

from segkernels import DenseCRF, models
from segkernels.models import LoadReport

State = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {"width": 1 / 64, "layers": (1, 1, 1, 1)}
COUNTER = "num_batches_tracked"


def deeplab(classes: int = 5, **options: Any) -> models.SegmentationModel:
    return as_if_trained(models.deeplab_v3_resnet50(classes, **{**SMALL, **options}))


def create(
    path: str | Path, name: str = "deeplab_v3_resnet50", **options: Any
) -> models.SegmentationModel:
    """Create the model of `deeplab` without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return models.create_model(name, weights=path, **{"num_classes": 5, **SMALL, **options})


def equal(found: models.SegmentationModel, state: State) -> None:
    assert found.state_dict().keys() >= state.keys()
    for key, value in state.items():
        assert torch.equal(found.state_dict()[key], value), key


def without(state: State, *starts: str) -> State:
    return {key: value for key, value in state.items() if not key.startswith(starts)}


def classifier(model: models.SegmentationModel) -> State:
    """A state dict like that of torchvision's ResNet with the model's backbone."""
    state = {k.removeprefix("backbone."): v for k, v in model.state_dict().items() if "backb" in k}
    return {**state, "fc.weight": torch.zeros(9, 8), "fc.bias": torch.zeros(9)}


def vgg16(norm: bool, width: int = 1, fc: int = 64) -> State:
    """A state dict like that of torchvision's vgg16 or vgg16_bn, with few channels."""
    state, number, before = {}, 0, 3
    for channels, depth in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(depth):
            after = channels * width
            state[f"features.{number}.weight"] = torch.randn(after, before, 3, 3)
            state[f"features.{number}.bias"] = torch.randn(after)
            if norm:
                for kind in ("weight", "bias", "running_mean", "running_var"):
                    state[f"features.{number + 1}.{kind}"] = torch.rand(after)
                state[f"features.{number + 1}.{COUNTER}"] = torch.tensor(3)
            number, before = number + (3 if norm else 2), after
        number += 1
    for index, shape in ((0, (fc, before * 49)), (3, (fc, fc)), (6, (10, fc))):
        state[f"classifier.{index}.weight"] = torch.randn(shape)
        state[f"classifier.{index}.bias"] = torch.randn(shape[0])
    return state


@pytest.mark.parametrize("case", CASES, ids=str)
def test_own_weights_load(case: Case, tmp_path: Path) -> None:
    model = as_if_trained(case.build())
    state = model.state_dict()
    model.save_pretrained(tmp_path / "folder")
    save_file({key: v.contiguous() for key, v in state.items()}, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    arguments = {"num_classes": 4, **case.options}
    for path in (tmp_path / "folder", str(tmp_path / "w.safetensors"), tmp_path / "w.pth"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = models.create_model(case.name, weights=path, **arguments)
        equal(found, state)
        assert found.training
        assert found.state_dict().keys() == state.keys()
        assert found.weights_report == LoadReport(
            case.name, str(path), "model", list(state), [], []
        )
    assert case.build().weights_report is None


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "model_state"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_checkpoints_of_wrappers_load(wrapper: str, prefix: str, tmp_path: Path) -> None:
    model = deeplab()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    checkpoint = {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}} if wrapper else state
    torch.save(checkpoint, tmp_path / "w.pt")
    equal(create(tmp_path / "w.pt"), model.state_dict())


@pytest.mark.parametrize("kind", ["legacy", "ordered", "parameters", "half", "double"])
def test_kinds_of_files_load(kind: str, tmp_path: Path) -> None:
    state = deeplab().state_dict()
    path = tmp_path / "w.pth"
    if kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "ordered":
        torch.save(collections.OrderedDict(state), path)
    elif kind == "parameters":
        torch.save(
            {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in state.items()}, path
        )
    else:
        state = {k: getattr(v, kind)() if v.is_floating_point() else v for k, v in state.items()}
        torch.save(state, path)
    model = create(path)
    equal(model, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_left_over_and_missing_tensors_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = deeplab(aux_loss=True).state_dict()
    aux = [key for key in state if key.startswith("aux_classifier.")]
    torch.save(state, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, "segkernels"), pytest.warns(match="left over") as caught:
        model = models.create_model("deeplab_v3_resnet50", 5, weights=tmp_path / "w.pth", **SMALL)
    report = model.weights_report
    assert (report.left_over, report.missing) == (aux, [])
    assert report.loaded == list(without(state, "aux_classifier."))
    text = (
        f"deeplab_v3_resnet50: loaded {len(report.loaded)} tensors from {tmp_path / 'w.pth'}; "
        f"left over: 8 ({', '.join(aux[:4])}, and 4 more)"
    )
    assert str(report) == text
    (warning,) = caught
    assert (str(warning.message), warning.filename) == (text, __file__)
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("segkernels", "INFO", text)

    torch.save(without(state, "aux_classifier."), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"missing: 7 \(aux_classifier\.0\.weight, aux.* more\)$"):
        model = models.create_model(
            "deeplab_v3_resnet50", 5, weights=tmp_path / "w.pth", aux_loss=True, **SMALL
        )
    # All but the counter.
    assert model.weights_report.missing == [key for key in aux if COUNTER not in key]
    equal(model, without(state, "aux_classifier."))


def test_old_files_without_counters_load_without_a_warning(tmp_path: Path) -> None:
    state = {k: v for k, v in deeplab().state_dict().items() if COUNTER not in k}
    torch.save(state, tmp_path / "w.pth")
    model = create(tmp_path / "w.pth")
    equal(model, state)
    assert (model.weights_report.missing, model.weights_report.loaded) == ([], list(state))


def test_a_crf_keeps_its_values_if_the_file_has_none(tmp_path: Path) -> None:
    torch.save(models.deeplab_v1(3, width=1 / 64).state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"missing: 5 \(crf\.compat_gaussian, "):
        model = models.create_model(
            "deeplab_v1",
            3,
            weights=tmp_path / "w.pth",
            width=1 / 64,
            crf=DenseCRF(3, compat_gaussian=7),
        )
    assert model.crf.compat_gaussian.item() == 7


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "name", ["deeplab_v3_resnet50", "pspnet50", "deeplab_v2_resnet101", "deeplab_v3plus_resnet101"]
)
def test_a_resnet_loads_into_the_backbone(name: str, prefix: str, tmp_path: Path) -> None:
    source = as_if_trained(models.create_model(name, 5, **SMALL))
    state = classifier(source)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pth")
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="missing") as caught:
        model = models.create_model(name, 5, weights=tmp_path / "w.pth", **SMALL)
    torch.manual_seed(3)
    initial = models.create_model(name, 5, **SMALL)
    body = {k: v for k, v in source.state_dict().items() if k.startswith("backbone.")}
    equal(model, body)
    equal(model, without(initial.state_dict(), "backbone."))
    report = model.weights_report
    assert (report.kind, report.path) == ("backbone", str(tmp_path / "w.pth"))
    assert report.loaded == list(body)
    assert report.left_over == ["fc.weight", "fc.bias"]
    heads = without(model.state_dict(), "backbone.")
    assert report.missing == [key for key in heads if COUNTER not in key]
    assert f"loaded {len(body)} tensors of the backbone from" in str(report)
    assert [str(w.message) for w in caught] == [str(report)]


@pytest.mark.parametrize(
    ("name", "norm", "fc", "parts"),
    [
        ("fcn8s", False, 64, ("vgg.", "fc6.", "fc7.")),
        ("deeplab_v1", False, 64, ("vgg.", "fc6.", "fc7.")),
        (
            "deeplab_v2_vgg16",
            False,
            64,
            ("vgg.", *(f"branches.{i}.fc{j}." for i in range(4) for j in (6, 7))),
        ),
        ("segnet", True, 64, ("vgg.",)),
        ("deconvnet", True, 64, ("vgg.",)),
    ],
)
def test_a_vgg_loads_into_the_backbone(
    name: str, norm: bool, fc: int, parts: tuple[str, ...], tmp_path: Path
) -> None:
    state = vgg16(norm, fc=fc)
    torch.save(state, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="tensors of the backbone from"):
        model = models.create_model(name, 5, weights=tmp_path / "w.pth", width=1 / 64)
    expected = models.create_model(name, 5, width=1 / 64)
    expected.load_backbone(state)
    report, own = model.weights_report, model.state_dict()
    assert report.loaded == [key for key in own if key.startswith(parts)]
    equal(model, {key: expected.state_dict()[key] for key in report.loaded})
    first = model.get_parameter("vgg.stage1.conv1_1.conv.weight")
    assert torch.equal(first, state["features.0.weight"])
    numbers = (6,) if len(parts) > 1 else (0, 3, 6)
    assert report.left_over == [f"classifier.{i}.{k}" for i in numbers for k in ("weight", "bias")]
    assert expected.weights_report == LoadReport(
        name, "", "backbone", report.loaded, report.missing, report.left_over
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_backbone_of_a_segmentation_model_loads(case: Case) -> None:
    """All but the head, into a model with another number of classes."""
    source, model = as_if_trained(case.build()), case.build(num_classes=7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if type(model).load_backbone is models.SegmentationModel.load_backbone:
        with pytest.raises(ValueError, match=f"{case.name}: torchvision has no classifier"):
            model.load_backbone(source.state_dict())
        return
    model.load_backbone({f"module.{key}": v for key, v in source.state_dict().items()})
    report = model.weights_report
    assert len(report.loaded) > 20
    equal(model, {key: source.state_dict()[key] for key in report.loaded})
    equal(model, {key: before[key] for key in report.missing})
    assert {key for key in before if COUNTER not in key} == {
        key for key in (*report.loaded, *report.missing) if COUNTER not in key
    }


def test_another_segmentation_model_gives_its_backbone(tmp_path: Path) -> None:
    state = deeplab().state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="missing: .*left over: "):
        model = models.create_model("pspnet50", 5, weights=tmp_path / "w.pth", **SMALL)
    equal(model, {key: v for key, v in state.items() if key.startswith("backbone.")})
    assert model.weights_report.left_over == list(without(state, "backbone."))


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors", "folder"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[] if c.name in ("unet", "segnet") else [pytest.mark.slow])
        for c in CASES
    ],
    ids=str,
)
def test_another_number_of_classes_says_what_to_do(case: Case, file: str, tmp_path: Path) -> None:
    source, path = as_if_trained(case.build()), tmp_path / file
    state = source.state_dict()
    if file == "folder":
        source.save_pretrained(path)
    elif file == "w.pth":
        torch.save({"model": state}, path)
    else:
        save_file({key: v.contiguous() for key, v in state.items()}, path)
    options = {**case.options, "num_classes": 7}
    with pytest.raises(
        ValueError, match=re.escape(f"{case.name}: {path} has 4 classes, ")
    ) as error:
        models.create_model(case.name, weights=path, **options)
    assert "got num_classes=7; pass num_classes=4" in str(error.value)
    equal(models.create_model(case.name, weights=path, **{**options, "num_classes": 4}), state)
    model = models.create_model(case.name, **options)
    if type(model).load_backbone is models.SegmentationModel.load_backbone:
        assert "load_backbone" not in str(error.value)
        return
    advice = re.search(
        r"build the model without weights and call (model\.load_b.*)$", str(error.value)
    )
    assert advice is not None
    import safetensors.torch

    exec(advice[1], {"model": model, "torch": torch, "safetensors": safetensors})
    equal(model, {key: state[key] for key in model.weights_report.loaded})


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    torch.save(deeplab().state_dict(), tmp_path / "w.pth")
    for options in ({"width": 1 / 32}, {"in_channels": 4}):
        with pytest.raises(ValueError, match=r"w\.pth does not fit: backbone\.conv1\.weight is"):
            create(tmp_path / "w.pth", **options)
    # Both the classes and the channels differ.
    with pytest.raises(ValueError, match=r"w\.pth does not fit: backbone\.conv1\.weight is"):
        create(tmp_path / "w.pth", num_classes=7, in_channels=4)
    torch.save(classifier(deeplab()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not fit: backbone\.conv1\.weight is .*w\.pth\)$"):
        create(tmp_path / "w.pth", in_channels=4)
    with pytest.raises(ValueError, match=r"does not fit: missing backbone\.layer1\.1.*w\.pth\)$"):
        create(tmp_path / "w.pth", layers=(2, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_integer_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    state = deeplab().state_dict()
    key = "classifier.4.weight"
    torch.save({**state, key: state[key].to(dtype)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"{key} is {dtype}, not torch\.float32"):
        create(tmp_path / "w.pth")
    counters = {k: v.float() if COUNTER in k else v for k, v in state.items()}
    torch.save(counters, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"{COUNTER} is torch\.float32, not torch\.int64"):
        create(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["unet", "deeplab_v3_resnet50", "fcn8s"])
def test_a_file_of_which_nothing_fits(name: str, tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(1), "b": torch.zeros(2)}, tmp_path / "w.pth")
    first = next(iter(models.create_model(name, width=1 / 64).state_dict()))
    with pytest.raises(
        ValueError, match=rf"{name}: .*w\.pth has no tensor of the model; it has a\.weight, b, and "
    ) as error:
        models.create_model(name, weights=tmp_path / "w.pth", width=1 / 64)
    assert f"the model {first}, " in str(error.value)
    torch.save(classifier(deeplab()), tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"unet: .*w\.pth has no tensor of the model; it has conv1"
    ):
        models.create_model("unet", weights=tmp_path / "w.pth", width=1 / 64)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Evil(), "weights_only=True refuses it .*system"),
        ({"state_dict": {"a": Evil()}}, "weights_only=True refuses it .*system"),
        (torch.nn.Linear(1, 1), "weights_only=True refuses it .*Linear"),
        ([torch.zeros(1)], "must hold a state dict, got list"),
        (torch.zeros(1), "must hold a state dict, got Tensor"),
        ({}, "must hold a state dict, got an empty one"),
        ({"model": {}}, "must hold a state dict, got an empty one"),
        ({"epoch": 3}, "must map names to tensors, got int for 'epoch'"),
        ({"state_dict": {"a": [1.0]}}, "must map names to tensors, got list for 'a'"),
        ({1: torch.zeros(1)}, "must map names to tensors, got Tensor for 1"),
        ({"a": torch.zeros(1, device="meta")}, "must hold plain tensors, got a without"),
        ({"a": torch.eye(3).to_sparse()}, "must hold plain tensors, got a without"),
    ],
)
def test_files_without_a_state_dict(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth.* {message}"):
        create(tmp_path / "w.pth")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "zip"])
def test_damaged_files(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(deeplab().state_dict(), path)
    else:
        torch.save(deeplab().state_dict(), path)
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "text": b"weights",
        "cut": whole[:-50],
        "zip": b"PK\x03\x04" + whole[9:],
    }
    path.write_bytes(content[damage])
    with pytest.raises((RuntimeError, ValueError), match=re.escape(str(path))):
        create(path)


def test_paths_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights must be a file, or a folder .*none\.pth"):
        create(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"there is no .*model\.safetensors"):
        create(tmp_path)
    state: Any = deeplab().state_dict()
    with pytest.raises(TypeError, match="create_model: weights must be a path, got OrderedDict"):
        create(state)
    with pytest.raises(TypeError, match="too many positional arguments"):
        models.create_model("unet", 21, 3, tmp_path)
    with pytest.raises(ValueError, match="create_model: there is no model named 'u'"):
        create(tmp_path / "none.pth", "u")


def test_weights_need_safetensors_only_for_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    deeplab().save_pretrained(tmp_path / "folder")
    torch.save(deeplab().state_dict(), tmp_path / "w.pth")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    create(tmp_path / "w.pth")
    with pytest.raises(ImportError, match="create_model needs safetensors: pip install"):
        create(tmp_path / "folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [*s], "state_dict must hold a state dict, got list"),
        (lambda s: "resnet50.pth", "state_dict must hold a state dict, got str"),
        (lambda s: {**s, "epoch": 3}, "must map names to tensors, got int for 'epoch'"),
        (lambda s: {**s, "conv1.weight": None}, "to tensors, got NoneType for 'conv1.weight'"),
        (lambda s: {**s, "conv1.weight": s["conv1.weight"].int()}, "is torch.int32, not torch.fl"),
        (lambda s: {**s, "extra": torch.zeros(1)}, "unknown backbone.extra"),
        (lambda s: without(s, "bn1."), "missing backbone.bn1.weight"),
    ],
)
def test_load_backbone_refuses(change: Callable[[State], Any], message: str) -> None:
    model = deeplab()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = change(classifier(deeplab_of_another_seed()))
    with pytest.raises(ValueError, match=f"deeplab_v3_resnet50: .*{re.escape(message)}"):
        model.load_backbone(given)
    equal(model, before)
    assert model.weights_report is None


def deeplab_of_another_seed() -> models.SegmentationModel:
    torch.manual_seed(5)
    return models.deeplab_v3_resnet50(5, **SMALL)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("features.conv0.weight", torch.zeros(1), "unknown vgg.features.conv0.weight"),
        ("features.0.0.weight", torch.zeros(1), "unknown vgg.features.0.0.weight"),
        ("features.30.weight", torch.zeros(1, 1, 3, 3), "unknown vgg.features.30.weight"),
        ("features.2.weight", torch.zeros(1), "missing vgg.stage5.conv5_3.conv.weight"),
        ("features.28.weight", None, "missing vgg.stage5.conv5_3.conv.weight"),
        ("classifier.0.weight", torch.zeros(3), "classifier.0.weight (3,) must be [filters"),
        ("classifier.0.bias", torch.zeros(()), "classifier.0.bias must be (64,), got ()"),
        ("classifier.3.weight", torch.zeros(64), "classifier.3.weight must be (64, 64), got"),
        ("classifier.3.bias", None, "the state dict lacks classifier.3.bias"),
    ],
)
def test_load_backbone_of_vgg_refuses(key: str, value: Any, message: str) -> None:
    model = models.fcn8s(3, width=1 / 64)
    state = vgg16(norm=False)
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        model.load_backbone(state)
    assert model.weights_report is None


def test_reports_are_copied_with_the_model(tmp_path: Path) -> None:
    deeplab().save_pretrained(tmp_path / "a")
    model = create(tmp_path / "a")
    assert pickle.loads(pickle.dumps(model)).weights_report == model.weights_report
    model.save_pretrained(tmp_path / "b")
    equal(models.from_pretrained(tmp_path / "b"), load_file(tmp_path / "a" / "model.safetensors"))
